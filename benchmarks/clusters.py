"""Clustering routers' probabilities, ours beside the published way, in one run.

    python benchmarks/clusters.py [--tokens 60000] [--layers 8] [--k 32] [--restarts 8] [--folder DIR]
    python benchmarks/clusters.py --extract [--tokens 2000] [--layers 3]    speed and memory at the published width

The published way: two PCAs by scikit-learn's randomized solver, the first with all components; then MiniBatchKMeans
with ten starts and 20 rounds of refinement. Ours: the covariance summed over blocks of rows, and spherical k-means with
restarts, each run to its end. Each side runs in a process of its own; times are CPU seconds, which other work on the
machine changes least.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.common import make_random_checkpoint, run_child, table

HEAD = """
import sys, time
import numpy as np
from emo_select import progress
progress.configure(quiet=True)
folder, k, restarts = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
def done(start): return time.process_time() - start
"""
OUR_PCA = HEAD + """
from emo_select.analysis.fit import unit
from emo_select.analysis.pca import fit_pca
values = np.load(folder + "/probs.npy", mmap_mode="r")
start = time.process_time()
blocks = lambda: ((i, values[i:i + 8192].astype(np.float32)) for i in range(0, len(values), 8192))
pca = fit_pca(blocks, *values.shape)
out = np.empty((len(values), len(pca.components)), dtype=np.float32)
for i, block in blocks():
    out[i:i + len(block)] = unit(pca.apply(block))
result = {"seconds": done(start), "components": out.shape[1]}
np.save(folder + "/ours.npy", out)
"""
THEIR_PCA = HEAD + """
from sklearn.decomposition import PCA
from sklearn.preprocessing import normalize
values = np.load(folder + "/probs.npy").astype(np.float32)
start = time.process_time()
values -= values.mean(axis=0)
first = PCA(n_components=min(values.shape), svd_solver="randomized", random_state=42).fit(values)
count = int(np.searchsorted(np.cumsum(first.explained_variance_ratio_), 0.95)) + 1
out = PCA(n_components=count, svd_solver="randomized", random_state=42).fit_transform(values)
out = normalize(out).astype(np.float32)
result = {"seconds": done(start), "components": count}
"""
OUR_KMEANS = HEAD + """
from emo_select.analysis.kmeans import kmeans, mean_cosine
values = np.load(folder + "/ours.npy")
start = time.process_time()
found = kmeans(values, k, restarts=restarts)
result = {"seconds": done(start), "objective": mean_cosine(values, found.assignments)}
"""
FAISS = OUR_KMEANS.replace("restarts=restarts)", "restarts=restarts, engine='faiss')")
THEIR_KMEANS = HEAD + """
from sklearn.cluster import MiniBatchKMeans
from sklearn.preprocessing import normalize
from emo_select.analysis.kmeans import mean_cosine
values = np.load(folder + "/ours.npy")
start = time.process_time()
values = normalize(values)
model = MiniBatchKMeans(n_clusters=k, n_init=10, max_iter=500, batch_size=4096, random_state=42).fit(values)
for _ in range(20):
    before = model.cluster_centers_.copy()
    model.cluster_centers_ = normalize(model.cluster_centers_)
    assigned = model.predict(values)
    for c in range(k):
        if (assigned == c).any():
            model.cluster_centers_[c] = normalize(values[assigned == c].mean(axis=0, keepdims=True))[0]
    if np.abs(model.cluster_centers_ - before).max() < 1e-6:
        break
result = {"seconds": done(start), "objective": mean_cosine(values, model.predict(values).astype(np.int32))}
"""
EXTRACT = """
import sys, time
from pathlib import Path
import numpy as np
from emo_select import progress
from emo_select.analysis.corpus import Corpus
from emo_select.analysis.routing import extract
from emo_select.checkpoint import open_checkpoint
progress.configure(quiet=True)
documents = int(sys.argv[3]) // 100
ids = np.random.default_rng(0).integers(2, 500, (documents, 100)).astype(np.int32)
corpus = Corpus(list(ids), [{"source": "made up"}] * documents)
start, cpu = time.perf_counter(), time.process_time()
with open_checkpoint(sys.argv[1]) as checkpoint:
    extract(checkpoint, corpus, "random", Path(sys.argv[2]))
result = {"seconds": time.perf_counter() - start, "cpu": time.process_time() - cpu, "tokens": documents * 100}
"""


def made_up_probabilities(tokens: int, layers: int, experts: int = 128, topics: int = 24, words: int = 500,
                          seed: int = 0) -> np.ndarray:
    """(tokens, layers · experts) float16: each layer a softmax of what topic and word ask for, and noise."""
    generator = np.random.default_rng(seed)
    topic, word = generator.integers(0, topics, tokens), generator.zipf(1.3, tokens) % words
    parts = []
    for _ in range(layers):
        logits = 1.5 * generator.normal(size=(topics, experts)).astype(np.float32)[topic]
        logits += 1.5 * generator.normal(size=(words, experts)).astype(np.float32)[word]
        logits += generator.standard_normal((tokens, experts), dtype=np.float32)
        shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
        parts.append((shifted / shifted.sum(axis=1, keepdims=True)).astype(np.float16))
    return np.concatenate(parts, axis=1)


def compare(folder: Path, tokens: int, layers: int, k: int, restarts: int) -> None:
    """Print both steps side by side."""
    from emo_select.analysis.kmeans import has_faiss

    np.save(folder / "probs.npy", made_up_probabilities(tokens, layers))
    arguments = (str(folder), str(k), str(restarts))
    ours, theirs = run_child(OUR_PCA, *arguments), run_child(THEIR_PCA, *arguments)
    rows = [[name, f"{one['result']['seconds']:.1f}", one["result"]["components"], f"{one['peak_bytes'] / 1e9:.2f}"]
            for name, one in (("ours", ours), ("published", theirs))]
    print(table(rows, ["PCA", "CPU s", "components", "peak GB"]))
    print(f"published / ours: {theirs['result']['seconds'] / ours['result']['seconds']:.1f} in time, "
          f"{theirs['peak_bytes'] / ours['peak_bytes']:.1f} in memory\n")
    sides = {"ours": OUR_KMEANS, **({"ours, --engine faiss": FAISS} if has_faiss() else {}), "published": THEIR_KMEANS}
    rows, found = [], {}
    for name, code in sides.items():
        found[name] = run_child(code, *arguments)
        result = found[name]["result"]
        rows.append([name, f"{result['seconds']:.1f}", f"{result['objective']:.4f}",
                     f"{found[name]['peak_bytes'] / 1e9:.2f}"])
    print(table(rows, ["k-means", "CPU s", "mean cosine", "peak GB"]))


def extraction(folder: Path, tokens: int, layers: int) -> None:
    """Print speed and memory of an extraction at the published width, on random weights. The last layer's experts are
    not run."""
    source = make_random_checkpoint(folder / "model", layers=layers, experts=128, hidden=2048, width=1024, heads=16,
                                    vocab=512, dtype="BF16")
    child = run_child(EXTRACT, str(source), str(folder / "out"), str(tokens))
    result = child["result"]
    print(table([[f"{result['tokens']:,}", f"{result['seconds']:.0f}", f"{result['cpu']:.0f}",
                  f"{result['tokens'] / result['seconds']:.0f}", f"{child['peak_bytes'] / 1e9:.2f}"]],
                ["tokens", "s", "CPU s", "tokens/s", "peak GB"]))
    print(f"{layers} layers; tokens × layers with experts per CPU second: "
          f"{result['tokens'] * (layers - 1) / result['cpu']:.0f}")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=None)
    parser.add_argument("--layers", type=int, default=None)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--restarts", type=int, default=8)
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--extract", action="store_true")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=asked.folder) as work:
        if asked.extract:
            extraction(asked.folder or Path(work), asked.tokens or 2000, asked.layers or 3)
        else:
            compare(Path(work), asked.tokens or 60_000, asked.layers or 8, asked.k, asked.restarts)


if __name__ == "__main__":
    main()
