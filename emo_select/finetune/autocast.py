"""Fused experts under autocast: their grouped products do not cast by themselves and would run in float32."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn


def cast_experts(model: nn.Module, suffix: str) -> None:
    """Make every module whose name ends with `suffix` compute in autocast's dtype from weights cast for the call."""
    for name, module in model.named_modules():
        if name.endswith("." + suffix):
            module.forward = partial(_cast_forward, module, module.forward)


def _cast_forward(module: nn.Module, forward: Callable[..., Any], *inputs: Any) -> Any:
    device = inputs[0].device.type
    if not torch.is_autocast_enabled(device):
        return forward(*inputs)
    dtype = torch.get_autocast_dtype(device)
    weights = {name: weight.to(dtype) for name, weight in module.named_parameters(recurse=False)}
    module.__dict__.update(weights)  # found before the parameters of the same names
    try:
        return forward(*(value.to(dtype) if value.is_floating_point() else value for value in inputs))
    finally:
        for name in weights:
            del module.__dict__[name]
