"""Grouped matrix products by torch where the package grouped_gemm is missing."""

from __future__ import annotations

import torch
from olmo_core.nn.moe.mlp import DroplessMoEMLP
from torch import Tensor, nn
from torch.nn import functional as F


def grouped_product(x: Tensor, w: Tensor, batch_sizes: Tensor, trans_b: bool = False) -> Tensor:
    """Rows of `x` (T, I), sorted by expert, times the matrix of their expert.

    `w` (E, I, O), with `trans_b` (E, O, I); `batch_sizes` (E,) rows of each expert. Returns (T, O).
    """
    ends = batch_sizes.to(x.device).cumsum(0).to(torch.int32)
    product: Tensor = F.grouped_mm(x, w.transpose(-2, -1) if trans_b else w, offs=ends)
    return product


def use_torch(network: nn.Module) -> None:
    """Hand torch's grouped product to all experts of a model of the engine that found none."""
    for module in network.modules():
        if isinstance(module, DroplessMoEMLP) and module._gmm is None:
            module._gmm = grouped_product
