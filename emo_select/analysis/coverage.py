"""Topic coverage: which experts the documents of a topic use, layer by layer (paper, App. D and Figure 6).

    <out>/<model>_coverage/
      info.json                    model, texts, layers (`RoutingInfo`)
      documents.jsonl              one `Document` per line
      probs.npy  topk_freq.npy     (N, sum of E) float32: mean distribution of each document, and the share of its
                                   tokens that choose each expert (a layer adds up to K)
      doc_probs_heatmap_data.npz   doc_topk_freq_heatmap_data.npz    per topic, with the published keys

Tokens are not stored: each layer adds up per document, in one pass.
Legend: N documents, L MoE layers, E routed experts of a layer, K of them chosen per token, C topics.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from emo_select.analysis.layout import Document, LayerInfo, RoutingInfo, read_array, read_as, write_array
from emo_select.errors import SpecError
from emo_select.spec import digest
from emo_select.storage import write_bytes, write_json
from emo_select.textfile import read_lines

if TYPE_CHECKING:
    from torch import Tensor

    from emo_select.analysis.corpus import Corpus
    from emo_select.checkpoint import Checkpoint
    from emo_select.experts import StreamOptions

Kind = Literal["topk_freq", "probs"]
KINDS: tuple[Kind, ...] = ("topk_freq", "probs")
SHOWN_LAYERS = 4
Floats = NDArray[np.float64]
TOPIC_KEYS = ("topics", "topic_above_uniform", "topic_nonzero", "topic_entropy", "topic_avg_emb")


class DocumentSums:
    """A sink that adds up a layer's probabilities and choices per document; one file per layer in `folder`."""

    def __init__(self, folder: Path, lengths: NDArray[np.int64]) -> None:
        self.folder, self.lengths = folder, lengths
        self._sums: dict[Kind, Any] = {}

    def begin(self, layer: LayerInfo) -> None:
        """Zeros for a layer."""
        import torch

        shape = (len(self.lengths), layer.experts)
        self._sums = {kind: torch.zeros(shape, dtype=torch.float64) for kind in KINDS}

    def take(self, layer: LayerInfo, document: int, start: int, logits: Tensor, probs: Tensor, index: Tensor) -> None:
        """Add tokens of a document. No two calls for one document run at the same time: its parts are in other
        batches, of which those with shared prefixes come before the rest."""
        import torch

        self._sums["probs"][document] += probs.sum(dim=0, dtype=torch.float64).cpu()
        self._sums["topk_freq"][document] += torch.bincount(index.reshape(-1), minlength=layer.experts).cpu()

    def end(self, layer: LayerInfo) -> None:
        """Means over each document's tokens, written down."""
        for kind in KINDS:
            means = self._sums[kind].numpy() / np.maximum(self.lengths, 1)[:, None]
            write_array(self.folder / f"{kind}-{layer.layer:02d}.npy", means.astype(np.float32))


def collect(checkpoint: Checkpoint, corpus: Corpus, model: str, folder: Path, options: StreamOptions | None = None
            ) -> Coverage:
    """Stream the documents through the model and write `folder`; a killed call, repeated, goes on.

    Raises:
        SpecError: the folder holds the coverage of other texts or of another model, or several processes were started.
    """
    from emo_select.analysis.routing import describe, open_pass
    from emo_select.experts import StreamOptions
    from emo_select.experts.resume import shared_stage

    options = options or StreamOptions()
    info = describe(checkpoint, corpus, model, options, logits=False)
    info = info.model_copy(update={"fingerprint": digest(["coverage", info.fingerprint])})
    if _is_there(folder, info):
        return Coverage(folder)
    stage = open_pass(checkpoint, corpus, options)
    if stage.team.size > 1:
        raise SpecError("Coverage runs in a single process; start it without torchrun.")
    with shared_stage(folder, f"{info.fingerprint}/{stage.key}", stage.team) as work:
        _stream(stage, corpus, work)
        _finish(work, info, corpus)
    return Coverage(folder)


def _stream(stage: Any, corpus: Corpus, work: Path) -> None:
    from emo_select.analysis.routing import RoutingPass
    from emo_select.experts.resume import Snapshots

    sink = DocumentSums(work, np.diff(corpus.bounds))
    RoutingPass(stage, corpus, sink, Snapshots(work, stage.key, stage.team)).run()


def _is_there(folder: Path, info: RoutingInfo) -> bool:
    if not (folder / "info.json").exists():
        return False
    found = read_as(RoutingInfo, folder / "info.json")
    if found.fingerprint != info.fingerprint:
        raise SpecError(f"{folder} holds the coverage of other texts or of another model; choose another folder with "
                        "--out, or delete it.")
    return True


def _finish(work: Path, info: RoutingInfo, corpus: Corpus) -> None:
    for kind in KINDS:
        files = [work / f"{kind}-{layer.layer:02d}.npy" for layer in info.layers]
        write_array(work / f"{kind}.npy", np.concatenate([np.load(file) for file in files], axis=1))
        for file in files:
            file.unlink()
    lines = "\n".join(document.model_dump_json() for document in corpus.documents)
    write_bytes(work / "documents.jsonl", (lines + "\n").encode())
    write_json(work / "info.json", info.model_dump(mode="json"))
    for kind in KINDS:
        np.savez(work / f"doc_{kind}_heatmap_data.npz",
                 **Coverage(work).topics(kind).as_arrays())  # type: ignore[arg-type]


@dataclass(frozen=True)
class Topics:
    """Per topic and layer, documents weighing alike.

    Attributes:
        names: C topics.
        above_uniform: (C, L) mean number of experts above the threshold. nonzero: above 0.
        entropy: (C, L) mean entropy in bits of the documents' layers, each normalised to 1.
        vectors: of each layer, (C, E) mean vectors.
    """

    names: list[str]
    above_uniform: Floats
    nonzero: Floats
    entropy: Floats
    vectors: list[Floats]

    def order(self) -> list[str]:
        """By ascending mean entropy over layers: the published order of topics."""
        return [self.names[i] for i in np.argsort(self.entropy.mean(axis=1))]

    def ordered(self, names: Sequence[str]) -> Topics:
        """In another order. SpecError unless these are the topics."""
        if sorted(names) != sorted(self.names):
            raise SpecError(f"The order of topics names {', '.join(sorted(names))}, but the documents have "
                            f"{', '.join(sorted(self.names))}.")
        rows = [self.names.index(name) for name in names]
        return Topics(list(names), self.above_uniform[rows], self.nonzero[rows], self.entropy[rows],
                      [vectors[rows] for vectors in self.vectors])

    def similarity(self, layer: int) -> Floats:
        """(C, C) cosines of the topics' vectors in the layer-th MoE layer."""
        vectors = self.vectors[layer]
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        unit = vectors / np.where(lengths > 0, lengths, 1)
        return np.asarray(unit @ unit.T)

    def distance(self, layer: int) -> Floats:
        """(C, C) Euclidean distances of the topics' vectors in the layer-th MoE layer."""
        vectors = self.vectors[layer]
        squares = (vectors**2).sum(axis=1)
        return np.asarray(np.sqrt(np.maximum(squares[:, None] + squares[None] - 2 * vectors @ vectors.T, 0)))

    def as_arrays(self) -> dict[str, NDArray[Any]]:
        """The published npz keys. Layers with fewer experts than others end in zeros."""
        width = max(vectors.shape[1] for vectors in self.vectors)
        stacked = np.stack([np.pad(one, ((0, 0), (0, width - one.shape[1]))) for one in self.vectors], axis=1)
        values = (np.array(self.names), self.above_uniform, self.nonzero, self.entropy, stacked)
        return dict(zip(TOPIC_KEYS, values, strict=True))


@dataclass(frozen=True)
class Coverage:
    """One model's coverage on disk."""

    path: Path

    @cached_property
    def info(self) -> RoutingInfo:
        """Model, texts, layers."""
        return read_as(RoutingInfo, self.path / "info.json")

    @cached_property
    def documents(self) -> list[Document]:
        """In the order of the rows."""
        return [Document.model_validate_json(line) for _, line in read_lines(self.path / "documents.jsonl")]

    def vectors(self, kind: Kind) -> NDArray[np.float32]:
        """(N, sum of E) of every document."""
        return read_array(self.path / f"{kind}.npy")

    def labels(self) -> list[str]:
        """(N,) the topic of each document, or what label there is."""
        return [one.labels.get(self.info.label_key, "") for one in self.documents]

    def topics(self, kind: Kind, *, published_threshold: bool = False) -> Topics:
        """Averages per topic. The threshold of `above_uniform` is what all experts alike would have: 1/E of
        probabilities and K/E of shares of tokens; `published_threshold` takes 1/E for both, as published."""
        values = np.asarray(self.vectors(kind))
        return summarise(values, self.labels(), self.info.layers, kind, published_threshold=published_threshold)


def summarise(values: NDArray[np.float32], labels: Sequence[str], layers: Sequence[LayerInfo], kind: Kind, *,
              published_threshold: bool = False) -> Topics:
    """(N, sum of E) document vectors and their topics → averages per topic; see `Coverage.topics`."""
    names, numbers = np.unique(np.asarray(labels), return_inverse=True)
    columns = np.cumsum([0, *(layer.experts for layer in layers)])
    parts = [values[:, start:stop] for start, stop in pairwise(columns)]
    chosen = [1 if kind == "probs" or published_threshold else layer.chosen for layer in layers]
    thresholds = [np.float64(k / layer.experts) for k, layer in zip(chosen, layers, strict=True)]
    above = np.stack([(part > limit).sum(axis=1) for part, limit in zip(parts, thresholds, strict=True)], axis=1)
    nonzero = np.stack([(part > 0).sum(axis=1) for part in parts], axis=1)
    entropy = np.stack([_entropies(part) for part in parts], axis=1)
    groups = [np.flatnonzero(numbers == c) for c in range(len(names))]
    means = [np.stack([part[rows].mean(axis=0, dtype=np.float64) for rows in groups]) for part in parts]
    tables = [np.stack([one[rows].mean(axis=0, dtype=np.float64) for rows in groups])
              for one in (above, nonzero, entropy)]
    return Topics([str(name) for name in names], tables[0], tables[1], tables[2], means)


def _entropies(values: NDArray[np.float32]) -> Floats:
    """(N, E) → (N,) entropy in bits of each row, normalised to 1; 0 for a row of zeros."""
    rows = values.astype(np.float64)
    sums = rows.sum(axis=1, keepdims=True)
    shares = rows / np.where(sums > 0, sums, 1)
    return np.asarray(-(shares * np.log2(np.where(shares > 0, shares, 1))).sum(axis=1))


def shown_layers(count: int) -> list[int]:
    """The four MoE layers of the pictures: spread evenly and rounded down, so one may come twice where there are
    few."""
    found: list[int] = np.linspace(0, count - 1, SHOWN_LAYERS).astype(int).tolist()
    return found


def colour_limits(matrices: Sequence[Floats]) -> tuple[float, float]:
    """One scale for the cosines of all panels of Figure 6."""
    return max(0.0, min(float(one.min()) for one in matrices)), min(1.0, max(float(one.max()) for one in matrices))


def heatmaps(topics: Topics, kind: Kind) -> dict[str, dict[str, Any]]:
    """The five pictures as data, by the published file names."""
    layers = shown_layers(len(topics.vectors))
    plain: Mapping[str, Floats] = {"coverage_above_uniform": topics.above_uniform, "coverage_nonzero": topics.nonzero,
                                   "entropy": topics.entropy}
    pairs = {"similarity": ("YlOrRd", topics.similarity), "l2_distance": ("YlOrRd_r", topics.distance)}
    found = {f"doc_{kind}_{name}_heatmap.png": {"cmap": "YlOrRd", "topics": topics.names, "matrix": matrix.tolist()}
             for name, matrix in plain.items()}
    return found | {f"doc_{kind}_{name}_heatmap.png": {
        "cmap": colours, "layers": layers, "topics": topics.names,
        "matrices": [of_layer(layer).tolist() for layer in layers]} for name, (colours, of_layer) in pairs.items()}
