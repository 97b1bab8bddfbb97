"""Numbers of a clustering: how much a document keeps to its clusters, and what clusters go with.

Shapes: T tokens, N documents, k clusters, G groups of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from emo_select.analysis.describe import Clustered, Counts
from emo_select.analysis.layout import Measure
from emo_select.analysis.quality import contingency
from emo_select.analysis.resample import Named, document_weights, mean_measure, measure, shuffles, with_draws

SHUFFLES, DRAWS = 20, 50
MOST_TOKENS = 0.9
Floats = NDArray[np.float64]
PER_DOCUMENT = (
    Named("top_cluster_share", "share of a document in its top cluster"),
    Named("cluster_entropy", "entropy of a document's clusters / log2 k"),
    Named("clusters_for_90", "clusters that hold 90 % of a document"),
)


def cluster_measures(clustered: Clustered) -> list[Measure]:
    """All of them; those within documents only where tokens were clustered."""
    found = [] if clustered.fit.of_documents else [*_per_document(clustered), *_first_tokens(clustered)]
    found += [*_information(clustered), _majority(clustered)]
    return [one for one in found if np.isfinite(one.value)]


# ---- within documents


def document_statistics(counts: Counts) -> Floats:
    """(N, k) tokens of each document in each cluster → (N, 3): share of the top one, entropy over log2 k, and how
    many of the largest hold 90 %. NaN for documents without tokens."""
    sizes = counts.sum(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.sort(counts / sizes[:, None], axis=1)[:, ::-1]
        logs = np.where(share > 0, np.log2(np.where(share > 0, share, 1)), 0)
    entropy = -(share * logs).sum(axis=1) / max(np.log2(counts.shape[1]), 1e-12)
    enough = (np.cumsum(share, axis=1) < MOST_TOKENS - 1e-9).sum(axis=1) + 1.0
    found = np.stack([share[:, 0], entropy, enough], axis=1)
    found[sizes == 0] = np.nan
    return found


def _per_document(clustered: Clustered) -> list[Measure]:
    found = document_statistics(clustered.by_document)
    null = np.array([np.nanmean(document_statistics(counts), axis=0) for counts in _shuffled(clustered)])
    return [mean_measure(named, found[:, i], null[:, i].tolist()) for i, named in enumerate(PER_DOCUMENT)]


def _shuffled(clustered: Clustered) -> list[Counts]:
    """`by_document` where tokens have been shuffled between documents."""
    documents = clustered.folder.document_of[clustered.inside]
    found = []
    for clusters in shuffles(clustered.of_token[clustered.inside], SHUFFLES):
        counts = np.zeros_like(clustered.by_document)
        table = contingency(documents, clusters)
        counts[:table.shape[0], :table.shape[1]] = table
        found.append(counts)
    return found


def _first_tokens(clustered: Clustered) -> list[Measure]:
    """How far the first tokens of documents share a cluster, and how far that cluster is theirs alone."""
    rows = clustered.folder.bounds[:-1][np.diff(clustered.folder.bounds) > 0]
    firsts = clustered.of_token[rows]
    firsts = firsts[firsts >= 0]
    if not len(firsts):
        return []
    everything = clustered.of_token[clustered.inside]

    def share(weights: NDArray[np.int64]) -> float:
        return float(np.bincount(firsts, weights=weights).max() / weights.sum())

    drawn = [float(np.bincount(some[:len(firsts)]).max() / len(firsts)) for some in shuffles(everything, SHUFFLES)]
    counts = np.bincount(firsts, minlength=clustered.k)
    named = Named("first_token_share", "share of first tokens in their commonest cluster")
    owned = Named("first_token_purity", "share of that cluster that is first tokens")
    value = float(counts.max() / max(clustered.sizes[counts.argmax()], 1))
    return [with_draws(named, share, len(firsts), 10 * DRAWS, drawn),
            measure(owned, value, (), float(len(firsts) / max(len(everything), 1)))]


# ---- what clusters go with


def mutual_information(table: NDArray[np.integer] | Floats) -> tuple[float, float, float]:
    """(G, k) counts → mutual information and the two entropies, in nats."""
    total = table.sum()
    if not total:
        return 0.0, 0.0, 0.0
    joint = table / total
    rows, columns = joint.sum(axis=1), joint.sum(axis=0)
    h_rows, h_columns = _entropy(rows), _entropy(columns)
    return max(h_rows + h_columns - _entropy(joint.ravel()), 0.0), h_rows, h_columns


def normalised_information(table: NDArray[np.integer] | Floats) -> float:
    """NMI: mutual information over the mean of the entropies; 1 where neither varies."""
    information, first, second = mutual_information(table)
    mean = (first + second) / 2
    return information / mean if mean > 0 else 1.0


def adjusted_information(table: NDArray[np.integer] | Floats, expected: float) -> float:
    """AMI, given the mutual information that chance gives; 0 where chance gives all that there can be."""
    information, first, second = mutual_information(table)
    room = (first + second) / 2 - expected
    return (information - expected) / room if abs(room) > 1e-12 else 0.0


def expected_information(table: Counts) -> float:
    """Mutual information of tables with the same sums, by chance."""
    from sklearn.metrics.cluster import expected_mutual_information

    used = table[table.sum(axis=1) > 0][:, table.sum(axis=0) > 0]
    return float(expected_mutual_information(used.astype(np.int64), int(used.sum())))


def _entropy(shares: Floats) -> float:
    used = shares[shares > 0]
    return float(-(used * np.log(used)).sum())


def _information(clustered: Clustered) -> list[Measure]:
    """AMI of clusters with label, token id and position, and NMI with the label. Chance is that of the whole table."""
    folder = clustered.folder
    labels = np.unique(folder.labels(), return_inverse=True)[1].astype(np.int64)
    ids = np.unique(folder.tokens, return_inverse=True)[1].astype(np.int64)
    groups: dict[str, NDArray[np.integer]] = {"label": labels[folder.document_of], "token": ids,
                                              "position": folder.positions}
    about = {"label": f"AMI of clusters with {folder.info.label_key}", "token": "AMI of clusters with token id",
             "position": "AMI of clusters with position"}
    found = [_adjusted(clustered, Named(f"ami_{name}", about[name]), group) for name, group in groups.items()]
    nmi = Named("nmi_label", f"NMI of clusters with {folder.info.label_key}")
    return [*found, _normalised(clustered, nmi, groups["label"])]


def _adjusted(clustered: Clustered, named: Named, groups: NDArray[np.integer]) -> Measure:
    table = _Tables(clustered, groups)
    expected = expected_information(table.whole)
    null = [adjusted_information(one, expected) for one in table.shuffled(SHUFFLES // 4)]
    drawn = [adjusted_information(one, expected) for one in table.drawn()]
    return measure(named, adjusted_information(table.whole, expected), drawn, null)


def _normalised(clustered: Clustered, named: Named, groups: NDArray[np.integer]) -> Measure:
    table = _Tables(clustered, groups)
    return measure(named, normalised_information(table.whole), [normalised_information(one) for one in table.drawn()],
                   [normalised_information(one) for one in table.shuffled(SHUFFLES // 4)])


class _Tables:
    """(G, k) tables of groups and clusters: as they are, shuffled, and of drawn documents."""

    def __init__(self, clustered: Clustered, groups: NDArray[np.integer]) -> None:
        self.documents = clustered.folder.document_of[clustered.inside]
        self.groups, self.clusters = groups[clustered.inside], clustered.of_token[clustered.inside]
        self.count, self.k = clustered.folder.info.documents, clustered.k
        self.whole = self._table(self.clusters)

    def _table(self, clusters: NDArray[np.integer], weights: NDArray[np.int64] | None = None) -> NDArray[np.int64]:
        rows = int(self.groups.max(initial=0)) + 1
        pairs = self.groups.astype(np.int64) * self.k + clusters
        counts = np.bincount(pairs, weights=None if weights is None else weights[self.documents],
                             minlength=rows * self.k)
        return counts.astype(np.int64).reshape(rows, self.k)

    def shuffled(self, times: int) -> list[Counts]:
        """Of clusters shuffled over the tokens."""
        return [self._table(clusters) for clusters in shuffles(self.clusters, times)]

    def drawn(self) -> list[Counts]:
        """Of documents drawn again."""
        return [self._table(self.clusters, weights) for weights in document_weights(self.count, DRAWS)]


def _majority(clustered: Clustered) -> Measure:
    """NMI of each document's commonest cluster with its label."""
    used = clustered.by_document.sum(axis=1) > 0
    top = clustered.by_document[used].argmax(axis=1)
    labels = np.unique(np.asarray(clustered.folder.labels())[used], return_inverse=True)[1].astype(np.int64)

    def score(weights: NDArray[np.int64], clusters: NDArray[np.integer] = top) -> float:
        table = np.zeros((int(labels.max(initial=0)) + 1, clustered.k))
        np.add.at(table, (labels, clusters), weights)
        return normalised_information(table)

    null = [score(np.ones(len(top), dtype=np.int64), clusters) for clusters in shuffles(top, SHUFFLES)]
    named = Named("nmi_majority_label", f"NMI of a document's top cluster with {clustered.folder.info.label_key}")
    return with_draws(named, score, len(top), 4 * DRAWS, null)


def headline(measures: Sequence[Measure]) -> list[Measure]:
    """Those that are not of a single layer."""
    return [one for one in measures if one.layer is None]
