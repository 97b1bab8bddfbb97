"""A checkpoint whose quantised weights appear as the numbers they stand for, computed when they are read.

Names, shapes and reading are those of any checkpoint, so that what asks for a weight needs not know how it is stored.
A weight is dequantised when it is read, fused experts one after the other: memory is bounded by one of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from emo_select.checkpoint.fingerprint import Content
from emo_select.checkpoint.header import DTYPES, TensorInfo, tensor_bytes
from emo_select.checkpoint.quantised import Formats, Quantised
from emo_select.checkpoint.reader import Checkpoint

if TYPE_CHECKING:
    import torch


class Plain(Checkpoint):
    """The view of `stored`; see the module's text. Weights that are not quantised are read as they are."""

    def __init__(self, stored: Checkpoint, formats: Formats, dtype: str) -> None:
        self.stored, self.weights = stored, formats.weights
        owner = {weight.payload: weight for weight in formats.weights.values()}
        tensors = {}
        for name, info in stored.tensors.items():
            if (weight := owner.get(name)) is not None:
                tensors[weight.name] = TensorInfo(dtype, weight.shape, info.shard, info.offset,
                                                  tensor_bytes(dtype, weight.shape))
            elif name not in formats.owner:
                tensors[name] = info
        super().__init__(stored.directory, stored.config, tensors)

    @property
    def formats(self) -> Formats:
        """Nothing is quantised here."""
        return Formats()

    def plain(self, dtype: str | None = None) -> Checkpoint:
        """Itself, or the view in another precision."""
        return self if dtype is None else self.stored.plain(dtype)

    def read_into(self, name: str, out: torch.Tensor, rows: Sequence[int] | None = None, axis: int = 0) -> None:
        """Dequantise the weight (or `rows` of it) into `out`; others as `Checkpoint.read_into`."""
        weight = self.weights.get(name)
        if weight is None:
            self.stored.read_into(name, out, rows, axis)
        elif len(weight.shape) > 2:
            for place, expert in enumerate(range(weight.shape[0]) if rows is None else rows):
                out[place].copy_(self._matrix(weight, expert))
        else:
            values = self._matrix(weight)
            out.copy_(values if rows is None else values[list(rows)])

    def pieces(self, name: str, rows: Sequence[int] | None = None, axis: int = 0) -> Iterator[memoryview]:
        """The bytes of the numbers, fused experts one after the other (theirs is axis 0)."""
        import torch

        weight = self.weights.get(name)
        if weight is None:
            yield from self.stored.pieces(name, rows, axis)
            return
        fused = len(weight.shape) > 2
        for one in (range(weight.shape[0]) if rows is None else rows) if fused else [None]:
            values = self._matrix(weight, one)
            values = values if fused or rows is None else values[list(rows)]
            yield values.contiguous().view(-1).view(torch.uint8).numpy().data

    def ranges(self, name: str, rows: Sequence[int] | None = None, axis: int = 0) -> Iterator[tuple[int, int]]:
        """Of weights that are not quantised; the others are not bytes of any file. Raises `ValueError` for those."""
        if name in self.weights:
            raise ValueError(f"{name} is made of {', '.join(self.weights[name].parts)}")
        return self.stored.ranges(name, rows, axis)

    def warm(self, name: str, rows: Sequence[int] | None = None) -> None:
        """Let the kernel read the stored parts ahead."""
        weight = self.weights.get(name)
        for part in [name] if weight is None else [weight.payload, weight.scale]:
            self.stored.warm(part, rows if weight is None or self._per_expert(weight, part) else None)

    def file(self, shard: str) -> int:
        """As stored."""
        return self.stored.file(shard)

    @cached_property
    def content(self) -> Content:
        """Of what is stored."""
        return self.stored.content

    def close(self) -> None:
        """Close what is stored."""
        if hasattr(self, "stored"):
            self.stored.close()

    def __del__(self) -> None:
        """The stored checkpoint may live on."""

    def _matrix(self, weight: Quantised, expert: int | None = None) -> torch.Tensor:
        import torch

        from emo_select.checkpoint.dequantise import dequantised

        names = filter(None, (weight.payload, weight.scale, weight.global_scale, weight.zero_point))
        parts = {name: self._part(weight, name, expert) for name in names}
        return dequantised(weight, parts, getattr(torch, DTYPES[self.tensors[weight.name].dtype][1]))

    def _part(self, weight: Quantised, name: str, expert: int | None) -> torch.Tensor:
        if expert is None or not self._per_expert(weight, name):
            part = self.stored.read(name)
        else:
            part = self.stored.read(name, [expert])[0]
        return part.flatten(-2) if part.dim() > 2 else part

    def _per_expert(self, weight: Quantised, part: str) -> bool:
        shape = self.stored.tensors[part].shape
        return len(weight.shape) > 2 and len(shape) > 0 and shape[0] == weight.shape[0]
