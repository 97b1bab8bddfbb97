"""What each routed expert is used for: load, specialisation, words, labels, documents.

Shapes: T tokens, E experts of a layer, K chosen per token, W words, N documents.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from emo_select import progress
from emo_select.analysis.describe import BLOCK_ROWS, Counts, shares
from emo_select.analysis.layout import ExpertView, LayerInfo, ModelFolder
from emo_select.analysis.words import TokenWords, weighted_words

EXPERT_WORDS, EXPERT_LABELS, EXPERT_DOCUMENTS = 8, 4, 5


def expert_views(folder: ModelFolder, words: TokenWords) -> list[ExpertView]:
    """Every routed expert of every MoE layer."""
    found: list[ExpertView] = []
    with progress.track("Looking at experts", total=len(folder.info.layers)) as bar:
        for layer in folder.info.layers:
            found += _layer_views(folder, words, layer)
            bar.advance(1)
    return found


def chosen_counts(folder: ModelFolder, layer: LayerInfo, groups: NDArray[np.integer], count: int) -> Counts:
    """(count, E) how often tokens of each group choose each expert."""
    chosen, experts = folder.topk(layer.layer), layer.experts
    found = np.zeros(count * experts, dtype=np.int64)
    for start in range(0, len(chosen), BLOCK_ROWS):
        block = np.asarray(chosen[start:start + BLOCK_ROWS], dtype=np.int64)
        pairs = groups[start:start + BLOCK_ROWS].astype(np.int64)[:, None] * experts + block
        found += np.bincount(pairs.ravel(), minlength=len(found))
    return found.reshape(count, experts)


def specialisation(counts: Counts) -> list[float | None]:
    """(labels, E) tokens of each label that choose an expert → per expert, KL divergence in bits from all tokens'
    labels; None for an expert that no token chooses."""
    corpus = counts.sum(axis=1) / max(counts.sum(), 1)
    found: list[float | None] = []
    for column in counts.T:
        size = column.sum()
        if not size:
            found.append(None)
            continue
        share = column / size
        used = share > 0
        found.append(float(max((share[used] * np.log2(share[used] / corpus[used])).sum(), 0.0)))
    return found


def _layer_views(folder: ModelFolder, words: TokenWords, layer: LayerInfo) -> list[ExpertView]:
    names, numbers = np.unique(folder.labels(), return_inverse=True)
    by_document = chosen_counts(folder, layer, folder.document_of, folder.info.documents)
    by_label = np.zeros((len(names), layer.experts), dtype=np.int64)
    np.add.at(by_label, numbers, by_document)
    by_word = chosen_counts(folder, layer, words.of_token, len(words.words))
    load, mass = by_document.sum(axis=0), _mass(folder, layer)
    kl, totals, lengths = specialisation(by_label), by_word.sum(axis=1), np.diff(folder.bounds)
    return [ExpertView(
        layer=layer.layer, expert=e, load=float(load[e] / folder.info.tokens), mass=float(mass[e]),
        specialisation=kl[e], dead=not load[e],
        words=weighted_words(by_word[:, e], totals, words.words, most=EXPERT_WORDS),
        labels=shares(by_label[:, e], by_label.sum(axis=1), names.tolist(), EXPERT_LABELS),
        documents=_documents(by_document[:, e], lengths)) for e in range(layer.experts)]


def _mass(folder: ModelFolder, layer: LayerInfo) -> NDArray[np.float64]:
    """(E,) mean probability."""
    probs, total = folder.probs(layer.layer), np.zeros(layer.experts)
    for start in range(0, len(probs), BLOCK_ROWS):
        total += probs[start:start + BLOCK_ROWS].sum(axis=0, dtype=np.float64)
    return total / max(len(probs), 1)


def _documents(counts: Counts, lengths: Counts) -> tuple[int, ...]:
    """The documents that use an expert most per token."""
    rate = counts / np.maximum(lengths, 1)
    order = np.argsort(-rate, kind="stable")[:EXPERT_DOCUMENTS]
    return tuple(int(i) for i in order if rate[i])
