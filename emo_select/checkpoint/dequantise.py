"""The numbers that quantised weights stand for, bit for bit as transformers' quantizers compute them.

Sources: transformers' integrations of fine-grained FP8 and MXFP4, and compressed-tensors' compressors. Where those take
blocks of even size for granted, the block of the configuration is used, the last ones being cut.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache

import torch
from torch import Tensor

from emo_select.checkpoint.header import DTYPES
from emo_select.checkpoint.quantised import Quantised

INT4 = tuple(float(number) for number in range(-8, 8))
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def dequantised(weight: Quantised, parts: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    """The matrix [R, C] that the stored `parts` (by name) of `weight` make; of fused experts, those of one expert."""
    scale = _scale(weight, parts)
    work = scale.dtype
    values = _numbers(weight, parts[weight.payload], work)
    if weight.zero_point is not None:
        values = _combined(values, _zero_point(weight, parts[weight.zero_point], scale, values).to(work), weight,
                           Tensor.sub_)
    values = _combined(values, scale, weight, Tensor.mul_)
    if weight.through is not None:
        values = values.to(_dtype(weight.through))
    values = values.to(dtype)
    return values.t() if weight.transposed else values


def _scale(weight: Quantised, parts: Mapping[str, Tensor]) -> Tensor:
    """In the precision that the product is made in, two-dimensional."""
    stored = parts[weight.scale]
    scale = stored if weight.work is None else stored.to(_dtype(weight.work))
    if weight.exponents:
        scale = torch.exp2(stored.float() - 127)
    if weight.global_scale is not None:
        overall = parts[weight.global_scale].to(scale.dtype)
        scale = scale / overall if weight.divides else scale * overall
    return scale.reshape(-1, 1) if scale.dim() < 2 else scale


def _numbers(weight: Quantised, payload: Tensor, work: torch.dtype) -> Tensor:
    """[R, C] as they are stored, before scaling."""
    if weight.numbers == "fp4":
        return _looked_up(payload, E2M1).to(work)
    if weight.numbers == "ints":
        return _unpacked(payload, weight.bits, weight.shape[-1]).to(work)
    return payload.to(work)


def _looked_up(payload: Tensor, codes: tuple[float, ...]) -> Tensor:
    """[R, 2 · bytes] in float32: the numbers that the halves of each byte stand for."""
    pairs = torch.nn.functional.embedding(payload.contiguous().view(torch.uint8).int(), _pairs(codes))
    return pairs.reshape(payload.shape[0], -1)


@cache
def _pairs(codes: tuple[float, ...]) -> Tensor:
    """[256, 2]: the two numbers of a byte, the low half first."""
    values = torch.tensor(codes)
    return torch.stack([values.repeat(16), values.repeat_interleave(16)], dim=1)


def _unpacked(words: Tensor, bits: int, columns: int) -> Tensor:
    """[R, columns] of numbers that lie `bits` apart in rows of int32, shifted to be unsigned.

    32 numbers take `bits` words; one may begin in a word and end in the next.
    """
    if bits == 4:
        return _looked_up(words, INT4)[:, :columns]
    words = torch.nn.functional.pad(words, (0, -words.shape[1] % bits)).long() & 0xFFFFFFFF
    words = words.view(words.shape[0], -1, bits)
    starts = torch.arange(32) * bits
    first, offset = starts // 32, starts % 32
    after = torch.minimum(first + 1, torch.tensor(bits - 1))
    wide = words[..., first] | (words[..., after] << 32)
    found = (wide >> offset) & ((1 << bits) - 1)
    return found.reshape(words.shape[0], -1)[:, :columns] - (1 << (bits - 1))


def _zero_point(weight: Quantised, stored: Tensor, scale: Tensor, values: Tensor) -> Tensor:
    """Shaped as the scale; of packed weights it is packed along the rows."""
    if weight.numbers != "ints":
        return stored.reshape(scale.shape)
    return _unpacked(stored.t().contiguous(), weight.bits, values.shape[0]).t()


def _combined(values: Tensor, by: Tensor, weight: Quantised, operation: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """`values` [R, C], changed in place, with one entry of `by` for each block of them."""
    rows, columns = values.shape
    if by.numel() == 1 or by.shape == (rows, 1):
        return operation(values, by)
    high, wide = weight.block or (rows // by.shape[0], columns // by.shape[1])
    if rows % high or columns % wide:
        whole = by.repeat_interleave(high, 0)[:rows].repeat_interleave(wide, 1)[:, :columns]
        return operation(values, whole)
    blocks = values.view(rows // high, high, columns // wide, wide)
    return operation(blocks, by[:, None, :, None]).view(rows, columns)


def _dtype(name: str) -> torch.dtype:
    found: torch.dtype = getattr(torch, DTYPES[name][1])
    return found
