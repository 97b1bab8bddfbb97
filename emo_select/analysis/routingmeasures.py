"""Numbers of a model's routing that need no clustering: what explains it, document pools, topics, experts.

Shapes: T tokens, N documents, E routed experts of a layer, G groups of tokens, C labels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property, partial

import numpy as np
from numpy.typing import NDArray

from emo_select import progress
from emo_select.analysis.describe import BLOCK_ROWS, sums_by_group
from emo_select.analysis.expertviews import chosen_counts, specialisation
from emo_select.analysis.layout import LayerInfo, Measure, ModelFolder
from emo_select.analysis.resample import (
    SEED,
    Named,
    document_weights,
    mean_measure,
    measure,
    over_layers,
    shuffles,
    with_draws,
)

DEPTHS = (8, 16, 32, 64)
DRAWS, SHUFFLES, GROUP_DRAWS = 100, 10, 20
GROUP_TOKENS = 30_000  # tokens that the intervals of token id and position are drawn from
NEIGHBOURS, NEIGHBOUR_DOCUMENTS = 10, 3000
Floats = NDArray[np.float64]
Pair = tuple[Floats, Floats]  # of every document: overlap with another's pool, probability that the pool holds


class Routing:
    """A model's routing, with what several measures need."""

    def __init__(self, folder: ModelFolder) -> None:
        self.folder, self.layers = folder, folder.info.layers
        self.lengths = np.diff(folder.bounds)
        self.names, numbers = np.unique(folder.labels(), return_inverse=True)
        self.labels = numbers.astype(np.int64)

    @cached_property
    def halves(self) -> dict[int, Floats]:
        """Per layer (N, 2, E): sums of probabilities over the first and the second half of each document."""
        document, position = self.folder.document_of, self.folder.positions
        second = position >= (self.lengths[document] + 1) // 2
        groups = document.astype(np.int64) * 2 + second
        count = self.folder.info.documents
        return {layer.layer: sums_by_group(self.folder.probs(layer.layer), groups, 2 * count).reshape(count, 2, -1)
                for layer in self.layers}

    def vectors(self, layer: LayerInfo) -> Floats:
        """(N, E) mean probabilities of each document."""
        return np.asarray(self.halves[layer.layer].sum(axis=1) / np.maximum(self.lengths, 1)[:, None])

    def label_means(self, vectors: Floats, labels: NDArray[np.integer], weights: NDArray[np.int64]) -> Floats:
        """(C, E) mean over the documents of each label, each document as often as `weights` says."""
        sums, counts = np.zeros((len(self.names), vectors.shape[1])), np.zeros(len(self.names))
        np.add.at(sums, labels, vectors * weights[:, None])
        np.add.at(counts, labels, weights)
        used = counts > 0
        return np.asarray(sums[used] / counts[used, None])


def routing_measures(folder: ModelFolder) -> list[Measure]:
    """All of them. Those of labels need two labels; those of pools documents of two tokens."""
    routing = Routing(folder)
    parts: list[Callable[[Routing], list[Measure]]] = [_explained, _pools, _topics, _neighbours, _experts]
    found: list[Measure] = []
    with progress.track("Measuring", total=len(parts)) as bar:
        for part in parts:
            found += part(routing)
            bar.advance(1)
    return [one for one in found if np.isfinite(one.value)]


# ---- what explains the routing


def eta_squared(sums: Floats, counts: NDArray[np.integer] | Floats, squares: float) -> float:
    """Share of the variance between groups: sums (G, E) and sizes of groups, and the sum of all squares."""
    total = counts.sum()
    used = counts > 0
    common = (sums.sum(axis=0) ** 2).sum() / max(total, 1)
    between = ((sums[used] ** 2).sum(axis=1) / counts[used]).sum() - common
    return float(between / (squares - common)) if squares - common > 1e-12 else float("nan")


def _explained(routing: Routing) -> list[Measure]:
    folder = routing.folder
    ids = np.unique(folder.tokens, return_inverse=True)[1].astype(np.int64)
    groups: dict[str, NDArray[np.integer]] = {"document": folder.document_of, "token": ids,
                                              "position": folder.positions}
    about = {"document": "the document", "token": "the token id", "position": "the position"}
    found: list[Measure] = []
    for name, group in groups.items():
        named = Named(f"eta2_{name}", f"share of routing variance by {about[name]}")
        each = [_eta(routing, layer, group, Named(named.name, named.about, layer.layer)) for layer in routing.layers]
        found += over_layers(named, each)
    return found


def _eta(routing: Routing, layer: LayerInfo, groups: NDArray[np.integer], named: Named) -> Measure:
    """With the null that so many groups explain by chance, (G - 1) / (T - 1)."""
    folder, probs = routing.folder, routing.folder.probs(layer.layer)
    count = int(groups.max(initial=0)) + 1
    sizes = np.bincount(groups, minlength=count)
    value = eta_squared(sums_by_group(probs, groups, count), sizes, _squares(probs))
    null = float(((sizes > 0).sum() - 1) / max(folder.info.tokens - 1, 1))
    return measure(named, value, _eta_draws(routing, probs, groups, value), null)


def _eta_draws(routing: Routing, probs: NDArray[np.float16], groups: NDArray[np.integer], value: float) -> list[float]:
    """Values on drawn documents; of many documents a part is drawn from, and the spread scaled to their number."""
    documents = min(routing.folder.info.documents, int(np.searchsorted(routing.folder.bounds, GROUP_TOKENS)) or 1)
    if documents < 2:
        return []
    rows = slice(0, int(routing.folder.bounds[documents]))
    some, of_document = np.asarray(probs[rows], dtype=np.float32), routing.folder.document_of[rows]
    inside = np.unique(groups[rows], return_inverse=True)[1].astype(np.int64)
    squares = (some.astype(np.float64) ** 2).sum(axis=1)
    drawn = []
    for weights in document_weights(documents, GROUP_DRAWS):
        each = weights[of_document]
        sums = sums_by_group(some * each[:, None].astype(np.float32), inside, int(inside.max()) + 1)
        drawn.append(eta_squared(sums, np.bincount(inside, weights=each), float((squares * each).sum())))
    scale = np.sqrt(documents / routing.folder.info.documents)
    return [value + scale * (one - float(np.mean(drawn))) for one in drawn]


def _squares(values: NDArray[np.float16]) -> float:
    return float(sum((np.asarray(values[start:start + BLOCK_ROWS], dtype=np.float64) ** 2).sum()
                     for start in range(0, len(values), BLOCK_ROWS)))


# ---- document pools


def _pools(routing: Routing) -> list[Measure]:
    """How far the d experts that a document's first half uses most are those of its second half, of another document
    of the same label, of one of another label; and how much of their probability they hold. Means over layers."""
    long = np.flatnonzero(routing.lengths >= 2)
    partners = _partners(routing, long)
    found: list[Measure] = []
    for depth in DEPTHS:
        layers = [layer for layer in routing.layers if layer.experts > depth]
        for name, where, others in partners:
            if not layers or not len(others):
                continue
            overlap, mass = _pool_pairs(routing, layers, long, others, depth)
            shares = [depth / layer.experts for layer in layers]
            chance = float(np.mean([share / (2 - share) for share in shares]))
            found += [mean_measure(Named(f"pool_jaccard_{name}_d{depth}", f"overlap of pools of {depth} {where}"),
                                   overlap, chance),
                      mean_measure(Named(f"pool_mass_{name}_d{depth}", f"mass in pools of {depth} {where}"),
                                   mass, float(np.mean(shares)))]
    return found


def _partners(routing: Routing, long: NDArray[np.int64]) -> list[tuple[str, str, NDArray[np.int64]]]:
    """For each document of two tokens or more, another one to compare with (-1: there is none)."""
    generator, labels = np.random.default_rng(SEED), routing.labels[long]
    same, other = np.full(len(long), -1), np.full(len(long), -1)
    for label in np.unique(labels):
        members, rest = np.flatnonzero(labels == label), np.flatnonzero(labels != label)
        if len(members) > 1:  # each to the next one in a random ring, so never to itself
            ring = generator.permutation(members)
            same[ring] = long[np.roll(ring, 1)]
        if len(rest):
            other[members] = long[generator.choice(rest, len(members))]
    found = [("document", "within a document", long), ("label", "within a label", same),
             ("other", "between labels", other)]
    return [(name, where, others) for name, where, others in found if (others >= 0).any()]


def _pool_pairs(routing: Routing, layers: Sequence[LayerInfo], documents: NDArray[np.int64],
                others: NDArray[np.int64], depth: int) -> Pair:
    overlap, mass = np.zeros(len(documents)), np.zeros(len(documents))
    for layer in layers:
        halves = routing.halves[layer.layer]
        pool, theirs = _top(halves[documents, 0], depth), halves[others, 1]
        both = (pool & _top(theirs, depth)).sum(axis=1)
        overlap += both / (2 * depth - both) / len(layers)
        mass += (theirs * pool).sum(axis=1) / np.maximum(theirs.sum(axis=1), 1e-12) / len(layers)
    missing = others < 0
    overlap[missing], mass[missing] = np.nan, np.nan
    return overlap, mass


def _top(values: Floats, depth: int) -> NDArray[np.bool_]:
    mask = np.zeros(values.shape, dtype=bool)
    np.put_along_axis(mask, np.argsort(-values, axis=1, kind="stable")[:, :depth], True, axis=1)
    return mask


# ---- topics


def mean_cosine(vectors: Floats, *, centred: bool = False) -> float:
    """Mean cosine of all pairs of rows, after taking off their mean if `centred`; NaN for a single row."""
    if len(vectors) < 2:
        return float("nan")
    moved = vectors - vectors.mean(axis=0) if centred else vectors
    unit = moved / np.maximum(np.linalg.norm(moved, axis=1, keepdims=True), 1e-12)
    cosines = unit @ unit.T
    return float((cosines.sum() - np.trace(cosines)) / (len(unit) * (len(unit) - 1)))


def _topics(routing: Routing) -> list[Measure]:
    key = routing.folder.info.label_key
    found: list[Measure] = []
    for name, centred in (("topic_cosine", False), ("topic_cosine_centred", True)):
        named = Named(name, f"cosine between {key}s{', centred' if centred else ''}")
        each = [_topic_cosine(routing, layer, Named(name, named.about, layer.layer), centred)
                for layer in routing.layers]
        found += over_layers(named, [one for one in each if np.isfinite(one.value)])
    return found


def _topic_cosine(routing: Routing, layer: LayerInfo, named: Named, centred: bool) -> Measure:
    vectors, ones = routing.vectors(layer), np.ones(routing.folder.info.documents, dtype=np.int64)

    def cosine(weights: NDArray[np.int64], labels: NDArray[np.integer] = routing.labels) -> float:
        means = routing.label_means(vectors, labels, weights)
        return mean_cosine(means, centred=centred)

    null = [cosine(ones, labels) for labels in shuffles(routing.labels, SHUFFLES)]
    return with_draws(named, cosine, routing.folder.info.documents, DRAWS, null)


def _neighbours(routing: Routing) -> list[Measure]:
    """Share of a document's nearest neighbours (cosine of centred vectors, all layers) that have its label."""
    documents = np.flatnonzero(routing.lengths > 0)
    if len(documents) > NEIGHBOUR_DOCUMENTS:
        documents = np.sort(np.random.default_rng(SEED).choice(documents, NEIGHBOUR_DOCUMENTS, replace=False))
    labels = routing.labels[documents]
    if len(documents) < 2 or len(np.unique(labels)) < 2:
        return []
    vectors = np.concatenate([routing.vectors(layer)[documents] for layer in routing.layers], axis=1)
    vectors -= vectors.mean(axis=0)
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    cosines = vectors @ vectors.T
    np.fill_diagonal(cosines, -2)
    nearest = np.argsort(-cosines, axis=1, kind="stable")[:, :min(NEIGHBOURS, len(documents) - 1)]
    purity = (labels[nearest] == labels[:, None]).mean(axis=1)
    sizes = np.bincount(labels)
    null = float((sizes * (sizes - 1)).sum() / (len(labels) * (len(labels) - 1)))
    key = routing.folder.info.label_key
    return [mean_measure(Named("knn_purity", f"nearest documents of the same {key}"), purity, null)]


# ---- experts


def _experts(routing: Routing) -> list[Measure]:
    key = routing.folder.info.label_key
    names = {"specialisation": f"bits by which experts' {key}s differ", "dead_experts": "experts that no token chooses",
             "largest_load": "largest load over the mean load"}
    each: dict[str, list[Measure]] = {name: [] for name in names}
    for layer in routing.layers:
        counts = chosen_counts(routing.folder, layer, routing.folder.document_of, routing.folder.info.documents)
        load = counts.sum(axis=0)
        at = {name: Named(name, about, layer.layer) for name, about in names.items()}
        each["dead_experts"].append(measure(at["dead_experts"], float((load == 0).sum()), ()))
        each["largest_load"].append(measure(at["largest_load"], float(load.max() / max(load.mean(), 1e-12)), ()))
        score = partial(_mean_specialisation, routing, counts)
        ones = np.ones(len(counts), dtype=np.int64)
        null = [score(ones, labels) for labels in shuffles(routing.labels, SHUFFLES)]
        each["specialisation"].append(with_draws(at["specialisation"], score, len(counts), GROUP_DRAWS, null))
    return [one for name, about in names.items() for one in over_layers(Named(name, about), each[name])]


def _mean_specialisation(routing: Routing, counts: NDArray[np.int64], weights: NDArray[np.int64],
                         labels: NDArray[np.integer] | None = None) -> float:
    """Mean over the experts that are used."""
    table = np.zeros((len(routing.names), counts.shape[1]), dtype=np.int64)
    np.add.at(table, routing.labels if labels is None else labels, counts * weights[:, None])
    known = [value for value in specialisation(table) if value is not None]
    return float(np.mean(known)) if known else float("nan")
