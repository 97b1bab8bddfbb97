"""What is clustered: named views of a model's routing, read in blocks of rows so that memory does not grow with them.

Token rows: `probs`, `topk` (0 or 1), `logits`, and `layerN_probs` of one layer. Document rows, means over the
document's tokens: `doc_probs`, `doc_topk_freq`, `doc_logits`, `doc_layerN_probs`. Columns are layer by layer, expert by
expert; layers are never averaged.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from emo_select.analysis.layout import LayerInfo, ModelFolder
from emo_select.errors import SpecError, UnknownNameError

NAMES = ("probs", "topk", "logits", "layerN_probs", "doc_probs", "doc_topk_freq", "doc_logits", "doc_layerN_probs")
BLOCK_ROWS = 8192
PATTERN = re.compile(r"(doc_)?(?:(probs|topk|topk_freq|topk_binary|logits)|layer(\d+)_probs)")
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Embedding:
    """A named view: `layers` of `kind`, as token rows or as document means."""

    name: str
    folder: ModelFolder
    kind: str
    layers: Sequence[LayerInfo]
    of_documents: bool

    @property
    def rows(self) -> int:
        """Tokens, or documents."""
        return self.folder.info.documents if self.of_documents else self.folder.info.tokens

    @property
    def columns(self) -> int:
        """Experts of all layers."""
        return sum(layer.experts for layer in self.layers)

    def block(self, start: int, stop: int) -> Floats:
        """Rows in fp32."""
        if not self.of_documents:
            return self._tokens(start, stop)
        bounds = self.folder.bounds[start:stop + 1]
        values = self._tokens(int(bounds[0]), int(bounds[-1]))
        sums = np.add.reduceat(values, (bounds[:-1] - bounds[0]).clip(max=max(len(values) - 1, 0)), axis=0,
                               dtype=np.float64)
        lengths = np.diff(bounds)
        sums[lengths == 0] = 0
        return (sums / np.maximum(lengths, 1)[:, None]).astype(np.float32)

    def take(self, rows: NDArray[np.int64]) -> Floats:
        """Any rows (ascending) in fp32."""
        if self.of_documents:
            return self.block(0, self.rows)[rows]
        return np.concatenate([self._part(layer, rows) for layer in self.layers], axis=1)

    def blocks(self, rows: NDArray[np.int64] | None = None) -> Iterator[tuple[int, Floats]]:
        """(place of the first row, rows), in blocks that fit in memory, of all rows or of these (ascending)."""
        count = self.rows if rows is None else len(rows)
        step = self._documents_per_block() if self.of_documents else BLOCK_ROWS
        for start in range(0, count, step):
            stop = min(start + step, count)
            yield start, self.block(start, stop) if rows is None else self.take(rows[start:stop])

    def _documents_per_block(self) -> int:
        """About as many documents as a block has tokens."""
        mean = self.folder.info.tokens / max(self.folder.info.documents, 1)
        return max(1, int(BLOCK_ROWS / max(mean, 1)))

    def _tokens(self, start: int, stop: int) -> Floats:
        return np.concatenate([self._part(layer, slice(start, stop)) for layer in self.layers], axis=1)

    def _part(self, layer: LayerInfo, rows: slice | NDArray[np.int64]) -> Floats:
        if self.kind != "topk":
            source = self.folder.probs if self.kind == "probs" else self.folder.logits
            return source(layer.layer)[rows].astype(np.float32)
        chosen = self.folder.topk(layer.layer)[rows].astype(np.int64)
        mask = np.zeros((len(chosen), layer.experts), dtype=np.float32)
        np.put_along_axis(mask, chosen, 1, axis=1)
        return mask


def embedding(folder: ModelFolder, name: str) -> Embedding:
    """A view by its name.

    Raises:
        UnknownNameError: no such view. SpecError: the layer is dense or does not exist, or logits were not kept.
    """
    match = PATTERN.fullmatch(name)
    if not match:
        raise UnknownNameError("embedding", name, NAMES)
    kind = {"topk_freq": "topk", "topk_binary": "topk"}.get(match[2] or "probs", match[2] or "probs")
    layers = folder.info.layers if match[3] is None else [_layer(folder, int(match[3]))]
    if kind == "logits":
        folder.logits(layers[0].layer)
    return Embedding(name, folder, kind, layers, match[1] is not None)


def _layer(folder: ModelFolder, number: int) -> LayerInfo:
    found = next((layer for layer in folder.info.layers if layer.layer == number), None)
    if found is None:
        known = ", ".join(str(layer.layer) for layer in folder.info.layers)
        raise SpecError(f"{folder.info.model} has no MoE layer {number}; it has {known}.")
    return found
