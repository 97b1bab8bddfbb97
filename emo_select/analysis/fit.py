"""Clustering a model's routing: what is prepared once, then one fit per number of clusters.

prepare (identity, l2, mean_pca, mean_pca_l2) → cluster (spherical_kmeans, kmeans, hierarchical, gmm) → quality →
`fits/<name>/`, published whole. A fit that is there with the same fingerprint is left alone.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emo_select import progress
from emo_select.analysis.embeddings import Embedding, embedding
from emo_select.analysis.kmeans import Clustering, kmeans, mean_cosine
from emo_select.analysis.layout import FitFolder, FitInfo, ModelFolder, write_array
from emo_select.analysis.pca import VARIANCE, Pca, fit_pca
from emo_select.analysis.quality import adjusted_rand, published_quality, survival
from emo_select.errors import SpecError, UnknownNameError
from emo_select.spec import digest
from emo_select.storage import require_space, staged_directory, write_json

PREPROCESS = ("identity", "l2", "mean_pca", "mean_pca_l2")
METHODS = ("spherical_kmeans", "kmeans", "hierarchical", "gmm")
ENGINES = ("torch", "faiss")
IN_MEMORY_BYTES = 1 << 30  # more goes to a file of its own while a fit runs
PAIRWISE_ROWS = 20_000  # hierarchical clustering looks at all pairs
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Fitting:
    """What is clustered and how.

    Attributes:
        embedding: a view of `emo_select.analysis.embeddings`.
        preprocess: identity, l2 (rows), mean_pca, or mean_pca_l2.
        method: spherical_kmeans, kmeans, hierarchical (cosine, average linkage) or gmm.
        ks: numbers of clusters.
        seed, restarts, engine: of k-means.
        balance_by: a label of documents; at most `balance_n` rows of each value (None: as many as the smallest has).
    """

    embedding: str = "probs"
    preprocess: str = "mean_pca_l2"
    method: str = "spherical_kmeans"
    ks: tuple[int, ...] = (32,)
    seed: int = 42
    restarts: int = 8
    engine: str = "torch"
    variance: float = VARIANCE
    balance_by: str | None = None
    balance_n: int | None = None
    balance_seed: int = 42

    def check(self) -> None:
        """Raise `UnknownNameError` or `SpecError` for a setting that does not exist."""
        for kind, value, known in (("preprocessing", self.preprocess, PREPROCESS), ("method", self.method, METHODS),
                                   ("engine", self.engine, ENGINES)):
            if value not in known:
                raise UnknownNameError(kind, value, known)
        if not self.ks or min(self.ks) < 1 or self.restarts < 1:
            raise SpecError("--k and --restarts are whole numbers from 1 on.")

    def of(self, k: int) -> dict[str, Any]:
        """All that the fit with k clusters depends on, but for its input."""
        return {**asdict(self), "ks": k}

    def name(self, k: int) -> str:
        """Published where published names suffice; else with `_balanced…` and a digest of what they cannot say."""
        name = f"{self.embedding}_{self.preprocess}_{self.method}_k{k}"
        if self.balance_by is not None:
            name += f"_balanced-{self.balance_by}-{self.balance_n or 'least'}"
        standard = Fitting(self.embedding, self.preprocess, self.method, balance_by=self.balance_by,
                           balance_n=self.balance_n).of(k)
        other = {key: value for key, value in self.of(k).items() if value != standard[key]}
        return f"{name}_variant-{digest(other)[:8]}" if other else name


@dataclass(frozen=True)
class Prepared:
    """Rows as they are clustered (R, n), which rows of the embedding they are (None: all), and the PCA, if any."""

    values: Floats
    rows: NDArray[np.int64] | None
    pca: Pca | None


def fit(folder: ModelFolder, wanted: Fitting) -> list[FitFolder]:
    """Cluster with every k of `wanted`; the fits, those that were there included.

    Raises:
        SpecError, UnknownNameError: a setting does not exist or asks for more clusters than there are rows.
    """
    wanted.check()
    view = embedding(folder, wanted.embedding)
    fingerprints = {k: digest([folder.info.fingerprint, wanted.of(k)]) for k in wanted.ks}
    missing = [k for k in wanted.ks if not _is_there(folder, wanted.name(k), fingerprints[k])]
    if missing:
        rows = balanced_rows(folder, view, wanted)
        _require_rows(view, rows, max(missing))
        with prepared(view, rows, wanted, folder.fits_folder) as ready:
            for k in missing:
                _fit_one(folder, view, ready, wanted, k, fingerprints[k])
    return [FitFolder(folder.fits_folder / wanted.name(k)) for k in wanted.ks]


def _is_there(folder: ModelFolder, name: str, fingerprint: str) -> bool:
    file = folder.fits_folder / name / "fit.json"
    return file.exists() and FitFolder(file.parent).info.fingerprint == fingerprint


def _require_rows(view: Embedding, rows: NDArray[np.int64] | None, k: int) -> None:
    count = view.rows if rows is None else len(rows)
    if k > count:
        what = "documents" if view.of_documents else "tokens"
        raise SpecError(f"{k} clusters need at least {k} {what}, but there are {count}; ask for fewer with --k.")


def balanced_rows(folder: ModelFolder, view: Embedding, wanted: Fitting) -> NDArray[np.int64] | None:
    """At most `balance_n` rows of each label, ascending, by the published draw; None where all are taken.

    Labels in alphabetical order share one generator; without `balance_n` each has as many as the smallest.
    """
    if wanted.balance_by is None:
        return None
    known = {key for document in folder.documents for key in document.labels}
    if wanted.balance_by not in known:
        raise SpecError(f"No document has the label {wanted.balance_by!r}; they have {', '.join(sorted(known))}.")
    of_document = np.asarray(folder.labels(wanted.balance_by))
    labels = of_document if view.of_documents else of_document[folder.document_of]
    return draw_balanced(labels, wanted.balance_n, wanted.balance_seed)


def draw_balanced(labels: NDArray[Any], most: int | None, seed: int) -> NDArray[np.int64]:
    """See `balanced_rows`."""
    generator = np.random.default_rng(seed)
    classes = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    most = min(map(len, classes)) if most is None else most
    kept = [rows if len(rows) <= most else generator.choice(rows, size=most, replace=False) for rows in classes]
    return np.sort(np.concatenate(kept)).astype(np.int64)


@contextmanager
def prepared(view: Embedding, rows: NDArray[np.int64] | None, wanted: Fitting, scratch: Path) -> Iterator[Prepared]:
    """The rows as they are clustered, in memory or, if they are many, in a file that goes at the end."""
    count = view.rows if rows is None else len(rows)
    pca = None
    with progress.track("Preparing", total=count * (2 if "pca" in wanted.preprocess else 1)) as bar:
        if "pca" in wanted.preprocess:
            pca = fit_pca(lambda: _counted(view, rows, bar), count, view.columns, wanted.variance)
        width = len(pca.components) if pca else view.columns
        values: Floats
        with _room(scratch, (count, width)) as values:
            for start, block in _counted(view, rows, bar):
                values[start:start + len(block)] = _transformed(block, pca, wanted.preprocess)
            yield Prepared(values, rows, pca)


def _counted(view: Embedding, rows: NDArray[np.int64] | None, bar: progress.Bar) -> Iterator[tuple[int, Floats]]:
    for start, block in view.blocks(rows):
        yield start, block
        bar.advance(len(block))


def _transformed(block: Floats, pca: Pca | None, preprocess: str) -> Floats:
    values = block if pca is None else pca.apply(block)
    return unit(values) if preprocess.endswith("l2") else values


def unit(values: Floats) -> Floats:
    """Rows of length 1; a row of zeros stays one."""
    lengths = np.linalg.norm(values, axis=1, keepdims=True)
    return np.asarray(values / np.where(lengths > 0, lengths, 1), dtype=np.float32)


@contextmanager
def _room(scratch: Path, shape: tuple[int, int]) -> Iterator[Floats]:
    size = shape[0] * shape[1] * 4
    if size <= IN_MEMORY_BYTES:
        yield np.empty(shape, dtype=np.float32)
        return
    scratch.mkdir(parents=True, exist_ok=True)
    require_space(scratch, size, "The scratch file of the fit")
    with tempfile.TemporaryFile(dir=scratch) as file:
        yield np.memmap(file, dtype=np.float32, mode="w+", shape=shape)


def _fit_one(folder: ModelFolder, view: Embedding, ready: Prepared, wanted: Fitting, k: int, fingerprint: str) -> None:
    final = folder.fits_folder / wanted.name(k)
    with progress.track(f"Clustering into {k}", total=wanted.restarts) as bar:
        found = cluster(ready.values, k, wanted, bar)
    sources = np.asarray(folder.labels("source"))
    of_rows = sources if view.of_documents else sources[folder.document_of]
    kept = of_rows if ready.rows is None else of_rows[ready.rows]
    info = _fit_info(folder, view, ready, wanted, k, found)
    info = info.model_copy(update={"fingerprint": fingerprint,
                                   "quality": published_quality(ready.values, found.assignments, kept.tolist())})
    with staged_directory(final, fingerprint) as work:
        write_array(work / "assignments.npy", found.assignments)
        write_array(work / "centres.npy", found.centres)
        write_array(work / "nearest.npy", nearest_rows(ready, found.assignments, k))
        if ready.rows is not None:
            write_array(work / "rows.npy", ready.rows)
        write_json(work / "fit.json", info.model_dump(mode="json"))


def _fit_info(folder: ModelFolder, view: Embedding, ready: Prepared, wanted: Fitting, k: int, found: Clustering
              ) -> FitInfo:
    others = [run for run in found.runs if run is not found.assignments]
    agreement = [adjusted_rand(found.assignments, other) for other in others]
    kmeans_like = wanted.method in ("spherical_kmeans", "kmeans")
    balance = {"by": wanted.balance_by, "most": wanted.balance_n, "seed": wanted.balance_seed}
    return FitInfo(
        fingerprint="", routing_fingerprint=folder.info.fingerprint, embedding=wanted.embedding,
        preprocess=wanted.preprocess, method=wanted.method, k=k, seed=wanted.seed,
        restarts=wanted.restarts if kmeans_like else 1,
        engine=wanted.engine if kmeans_like else {"hierarchical": "scipy", "gmm": "scikit-learn"}[wanted.method],
        rows=len(found.assignments), columns=view.columns,
        components=len(ready.pca.components) if ready.pca else None,
        variance=ready.pca.variance if ready.pca else None, balance=balance if wanted.balance_by else None,
        objective=mean_cosine(ready.values, found.assignments), objectives=found.objectives,
        stability=float(np.mean(agreement)) if agreement else None,
        survival=survival(found.assignments, others, k))


def cluster(values: Floats, k: int, wanted: Fitting, bar: progress.Bar | None = None) -> Clustering:
    """Assignments of the rows by the method that `wanted` names."""
    if wanted.method in ("spherical_kmeans", "kmeans"):
        spherical = wanted.method == "spherical_kmeans"
        rows = unit(values) if spherical and not wanted.preprocess.endswith("l2") else values
        return kmeans(rows, k, spherical=spherical, restarts=wanted.restarts, seed=wanted.seed,
                      engine="faiss" if wanted.engine == "faiss" else "torch", bar=bar)
    assignments = _hierarchical(values, k) if wanted.method == "hierarchical" else _gmm(values, k, wanted.seed)
    objective = mean_cosine(values, assignments)
    return Clustering(assignments, _means(values, assignments, k), objective, (objective,), (assignments,))


def _hierarchical(values: Floats, k: int) -> NDArray[np.int32]:
    """Cosine distances of all pairs, average linkage; may give fewer than k clusters."""
    from scipy.cluster.hierarchy import fcluster, linkage
    from scipy.spatial.distance import pdist

    if len(values) > PAIRWISE_ROWS:
        raise SpecError(f"Hierarchical clustering compares all pairs of {len(values):,} rows; it is for at most "
                        f"{PAIRWISE_ROWS:,}. Cluster documents (--embedding doc_probs) or balance the rows.")
    distances = np.clip(pdist(unit(values).astype(np.float64), "cosine"), 0, 2)
    return np.asarray(fcluster(linkage(distances, "average"), t=k, criterion="maxclust") - 1, dtype=np.int32)


def _gmm(values: Floats, k: int, seed: int) -> NDArray[np.int32]:
    from sklearn.mixture import GaussianMixture

    mixture = GaussianMixture(k, covariance_type="full", max_iter=200, n_init=3, random_state=seed)
    return np.asarray(mixture.fit_predict(values), dtype=np.int32)


def _means(values: Floats, assignments: NDArray[np.int32], k: int) -> Floats:
    sums = np.zeros((k, values.shape[1]))
    np.add.at(sums, assignments, values)
    means: Floats = (sums / np.maximum(np.bincount(assignments, minlength=k), 1)[:, None]).astype(np.float32)
    return means


NEAREST = 8


def nearest_rows(ready: Prepared, assignments: NDArray[np.int32], k: int, count: int = NEAREST) -> NDArray[np.int64]:
    """(k, count) rows of the embedding nearest to the mean of each cluster, nearest first; -1 where it has fewer."""
    found = np.full((k, count), -1, dtype=np.int64)
    for number, places in enumerate(nearest_places(ready.values, assignments, k, count)):
        rows = places if ready.rows is None else ready.rows[places]
        found[number, :len(rows)] = rows
    return found


def nearest_places(values: Floats, assignments: NDArray[np.int32], k: int, count: int) -> list[NDArray[np.int64]]:
    """Per cluster, the places of the rows nearest to the mean of its rows, nearest first."""
    found = []
    for number in range(k):
        members = np.flatnonzero(assignments == number)
        inside = np.asarray(values[members])
        distances = np.linalg.norm(inside - inside.mean(axis=0), axis=1) if len(members) else np.empty(0)
        found.append(members[np.argsort(distances)[:count]])
    return found


SWEEP_HEADER = ("k", "mean cosine", "stable", "silhouette", "smallest", "largest")


def sweep_table(fits: Sequence[FitFolder]) -> list[list[str]]:
    """A row per fit: k, objective, stability, silhouette (cosine), smallest and largest cluster."""
    rows = []
    for one in fits:
        info, quality = one.info, one.info.quality
        rows.append([str(info.k), f"{info.objective:.4f}", _number(info.stability), _number(
            quality.get("silhouette_cosine")), f"{quality.get('cluster_size_min', info.rows):,.0f}",
            f"{quality.get('cluster_size_max', info.rows):,.0f}"])
    return rows


def _number(value: float | None) -> str:
    return "—" if value is None else f"{value:.3f}"
