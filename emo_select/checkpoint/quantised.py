"""Which stored tensors make one quantised weight: found from quantization_config and from what is there, by headers.

A weight `x.weight` of a quantised checkpoint is a payload of small numbers and a scale for each tensor, row, group or
block of them, under names that each method has of its own. A `Quantised` says which, what shape the weight has and how
its numbers are meant; `dequantise.py` computes them, and pruning copies the stored parts as they are.

Formats: transformers' quantizers (fp8, mxfp8, mxfp4, compressed-tensors) and NVIDIA's ModelOpt. Of other methods
(GPTQ, AWQ, bitsandbytes, …) only names are known here, so their weights are not read (`Formats.unread`).
Legend: R rows, C columns of a weight; E experts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from emo_select.checkpoint.header import TensorInfo, read_integers
from emo_select.errors import CheckpointError, ModelError

FLOATS = ("F64", "F32", "F16", "BF16")
FLOAT8 = ("F8_E4M3", "F8_E5M2")
SETTINGS = ("quantization_config", "compression_config")
READ = ("fp8", "mxfp8", "mxfp4", "compressed-tensors", "modelopt")
DENSE_FORMATS = ("int-quantized", "float-quantized", "naive-quantized", "pack-quantized", "nvfp4-pack-quantized",
                 "mxfp4-pack-quantized", "mxfp8-quantized", "mixed-precision")
EXPERT = re.compile(r"\.experts\.\d+\.")
Numbers = Literal["own", "fp4", "ints"]  # one per element; two E2M1 per byte; `bits` wide, packed into int32


@dataclass(frozen=True)
class Form:
    """Names that one way of storing gives: suffixes behind what the weight and its parts have in common."""

    payload: str
    dtypes: tuple[str, ...]
    scales: tuple[str, ...]  # the first one present
    weight: str


FORMS = (
    Form(".weight_packed", ("I32", "U8"), (".weight_scale",), ".weight"),
    Form("_blocks", ("U8",), ("_scales",), ""),
    Form(".weight", (*FLOAT8, "I8", "U8"), (".weight_scale_inv", ".weight_scale", ".scale", ".qscale_weight"),
         ".weight"),
    Form("", (*FLOAT8, "I8"), ("_scale_inv",), ""),
)
# Further stored parts of a weight, behind what it has in common with its payload. Scales of activations and caches are
# not needed for its numbers.
GLOBAL_SCALES, ZERO_POINTS, ORDERS = (".weight_global_scale", ".weight_scale_2"), (".weight_zero_point",), \
    (".weight_g_idx",)
COMPANIONS = (".weight_shape", ".activation_scale", ".input_scale", ".input_global_scale", ".input_zero_point",
              ".output_scale", ".k_scale", ".v_scale", "_activation_scale", "_input_scale")


@dataclass(frozen=True)
class Quantised:
    """One weight that several stored tensors make. `parts` are the names of all of them, the payload's first."""

    name: str
    shape: tuple[int, ...]
    payload: str
    scale: str
    global_scale: str | None = None
    zero_point: str | None = None
    others: tuple[str, ...] = ()
    numbers: Numbers = "own"
    bits: int = 8
    block: tuple[int, int] | None = None  # rows and columns that share a scale; None: told by the scale's own shape
    exponents: bool = False  # the scale's bytes are powers of two, 127 meaning 1
    divides: bool = False  # the global scale divides the scale (compressed-tensors) instead of multiplying it
    work: str | None = None  # precision of the product; None: the scale's own
    through: str | None = None  # precision that the product is rounded to first
    transposed: bool = False

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of its stored tensors."""
        return (self.payload, *filter(None, (self.scale, self.global_scale, self.zero_point)), *self.others)


@dataclass(frozen=True)
class Formats:
    """What of a checkpoint is quantised, and how."""

    weights: Mapping[str, Quantised] = field(default_factory=dict)
    """Name of a weight → what makes it."""
    method: str | None = None
    """The configuration's quant_method."""
    unread: str | None = None
    """A tensor of a method that is not read here; None where everything is."""

    @cached_property
    def owner(self) -> Mapping[str, Quantised]:
        """Stored tensor → the weight that it is a part of."""
        return {part: weight for weight in self.weights.values() for part in weight.parts}

    @property
    def stale(self) -> bool:
        """Whether the configuration speaks of a quantisation that no tensor has."""
        return self.method is not None and not self.weights and self.unread is None

    def require_readable(self) -> None:
        """Raise `ModelError` saying what can be done where numbers cannot be read."""
        if self.unread is not None:
            raise ModelError(
                f"The weights are quantised by {self.method} ({self.unread}), which is not read here; select with the "
                "unquantised original, then prune this one: emo-select prune SELECTION --model FOLDER.")


def quantization_of(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """quantization_config, wherever a configuration has it; None where there is none."""
    nested = config.get("text_config")
    for place in (config, nested if isinstance(nested, dict) else {}):
        for key in SETTINGS:
            if isinstance(found := place.get(key), dict) and found:
                return found
    return None


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of the same model with plain weights."""
    plain = {key: value for key, value in config.items() if key not in SETTINGS}
    return {key: without_quantization(value) if key == "text_config" and isinstance(value, dict) else value
            for key, value in plain.items()}


def formats_of(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo], directory: Path) -> Formats:
    """What of these tensors, which lie in `directory`, is quantised. Reads headers, and sizes of packed rows.

    Raises:
        CheckpointError, ModelError: a payload without scale, a form or an arithmetic that is not known, named.
    """
    settings = quantization_of(config)
    packed = [name for name, info in tensors.items() if info.dtype not in FLOATS and len(info.shape) > 1]
    if settings is None:
        _require_plain(packed, tensors)
        return Formats()
    method = str(settings.get("quant_method", "unknown"))
    if method not in READ:
        return Formats(method=method, unread=next(iter(packed), None))
    found = {one.name: one for one in _find(method, settings, tensors, directory)}
    formats = Formats(found, method)
    lost = [name for name in packed if name not in formats.owner and tensors[name].dtype in (*FLOAT8, "U8")]
    if lost:
        raise CheckpointError(f"{lost[0]} is stored as {tensors[lost[0]].dtype}, but has no scale beside it; download "
                              "or save the checkpoint again.")
    return formats


def _require_plain(packed: list[str], tensors: Mapping[str, TensorInfo]) -> None:
    quantised = [name for name in packed if tensors[name].dtype in (*FLOAT8, "U8") or name.endswith("qweight")]
    if quantised:
        raise CheckpointError(f"{quantised[0]} is quantised ({tensors[quantised[0]].dtype}), but config.json has no "
                              "quantization_config, so nobody can load it; copy that of the original model.")


def _find(method: str, settings: Mapping[str, Any], tensors: Mapping[str, TensorInfo], directory: Path
          ) -> Iterator[Quantised]:
    for name, info in tensors.items():
        for form in FORMS:
            if info.dtype not in form.dtypes or not name.endswith(form.payload):
                continue
            stem = name.removesuffix(form.payload) if form.payload else name
            scale = next((stem + suffix for suffix in form.scales if stem + suffix in tensors), None)
            if scale is not None:
                yield _described(method, settings, tensors, stem, form, name, scale, directory)
                break


def _described(method: str, settings: Mapping[str, Any], tensors: Mapping[str, TensorInfo], stem: str, form: Form,
               payload: str, scale: str, directory: Path) -> Quantised:
    def beside(suffixes: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(stem + suffix for suffix in suffixes if stem + suffix in tensors)

    if order := beside(ORDERS):
        raise ModelError(f"{order[0]} orders columns by their activations, which is not read here; use a checkpoint "
                         "that was quantised without activation order, or the bfloat16 original.")
    base = Quantised(stem + form.weight, tensors[payload].shape, payload, scale,
                     next(iter(beside(GLOBAL_SCALES)), None), next(iter(beside(ZERO_POINTS)), None),
                     beside(COMPANIONS), exponents=tensors[scale].dtype == "U8", work="F32")
    if method == "compressed-tensors":
        return _compressed(settings, tensors, stem, base, directory)
    if method == "mxfp4":
        return _rebuilt(base, shape=_blocks_shape(base, tensors), numbers="fp4", transposed=True)
    block = settings.get("weight_block_size")
    size = (int(block[0]), int(block[1])) if isinstance(block, list) and len(block) == 2 else None
    if tensors[payload].dtype in ("I8", "U8"):  # two 4-bit numbers to a byte, blocks of their own
        return _rebuilt(base, shape=_doubled(base.shape), numbers="fp4")
    return _rebuilt(base, block=_fitting(size, base, tensors))


def _compressed(settings: Mapping[str, Any], tensors: Mapping[str, TensorInfo], stem: str, base: Quantised,
                directory: Path) -> Quantised:
    """compressed-tensors: the group of the configuration that the module belongs to says how numbers are meant."""
    group = _group(settings, stem)
    layout = group.get("format") or settings.get("format")
    if layout not in DENSE_FORMATS:
        raise ModelError(f"{base.payload} is stored as compressed-tensors {layout!r}, which is not read here; use the "
                         "bfloat16 original.")
    weights = group.get("weights") or {}
    stored = tensors[base.payload].dtype
    if stored == "U8":
        shape = _doubled(base.shape)
        return _rebuilt(base, shape=shape, numbers="fp4", divides=True, through="BF16",
                        block=(1, shape[-1] // tensors[base.scale].shape[-1]))
    block = weights.get("block_structure")
    size = (int(block[0]), int(block[1])) if isinstance(block, list) and len(block) == 2 else None
    if stored == "I32":
        bits = int(weights.get("num_bits") or 4)
        shape = _unpacked(base, tensors, weights, bits, directory)
        return _rebuilt(base, shape=shape, numbers="ints", bits=bits, work=None)
    in_fp32 = base.exponents or (stored in FLOAT8 and EXPERT.search(stem + "."))
    return _rebuilt(base, work="F32" if in_fp32 else None, block=_fitting(size, base, tensors))


def _group(settings: Mapping[str, Any], module: str) -> Mapping[str, Any]:
    """The group whose patterns fit the module, else the one for its class."""
    groups = [group for group in (settings.get("config_groups") or {}).values() if isinstance(group, dict)]
    for group in groups:
        for target in group.get("targets") or ():
            if target == module or (target.startswith("re:") and re.match(target.removeprefix("re:"), module)):
                return group
    by_class = [group for group in groups if any(not str(target).startswith("re:")
                                                 for target in group.get("targets") or ())]
    return next(iter(by_class or groups), {})


def _unpacked(base: Quantised, tensors: Mapping[str, TensorInfo], weights: Mapping[str, Any], bits: int,
              directory: Path) -> tuple[int, ...]:
    """Shape of a weight that is packed into int32: by its groups, else by the shape stored beside it."""
    *lead, words = base.shape
    groups, size = tensors[base.scale].shape[-1:], weights.get("group_size")
    if weights.get("strategy") == "group" and groups and size:
        return (*lead, groups[0] * int(size))
    stored = next((name for name in base.others if name.endswith(".weight_shape")), None)
    columns = read_integers(directory, tensors[stored])[-1] if stored else words * 32 // bits
    if math.ceil(columns * bits / 32) != words:
        raise CheckpointError(f"{base.payload} has {words} words per row, which are not {columns} numbers of {bits} "
                              "bits; download or save the checkpoint again.")
    return (*lead, columns)


def _fitting(size: tuple[int, int] | None, base: Quantised, tensors: Mapping[str, TensorInfo]
             ) -> tuple[int, int] | None:
    """The configured block where the scale has one entry for each; None where its shape alone tells."""
    grid, shape = tensors[base.scale].shape, base.shape
    if size is not None and len(grid) >= 2 and len(shape) >= 2:
        expected = tuple(math.ceil(n / b) for n, b in zip(shape[-2:], size, strict=True))
        if grid[-2:] == expected:
            return size
    if math.prod(grid) > 1 and len(grid) >= 2 and (shape[-2] % grid[-2] or shape[-1] % grid[-1]):
        raise CheckpointError(f"{base.scale} has shape {list(grid)}, which does not divide {list(shape)} of "
                              f"{base.payload} into blocks.")
    return None


def _blocks_shape(base: Quantised, tensors: Mapping[str, TensorInfo]) -> tuple[int, ...]:
    """[E, out, groups, bytes] → [E, in, out]."""
    experts, out, groups, size = (*base.shape, 0, 0, 0, 0)[:4]
    if len(base.shape) != 4 or tensors[base.scale].shape != (experts, out, groups):
        raise CheckpointError(f"{base.payload} and {base.scale} have shapes {list(base.shape)} and "
                              f"{list(tensors[base.scale].shape)}, which do not belong together.")
    return experts, groups * size * 2, out


def _doubled(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape[:-1], shape[-1] * 2)


def _rebuilt(base: Quantised, **changes: Any) -> Quantised:
    return replace(base, **changes)
