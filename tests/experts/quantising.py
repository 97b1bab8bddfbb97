"""Tiny checkpoints quantised as published ones are: by each format's formulas, or by the package that defines it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Tensors = dict[str, Tensor]
FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def is_linear(name: str) -> bool:
    """Projections of attention and of every feed-forward part, not the router, embeddings or head."""
    return name.endswith((*(f"{part}_proj.weight" for part in "qkvo"), "gate_proj.weight", "up_proj.weight",
                          "down_proj.weight", "w1.weight", "w2.weight", "w3.weight"))


def quantised(source: Path, target: Path, settings: dict[str, Any], convert: Callable[[str, Tensor], Tensors],
              chosen: Callable[[str], bool] = is_linear) -> Path:
    """A copy of a checkpoint with `convert(name, weight)` in place of each chosen weight."""
    shutil.copytree(source, target)
    tensors: Tensors = {}
    for name, value in load_file(source / "model.safetensors").items():
        tensors |= convert(name, value) if chosen(name) else {name: value}
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    return target


def blockwise(block: int, *, scale: str = "weight_scale_inv") -> Callable[[str, Tensor], Tensors]:
    """FP8 with one float32 scale for each block of `block` × `block`, the last ones cut."""
    def convert(name: str, weight: Tensor) -> Tensors:
        rows, columns = weight.shape
        padded = torch.nn.functional.pad(weight.float(), (0, -columns % block, 0, -rows % block))
        blocks = padded.view(padded.shape[0] // block, block, padded.shape[1] // block, block)
        scales = blocks.abs().amax(dim=(1, 3)).clamp(min=1e-8) / 448
        values = (blocks / scales[:, None, :, None]).view(padded.shape)[:rows, :columns]
        stem = name.removesuffix("weight")
        return {name: values.contiguous().to(torch.float8_e4m3fn), f"{stem}{scale}": scales}
    return convert


def fp4_codes(values: Tensor) -> Tensor:
    """Nearest E2M1 codes, two to a byte along the last axis, the first in the low half."""
    codes = (values.abs()[..., None] - FP4).abs().argmin(-1) + 8 * (values < 0)
    return (codes[..., 0::2] | codes[..., 1::2] << 4).to(torch.uint8)


def power_scales(groups: Tensor) -> Tensor:
    """Exponents, biased by 127, of the scales of groups along the last axis."""
    return (torch.floor(torch.log2(groups.abs().amax(-1).clamp(min=1e-8))) - 2 + 127).clamp(0, 254).to(torch.uint8)


def gpt_oss_blocks(name: str, weight: Tensor) -> Tensors:
    """MXFP4 of fused experts [E, in, out] as gpt-oss has it: [E, out, groups, 16] and [E, out, groups]."""
    groups = weight.float().transpose(1, 2).unflatten(-1, (-1, 32))
    scales = power_scales(groups)
    codes = fp4_codes(groups / torch.exp2(scales.float() - 127)[..., None])
    return {f"{name}_blocks": codes.contiguous(), f"{name}_scales": scales}


def mxfp8(name: str, weight: Tensor) -> Tensors:
    """FP8 with exponents for every 32 columns, as quant_method mxfp8."""
    groups = weight.float().unflatten(-1, (-1, 32))
    scales = power_scales(groups)
    values = (groups / torch.exp2(scales.float() - 127)[..., None]).flatten(-2).clamp(-448, 448)
    return {name: values.to(torch.float8_e4m3fn), f"{name}_scale_inv": scales}


def packed_fp4(name: str, weight: Tensor) -> Tensors:
    """Two E2M1 in an int8 with float8 exponents for every 32 columns, as the experts of DeepSeek-V4."""
    groups = weight.float().unflatten(-1, (-1, 32))
    scales = power_scales(groups)
    codes = fp4_codes((groups / torch.exp2(scales.float() - 127)[..., None]).flatten(-2))
    return {name: codes.view(torch.int8), f"{name.removesuffix('weight')}scale": scales.view(torch.float8_e8m0fnu)}


def modelopt_nvfp4(name: str, weight: Tensor) -> Tensors:
    """NVFP4 as NVIDIA's tool stores it: the scale of the scales multiplies."""
    groups = weight.float().unflatten(-1, (-1, 16))
    overall = weight.float().abs().max() / (6 * 448)
    scales = (groups.abs().amax(-1).clamp(min=1e-8) / 6 / overall).to(torch.float8_e4m3fn)
    codes = fp4_codes((groups / (scales.float() * overall)[..., None]).flatten(-2))
    return {name: codes, f"{name}_scale": scales, f"{name}_scale_2": overall.reshape(()),
            f"{name.removesuffix('weight')}input_scale": torch.ones(())}


def compressed(layout: str, weights: dict[str, Any], **group: Any) -> tuple[dict[str, Any],
                                                                            Callable[[str, Tensor], Tensors]]:
    """Settings and conversion by the compressed-tensors package's own compressors."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    settings = {"quant_method": "compressed-tensors", "format": layout, "quantization_status": "compressed",
                "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, **group}},
                "ignore": ["lm_head", "re:.*mlp.gate$", "re:.*block_sparse_moe.gate$"]}
    scheme = QuantizationScheme.model_validate({"targets": ["Linear"], "weights": weights, **group})
    compressor = BaseCompressor.get_value_from_registry(layout)

    def convert(name: str, weight: Tensor) -> Tensors:
        state = {"weight": weight.bfloat16(), **scales_of(weight.bfloat16(), scheme.weights)}
        stem = name.removesuffix("weight")
        return {f"{stem}{part}": value.contiguous() for part, value in compressor.compress(state, scheme).items()}
    return settings, convert


def scales_of(weight: Tensor, args: Any) -> Tensors:
    """Scales, zero points and global scale that compressed-tensors' own rule gives for the extremes of each part."""
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    rows, columns = weight.shape
    size = args.group_size or columns
    strategy = str(getattr(args.strategy, "value", args.strategy))
    parts = {"tensor": lambda: weight.reshape(1, -1), "channel": lambda: weight,
             "block": lambda: None}.get(strategy, lambda: weight.unflatten(-1, (-1, size)))()
    if strategy == "block":
        high, wide = args.block_structure
        parts = weight.view(rows // high, high, columns // wide, wide).transpose(1, 2).flatten(-2)
    extra = {}
    if strategy == "tensor_group":
        extra["weight_global_scale"] = generate_gparam(weight.amin(), weight.amax())
    keep = strategy in ("tensor", "channel")
    low, high_ = parts.amin(-1, keepdim=keep), parts.amax(-1, keepdim=keep)
    scale, zero = calculate_qparams(low, high_, args, global_scale=extra.get("weight_global_scale"))
    if strategy == "tensor":
        scale, zero = scale.reshape(1), zero.reshape(1)
    return {"weight_scale": scale, "weight_zero_point": zero, **extra}
