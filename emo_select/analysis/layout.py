"""Where an analysis lies on disk, and typed readers of all of it. Needs numpy, no torch.

    <root>/<texts>/<model>/              one set of texts, one folder per model (`ModelFolder`)
      routing/                           published whole, by one rename, after the last layer
        info.json                        `RoutingInfo`: model, texts, layers
        documents.jsonl                  one `Document` per line
        tokens.npy                       (T,) int32, the documents' tokens one after the other
        bounds.npy                       (N+1,) int64, document i is rows bounds[i]:bounds[i+1]
        probs-LL.npy                     (T, E) float16 per MoE layer: distribution over its routed experts
        topk-LL.npy                      (T, K) uint16 per MoE layer: the routed experts that the model chose
        logits-LL.npy                    (T, E) float16 router logits, only if asked for
      experts.json                       list of `ExpertView`
      metrics.json                       list of `Measure` that depend on no clustering
      fits/<fit>/                        one clustering (`FitFolder`)
        fit.json                         `FitInfo`
        assignments.npy                  (R,) int32, the cluster of every clustered row
        centres.npy                      (k, n) float32, means of the rows as they were clustered
        nearest.npy                      (k, 8) int64, rows nearest to those means, -1 where there are fewer
        rows.npy                         (R,) int64, which rows those are; absent where all are
        clusters.json                    list of `Cluster`
        labels.yaml                      a name per cluster, to be edited
        metrics.json                     list of `Measure`

`<root>/<texts>/<model>_coverage/` is described in `emo_select.analysis.coverage`.

T tokens, N documents, L layers, E routed experts of a layer, K experts chosen per token. A clustered row is a token, or
a document where the fit's embedding begins with `doc_`. Every file made from others records their fingerprint: lists
are stored as {"made_from": …, "entries": […]}.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from emo_select.errors import CheckpointError, SpecError
from emo_select.spec import Frozen
from emo_select.storage import read_json, write_bytes, write_json
from emo_select.textfile import read_yaml

DEFAULT_ROOT = "cluster_eval_final"
ROOT_VARIABLE = "CLUSTER_ROOT"
Kind = Literal["word", "position", "topic", "mixed"]


class Document(Frozen):
    """One document. `labels` has at least "source"; topics and formats where the texts have them."""

    index: int
    length: int
    labels: dict[str, str]
    name: str = ""
    """What the texts call it: an id, or file and row."""


class LayerInfo(Frozen):
    """An MoE layer. Dense layers have none."""

    layer: int
    experts: int
    """E: routed experts, the columns of its files. Always-active ones are among them, shared ones are not."""
    chosen: int
    """K: routed experts per token."""
    shared: int = 0
    always_active: tuple[int, ...] = ()


class RoutingInfo(Frozen):
    """`routing/info.json`."""

    format: int = 1
    fingerprint: str
    """Of model, texts, precision: what every file derived from these columns records as its input."""
    model: str
    model_fingerprint: str
    tokenizer_fingerprint: str
    texts: dict[str, Any]
    """How the documents were chosen."""
    label_key: str = "source"
    """Which of a document's labels the analysis goes by."""
    tokens: int
    documents: int
    num_layers: int
    """Of the model, dense ones included."""
    layers: tuple[LayerInfo, ...]
    scoring: str
    """softmax, sigmoid (then `probs` are affinities divided by their sum) or softmax_of_top_k."""
    dtype: str
    has_logits: bool = False


class FitInfo(Frozen):
    """`fit.json`."""

    format: int = 1
    fingerprint: str
    """Of this fit: routing and every setting."""
    routing_fingerprint: str
    embedding: str
    preprocess: str
    method: str
    k: int
    seed: int
    restarts: int
    engine: str
    """What ran the iterations: torch, faiss, scipy or scikit-learn."""
    rows: int
    columns: int
    components: int | None = None
    """Principal components kept."""
    variance: float | None = None
    """Share of the variance that they hold."""
    balance: dict[str, Any] | None = None
    objective: float
    """Mean cosine of every row with its cluster's centre."""
    objectives: tuple[float, ...] = ()
    """Of each restart."""
    stability: float | None = None
    """Mean adjusted Rand index of the restarts with the one kept."""
    survival: tuple[float | None, ...] = ()
    """Per cluster: mean over the other restarts of its best Jaccard index with a cluster there."""
    quality: dict[str, float] = {}
    """The published metrics: silhouette, silhouette_cosine, davies_bouldin, …"""


class Word(Frozen):
    """A word of a list: its score there and how often it occurs in the cluster."""

    word: str
    score: float
    count: int


class Share(Frozen):
    """A label's (or expert's) share in the cluster, and that over its share in all rows."""

    name: str
    share: float
    lift: float
    count: int = 0


class LayerExperts(Frozen):
    """The experts of one layer that a cluster uses most, by mean probability."""

    layer: int
    experts: tuple[Share, ...]


class Exemplar(Frozen):
    """A document that the cluster dominates. `share` of its `tokens` are in the cluster."""

    document: int
    share: float
    tokens: int


class Neighbour(Frozen):
    """Another cluster and the cosine of the two centres."""

    cluster: int
    cosine: float


class Cluster(Frozen):
    """One entry of `clusters.json`, by descending size."""

    id: int
    size: int
    share: float
    survival: float | None = None
    kind: Kind = "mixed"
    explained: dict[str, float] = {}
    """Share of the variance of membership that token id ("token"), position and document explain, beyond chance."""
    token_words: tuple[Word, ...] = ()
    """Words of the clustered tokens themselves."""
    document_words: tuple[Word, ...] = ()
    """Words of the documents in which the cluster dominates."""
    better: Literal["tokens", "documents"] = "tokens"
    """Which of the two lists foretells membership better in documents that it was not made from."""
    scores: dict[str, float] = {}
    """That measurement: area under the ROC curve of each list."""
    labels: tuple[Share, ...] = ()
    experts: tuple[LayerExperts, ...] = ()
    exemplars: tuple[Exemplar, ...] = ()
    contexts: tuple[int, ...] = ()
    """Rows nearest to the centre."""
    neighbours: tuple[Neighbour, ...] = ()

    @property
    def words(self) -> tuple[Word, ...]:
        """The better list."""
        return self.token_words if self.better == "tokens" else self.document_words


class ExpertView(Frozen):
    """One entry of `experts.json`: what a routed expert is used for."""

    layer: int
    expert: int
    load: float
    """Share of the tokens that choose it; K/E if all experts were alike."""
    mass: float
    """Mean probability."""
    specialisation: float | None
    """KL divergence in bits of its tokens' labels from the corpus's; None where no token chooses it."""
    dead: bool
    words: tuple[Word, ...] = ()
    labels: tuple[Share, ...] = ()
    documents: tuple[int, ...] = ()


class Measure(Frozen):
    """A number with its 95 % bootstrap interval over documents, and the same number on shuffled data.

    NaN stands for a number that these texts cannot give; no file holds one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=True)

    name: str
    value: float
    low: float | None = None
    high: float | None = None
    null: float | None = None
    null_low: float | None = None
    null_high: float | None = None
    layer: int | None = None
    about: str = ""
    """What it is, in a few words."""


class ClusterName(Frozen):
    """An entry of labels.yaml. `made` is what the program wrote; a `label` that differs from it is the user's."""

    label: str
    category: str = ""
    made: str = ""


@dataclass(frozen=True)
class FitFolder:
    """One clustering."""

    path: Path

    @property
    def name(self) -> str:
        """Such as probs_mean_pca_l2_spherical_kmeans_k32."""
        return self.path.name

    @cached_property
    def info(self) -> FitInfo:
        """Its settings and quality."""
        return read_as(FitInfo, self.path / "fit.json")

    @cached_property
    def assignments(self) -> NDArray[np.int32]:
        """(R,) the cluster of every clustered row."""
        return read_array(self.path / "assignments.npy")

    @cached_property
    def rows(self) -> NDArray[np.int64]:
        """(R,) the rows that were clustered, ascending."""
        file = self.path / "rows.npy"
        return read_array(file) if file.exists() else np.arange(len(self.assignments))

    @cached_property
    def centres(self) -> NDArray[np.float32]:
        """(k, n) means of the rows as they were clustered."""
        return read_array(self.path / "centres.npy")

    @cached_property
    def nearest(self) -> NDArray[np.int64]:
        """(k, 8) rows nearest to them, nearest first; -1 where there are fewer."""
        return read_array(self.path / "nearest.npy")

    @property
    def of_documents(self) -> bool:
        """Whether a row is a document instead of a token."""
        return self.info.embedding.startswith("doc_")

    @cached_property
    def clusters(self) -> list[Cluster]:
        """Largest first; empty before `emo-select clusters label`."""
        file = self.path / "clusters.json"
        return read_list(Cluster, file) if file.exists() else []

    @cached_property
    def measures(self) -> list[Measure]:
        """Empty before `emo-select clusters label`."""
        file = self.path / "metrics.json"
        return read_list(Measure, file) if file.exists() else []

    @cached_property
    def names(self) -> dict[int, ClusterName]:
        """Names of the clusters: labels.yaml, else a published cluster_labels.json, else "Cluster N"."""
        return read_names(self.path, self.info.k)


@dataclass(frozen=True)
class ModelFolder:
    """One model's part of an analysis."""

    path: Path

    @property
    def routing(self) -> Path:
        """What the routers said."""
        return self.path / "routing"

    @cached_property
    def info(self) -> RoutingInfo:
        """Model, texts, layers."""
        return read_as(RoutingInfo, self.routing / "info.json")

    @cached_property
    def documents(self) -> list[Document]:
        """In the order of the rows."""
        file = self.routing / "documents.jsonl"
        try:
            return [Document.model_validate_json(line) for line in file.read_bytes().splitlines()]
        except (OSError, ValidationError) as error:
            raise damaged(file, error) from None

    @cached_property
    def tokens(self) -> NDArray[np.int32]:
        """(T,) token ids."""
        return read_array(self.routing / "tokens.npy")

    @cached_property
    def bounds(self) -> NDArray[np.int64]:
        """(N+1,) first row of each document, and T."""
        return read_array(self.routing / "bounds.npy")

    @cached_property
    def document_of(self) -> NDArray[np.int32]:
        """(T,) the document of each row."""
        lengths = np.diff(self.bounds)
        return np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)

    @cached_property
    def positions(self) -> NDArray[np.int32]:
        """(T,) place of each token in its document, from 0."""
        return (np.arange(len(self.tokens)) - self.bounds[:-1][self.document_of]).astype(np.int32)

    def labels(self, key: str | None = None) -> list[str]:
        """(N,) a label per document ("" where it has none); `info.label_key` unless told."""
        return [document.labels.get(key or self.info.label_key, "") for document in self.documents]

    def probs(self, layer: int) -> NDArray[np.float16]:
        """(T, E) of an MoE layer, memory-mapped."""
        return read_array(column_file(self.routing, "probs", layer))

    def topk(self, layer: int) -> NDArray[np.uint16]:
        """(T, K) of an MoE layer, memory-mapped."""
        return read_array(column_file(self.routing, "topk", layer))

    def logits(self, layer: int) -> NDArray[np.float16]:
        """(T, E) of an MoE layer, memory-mapped; SpecError where they were not kept."""
        if not self.info.has_logits:
            raise SpecError(f"{self.path} has no router logits; extract with --logits to keep them.")
        return read_array(column_file(self.routing, "logits", layer))

    @property
    def fits_folder(self) -> Path:
        """Parent of the fits."""
        return self.path / "fits"

    def fits(self) -> list[FitFolder]:
        """Every clustering, by name."""
        return [FitFolder(file.parent) for file in sorted(self.fits_folder.glob("*/fit.json"))]

    def fit(self, name: str) -> FitFolder:
        """A clustering by its name. SpecError if there is none."""
        found = {fit.name: fit for fit in self.fits()}
        if name not in found:
            raise SpecError(f"{self.path} has no fit {name!r}; it has {', '.join(found) or 'none'}.")
        return found[name]

    def token_clusters(self, fit: FitFolder) -> NDArray[np.int32]:
        """(T,) the cluster of each token (of its document, for a fit of documents); -1 where it was not clustered."""
        rows = np.full(self.info.documents if fit.of_documents else self.info.tokens, -1, dtype=np.int32)
        rows[fit.rows] = fit.assignments
        return rows[self.document_of] if fit.of_documents else rows

    @cached_property
    def measures(self) -> list[Measure]:
        """Those that depend on no clustering; empty before `emo-select clusters label`."""
        file = self.path / "metrics.json"
        return read_list(Measure, file) if file.exists() else []

    @cached_property
    def experts(self) -> list[ExpertView]:
        """Empty before `emo-select clusters label`."""
        file = self.path / "experts.json"
        return read_list(ExpertView, file) if file.exists() else []


def model_folders(root: Path) -> list[ModelFolder]:
    """The models of an analysis, by folder name. SpecError if there is none."""
    found = [ModelFolder(file.parents[1]) for file in sorted(root.glob("*/routing/info.json"))]
    if not found:
        raise SpecError(f"{root} has no extracted model; run `emo-select clusters extract` first.")
    return found


def column_file(routing: Path, kind: str, layer: int) -> Path:
    """File of a layer's columns."""
    return routing / f"{kind}-{layer:02d}.npy"


def read_names(fit: Path, k: int) -> dict[int, ClusterName]:
    """See `FitFolder.names`. CheckpointError where a file is damaged."""
    found = _yaml_names(fit / "labels.yaml") or _published_names(fit / "cluster_labels.json")
    return {number: found.get(number) or ClusterName(label=f"Cluster {number}") for number in range(k)}


def write_names(fit: Path, names: Mapping[int, ClusterName]) -> None:
    """Write labels.yaml."""
    import yaml

    head = "# A name for each cluster. Edit `label` and `category`; what you change is kept.\n"
    rows = {number: name.model_dump() for number, name in sorted(names.items())}
    write_bytes(fit / "labels.yaml", (head + yaml.safe_dump(rows, allow_unicode=True, sort_keys=False)).encode())


def _yaml_names(file: Path) -> dict[int, ClusterName]:
    if not file.exists():
        return {}
    rows = read_yaml(file, CheckpointError) or {}
    try:
        return {int(number): ClusterName.model_validate(_as_name(row)) for number, row in rows.items()}
    except (ValueError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{file} must have `label` and `category` below the number of each cluster "
                              f"({' '.join(str(error).split())}).") from None


def _published_names(file: Path) -> dict[int, ClusterName]:
    if not file.exists():
        return {}
    try:
        return {int(number): ClusterName(label=row["label"], category=row.get("category", ""))
                for number, row in read_json(file).items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file} is not a list of cluster labels ({error}); correct it.") from None


def _as_name(row: Any) -> Any:
    """`3: health` is short for `3: {label: health}`."""
    return row if isinstance(row, dict) else {"label": str(row)}


M = TypeVar("M", bound=BaseModel)


def read_as(kind: type[M], file: Path) -> M:
    """A JSON file as `kind`. CheckpointError where it is missing or does not fit."""
    try:
        return kind.model_validate(read_json(file))
    except ValidationError as error:
        raise damaged(file, error) from None


def read_list(kind: type[M], file: Path) -> list[M]:
    """The entries of a file that `write_list` wrote. CheckpointError where it is missing or does not fit."""
    try:
        return TypeAdapter(list[kind]).validate_python(read_json(file)["entries"])  # type: ignore[valid-type]
    except (ValidationError, KeyError, TypeError) as error:
        raise damaged(file, error) from None


def write_list(file: Path, values: Sequence[BaseModel], fingerprint: str) -> None:
    """Write models as JSON, with the fingerprint of what they were made from."""
    write_json(file, {"made_from": fingerprint, "entries": [value.model_dump(mode="json") for value in values]})


def is_made_from(file: Path, fingerprint: str) -> bool:
    """Whether a file of `write_list` is there and was made from this."""
    return file.exists() and read_json(file).get("made_from") == fingerprint


def read_array(file: Path) -> NDArray[Any]:
    """An array, memory-mapped. CheckpointError where it is missing or damaged."""
    try:
        found: NDArray[Any] = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise damaged(file, error) from None
    return found


def write_array(file: Path, values: NDArray[Any]) -> None:
    """Write an array by rename."""
    import io

    buffer = io.BytesIO()
    np.save(buffer, values, allow_pickle=False)
    write_bytes(file, buffer.getvalue())


def read_json_lines(file: Path) -> list[dict[str, Any]]:
    """A gzipped file of one JSON object per line."""
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def damaged(file: Path, error: Exception) -> CheckpointError:
    """The error for a file that cannot be used."""
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return CheckpointError(f"{file} cannot be read ({first}); delete it so that it is made again.")
