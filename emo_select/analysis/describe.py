"""What a cluster is, by measurement: its kind, two lists of words, labels, experts, exemplars, neighbours.

Shapes: T tokens, N documents, W words, k clusters, E experts of a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from emo_select import progress
from emo_select.analysis.kmeans import group_sums
from emo_select.analysis.layout import (
    Cluster,
    Exemplar,
    FitFolder,
    Kind,
    LayerExperts,
    ModelFolder,
    Neighbour,
    Share,
    Word,
)
from emo_select.analysis.quality import contingency
from emo_select.analysis.words import TokenWords, weighted_words

Counts = NDArray[np.int64]
TOP_EXPERTS, TOP_LABELS, EXEMPLARS, NEIGHBOURS = 6, 8, 5, 3
LEAST_EXPLAINED = 0.02  # a cluster of which nothing explains more is "mixed"
LEAST_TOKENS = 10  # shorter documents are no exemplars while there are longer ones
KINDS: dict[str, Kind] = {"token": "word", "position": "position", "document": "topic"}
BLOCK_ROWS = 65536


@dataclass(frozen=True)
class Clustered:
    """A fit beside the texts it was made from. `of_token` (T,) is the cluster of each token, -1 for none."""

    folder: ModelFolder
    fit: FitFolder
    words: TokenWords

    @cached_property
    def of_token(self) -> NDArray[np.int32]:
        """(T,)."""
        return self.folder.token_clusters(self.fit)

    @property
    def k(self) -> int:
        """Number of clusters."""
        return self.fit.info.k

    @cached_property
    def inside(self) -> NDArray[np.bool_]:
        """(T,) the tokens that were clustered."""
        return self.of_token >= 0

    @cached_property
    def by_document(self) -> Counts:
        """(N, k) clustered tokens."""
        return self.table(self.folder.document_of, self.folder.info.documents)

    @cached_property
    def sizes(self) -> Counts:
        """(k,) clustered tokens."""
        return np.asarray(self.by_document.sum(axis=0))

    def table(self, groups: NDArray[np.integer], count: int) -> Counts:
        """(count, k) clustered tokens of each group."""
        full = np.zeros((count, self.k), dtype=np.int64)
        found = contingency(groups[self.inside], self.of_token[self.inside])
        full[:found.shape[0], :found.shape[1]] = found
        return full


def describe_clusters(clustered: Clustered) -> list[Cluster]:
    """Every cluster, largest first."""
    k, sizes = clustered.k, clustered.sizes
    explained, words = explained_by(clustered), _word_lists(clustered)
    labels, experts = _label_shares(clustered), _expert_shares(clustered)
    neighbours = _neighbours(clustered.fit.centres)
    survival = clustered.fit.info.survival or (None,) * k
    found = [Cluster(
        id=c, size=int(sizes[c]), share=float(sizes[c] / max(sizes.sum(), 1)), survival=survival[c],
        kind=kind_of(explained[c]), explained=explained[c], token_words=words[c].tokens,
        document_words=words[c].documents, better=words[c].better, scores=words[c].scores, labels=labels[c],
        experts=experts[c],
        exemplars=_exemplars(clustered.by_document[:, c], clustered.by_document.sum(axis=1)),
        contexts=_contexts(clustered, c), neighbours=neighbours[c]) for c in range(k)]
    return sorted(found, key=lambda cluster: (-cluster.size, cluster.id))


# ---- kind


def explained_by(clustered: Clustered) -> list[dict[str, float]]:
    """Per cluster, the share of the variance of membership that token id, position and document explain.

    Epsilon squared: like eta squared, but less what groups of that number and size explain by chance.
    """
    folder = clustered.folder
    ids = np.unique(folder.tokens, return_inverse=True)[1].astype(np.int64)
    groups: dict[str, NDArray[np.integer]] = {"token": ids, "position": folder.positions,
                                              "document": folder.document_of}
    tables = {name: clustered.table(group, int(group.max(initial=0)) + 1) for name, group in groups.items()}
    shares = {name: epsilon_squared(table) for name, table in tables.items()}
    return [{name: float(values[c]) for name, values in shares.items()} for c in range(clustered.k)]


def epsilon_squared(table: Counts) -> NDArray[np.float64]:
    """(G, k) rows of each group in each cluster → (k,) share of each membership's variance that groups explain."""
    sizes = table.sum(axis=1)
    present = sizes > 0
    total, groups = int(sizes.sum()), int(present.sum())
    if total <= groups:
        return np.zeros(table.shape[1])
    mean = table.sum(axis=0) / max(total, 1)
    between = (table[present] ** 2 / sizes[present, None]).sum(axis=0) - total * mean**2
    variance = total * mean * (1 - mean)
    share = np.divide(between, variance, out=np.zeros_like(between), where=variance > 0)
    return np.where(variance > 0, np.clip(1 - (1 - share) * (total - 1) / (total - groups), 0, 1), 0.0)


def kind_of(explained: dict[str, float]) -> Kind:
    """By what explains membership most; "mixed" where nothing explains much."""
    name = max(explained, key=explained.__getitem__)
    return KINDS[name] if explained[name] >= LEAST_EXPLAINED else "mixed"


# ---- words


@dataclass(frozen=True)
class _Words:
    """Word counts of some documents: of clusters (W, k) by their tokens, and of documents (N, W) as pairs."""

    tokens: Counts
    totals: Counts
    documents: Counts
    """(W, k) words of the documents that each cluster dominates."""


@dataclass(frozen=True)
class _Lists:
    """A cluster's two lists, the better one, and by how much."""

    tokens: tuple[Word, ...]
    documents: tuple[Word, ...]
    better: Literal["tokens", "documents"]
    scores: dict[str, float]


def _word_lists(clustered: Clustered) -> list[_Lists]:
    """Per cluster both lists, made from all documents, and which one is better.

    To tell, lists are made from every other document and their foretelling of membership is measured on the rest.
    """
    everything = np.ones(clustered.folder.info.documents, dtype=bool)
    even = everything.copy()
    even[1::2] = False
    final, half = _counted(clustered, everything), _counted(clustered, even if even.sum() > 1 else everything)
    test = ~even if even.sum() > 1 and (~even).any() else everything
    found = []
    for c in range(clustered.k):
        tokens, documents = _lists(final, c, clustered.words)
        scores = _foretelling(clustered, _lists(half, c, clustered.words), c, test)
        by_tokens = scores["tokens"] >= scores["documents"] or not documents
        found.append(_Lists(tokens, documents, "tokens" if by_tokens else "documents", scores))
    return found


def _lists(counts: _Words, c: int, words: TokenWords) -> tuple[tuple[Word, ...], tuple[Word, ...]]:
    return (weighted_words(counts.tokens[:, c], counts.totals, words.words),
            weighted_words(counts.documents[:, c], counts.totals, words.words, words.stop))


def _counted(clustered: Clustered, chosen: NDArray[np.bool_]) -> _Words:
    words, folder = clustered.words, clustered.folder
    size, k = len(words.words), clustered.k
    occurrence = np.cumsum(words.begins) - 1
    taken = chosen[folder.document_of] & clustered.inside
    pairs = np.unique(occurrence[taken] * k + clustered.of_token[taken])  # a word counts once for each cluster in it
    word_of = words.of_token[np.flatnonzero(words.begins)]
    tokens = np.bincount(word_of[pairs // k].astype(np.int64) * k + pairs % k, minlength=size * k).reshape(size, k)
    starts = words.begins & chosen[folder.document_of]
    totals = np.bincount(words.of_token[starts], minlength=size)
    owner = _dominated(clustered)[folder.document_of[starts]]
    known = owner >= 0
    documents = np.bincount(words.of_token[starts][known].astype(np.int64) * k + owner[known],
                            minlength=size * k).reshape(size, k)
    return _Words(tokens, totals, documents)


def _dominated(clustered: Clustered) -> NDArray[np.int64]:
    """(N,) the cluster that is most above its usual share in each document; -1 where nothing was clustered."""
    counts = clustered.by_document
    expected = counts.sum(axis=1, keepdims=True) * clustered.sizes / max(clustered.sizes.sum(), 1)
    found = (counts - expected).argmax(axis=1)
    return np.where(counts.sum(axis=1) > 0, found, -1)


def _foretelling(clustered: Clustered, lists: tuple[tuple[Word, ...], tuple[Word, ...]], c: int,
                 test: NDArray[np.bool_]) -> dict[str, float]:
    """Area under the ROC curve of each list, for the tokens of the `test` documents: in the cluster or not?"""
    words, folder = clustered.words, clustered.folder
    number = {word: i for i, word in enumerate(words.words)}
    weights = [np.zeros(len(words.words)), np.zeros(len(words.words))]
    for weight, listed in zip(weights, lists, strict=True):
        for entry in listed:
            weight[number[entry.word]] = entry.score
    taken = test[folder.document_of] & clustered.inside
    member = clustered.of_token[taken] == c
    by_word = np.bincount(words.of_token[taken], weights=member, minlength=len(words.words))
    all_words = np.bincount(words.of_token[taken], minlength=len(words.words))
    in_document = np.bincount(folder.document_of, weights=weights[1][words.of_token] * words.begins)
    share = in_document / np.maximum(np.diff(folder.bounds), 1)
    counts = clustered.by_document[test]
    return {"tokens": roc_area(weights[0], by_word, all_words - by_word),
            "documents": roc_area(share[test], counts[:, c], counts.sum(axis=1) - counts[:, c])}


def roc_area(scores: NDArray[np.float64], positive: NDArray[np.floating] | Counts,
             negative: NDArray[np.floating] | Counts) -> float:
    """Area under the ROC curve of scores that so many positive and negative cases have; 0.5 without either."""
    values, place = np.unique(scores, return_inverse=True)
    good = np.bincount(place, weights=positive, minlength=len(values))
    bad = np.bincount(place, weights=negative, minlength=len(values))
    if not good.sum() or not bad.sum():
        return 0.5
    below = np.cumsum(bad) - bad
    return float((good * (below + bad / 2)).sum() / (good.sum() * bad.sum()))


# ---- labels, experts, exemplars


def shares(counts: Counts, totals: Counts, names: Sequence[str], most: int) -> tuple[Share, ...]:
    """Shares of `counts` with their lift over `totals`, largest first, without zeros."""
    size, everything = counts.sum(), totals.sum()
    order = np.argsort(-counts, kind="stable")[:most]
    return tuple(Share(name=names[i], share=float(counts[i] / size), count=int(counts[i]),
                       lift=float(counts[i] / size * everything / totals[i])) for i in order if counts[i] > 0)


def _label_shares(clustered: Clustered) -> list[tuple[Share, ...]]:
    names, numbers = np.unique(clustered.folder.labels(), return_inverse=True)
    table = np.zeros((len(names), clustered.k), dtype=np.int64)
    np.add.at(table, numbers, clustered.by_document)
    return [shares(table[:, c], table.sum(axis=1), names.tolist(), TOP_LABELS) for c in range(clustered.k)]


def _expert_shares(clustered: Clustered) -> list[tuple[LayerExperts, ...]]:
    """Per cluster and layer, the experts with the highest mean probability."""
    found: list[list[LayerExperts]] = [[] for _ in range(clustered.k)]
    layers = clustered.folder.info.layers
    with progress.track("Experts of the clusters", total=len(layers)) as bar:
        for layer in layers:
            sums = sums_by_group(clustered.folder.probs(layer.layer), clustered.of_token, clustered.k)
            mean, overall = sums / np.maximum(clustered.sizes, 1)[:, None], sums.sum(axis=0) / max(sums.sum(), 1e-12)
            for c in range(clustered.k):
                top = np.argsort(-mean[c], kind="stable")[:TOP_EXPERTS]
                experts = tuple(Share(name=str(e), share=float(mean[c, e]),
                                      lift=float(mean[c, e] / max(overall[e], 1e-12))) for e in top)
                found[c].append(LayerExperts(layer=layer.layer, experts=experts if clustered.sizes[c] else ()))
            bar.advance(1)
    return [tuple(one) for one in found]


def sums_by_group(values: NDArray[np.floating], groups: NDArray[np.integer], count: int) -> NDArray[np.float64]:
    """Sums (count, E) of the rows (T, E) of each group in fp64; rows of group -1 are left out."""
    sums = np.zeros((count, values.shape[1]))
    for start in range(0, len(values), BLOCK_ROWS):
        index = np.asarray(groups[start:start + BLOCK_ROWS])
        block = np.asarray(values[start:start + BLOCK_ROWS], dtype=np.float64)
        inside = index >= 0
        sums += group_sums(block[inside], index[inside], count) if not inside.all() else group_sums(block, index, count)
    return sums


def _exemplars(counts: Counts, lengths: Counts) -> tuple[Exemplar, ...]:
    """The documents with the largest share of a cluster, of those that are long enough."""
    least = min(LEAST_TOKENS, int(lengths.max(initial=0)))
    share = np.where((lengths >= max(least, 1)), counts / np.maximum(lengths, 1), 0)
    order = np.argsort(-share, kind="stable")[:EXEMPLARS]
    return tuple(Exemplar(document=int(i), share=float(share[i]), tokens=int(lengths[i])) for i in order if share[i])


def _contexts(clustered: Clustered, c: int) -> tuple[int, ...]:
    rows = [int(row) for row in clustered.fit.nearest[c] if row >= 0]
    if clustered.fit.of_documents:
        return tuple(int(clustered.folder.bounds[row]) for row in rows)
    return tuple(rows)


def _neighbours(centres: NDArray[np.float32]) -> list[tuple[Neighbour, ...]]:
    lengths = np.linalg.norm(centres, axis=1, keepdims=True)
    unit = centres / np.where(lengths > 0, lengths, 1)
    cosines = unit @ unit.T
    np.fill_diagonal(cosines, -2)
    found = []
    for row in cosines:
        order = np.argsort(-row, kind="stable")[:min(NEIGHBOURS, len(row) - 1)]
        found.append(tuple(Neighbour(cluster=int(i), cosine=float(row[i])) for i in order))
    return found
