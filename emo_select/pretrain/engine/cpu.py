"""What the engine has no CPU code for, so that small models train and tests run there. Nothing here touches a GPU run.

Three permutation kernels are Triton programs, and only flash attention masks between documents.

Shapes: T tokens, K experts per token, D width, B rows, S positions, h heads, d width of a head.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from olmo_core.nn.attention.backend import TorchAttentionBackend
from olmo_core.ops import moe
from torch import Tensor, nn
from torch.nn import functional as F


def gather(x: Tensor, indices: Tensor, bin_ids: Tensor, weights: Tensor | None, bins: Tensor, top_k: int) -> Tensor:
    """(T, D) → (T·K, D): row i is the token of the choice `indices[i]`, times its weight if there are weights."""
    del bin_ids, bins
    rows = x[indices.long() // top_k]
    return rows if weights is None else rows * weights[indices.long()][:, None]


def scatter(x: Tensor, indices: Tensor, bin_ids: Tensor, weights: Tensor | None, bins: Tensor, top_k: int) -> Tensor:
    """(T·K, D) → (T, D): the inverse of `gather`, weighed and summed over each token's choices."""
    del bin_ids, bins
    back = torch.empty_like(x)
    back[indices.long()] = x
    if weights is not None:
        back = back * weights[:, None]
    return back.view(-1, top_k, x.shape[-1]).sum(1)


def scatter_wgrad(x: Tensor, grad: Tensor, indices: Tensor, bin_ids: Tensor, bins: Tensor, top_k: int) -> Tensor:
    """Gradient of the weights, (T·K,): the output row of each choice times the gradient of its token."""
    del bin_ids, bins
    out = x.new_empty(len(x))
    out[indices.long()] = (x * grad[indices.long() // top_k]).sum(-1)
    return out


class DocumentAttention(TorchAttentionBackend):
    """Causal attention that does not look into other documents, by a mask."""

    def forward(self, qkv: Any, cu_doc_lens: Tensor | None = None, max_doc_len: int | None = None,
                **options: Any) -> Tensor:
        """q, k, v (B, S, h, d) → (B, S, h, d); `cu_doc_lens` are document bounds over all B·S positions."""
        if cu_doc_lens is None:
            plain: Tensor = super().forward(qkv, **options)
            return plain
        q, k, v = (part.transpose(1, 2) for part in qkv)
        rows, positions = q.shape[0], q.shape[2]
        places = torch.arange(rows * positions, device=q.device)
        document = torch.bucketize(places, cu_doc_lens[1:].long(), right=True).view(rows, positions)
        same = document[:, :, None] == document[:, None, :]
        mask = same & torch.ones(positions, positions, dtype=torch.bool, device=q.device).tril()
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None], scale=self.scale).transpose(1, 2)


def prepare(model: nn.Module) -> None:
    """Make a model of the engine run on the CPU: put the stand-ins where it would find nothing."""
    moe.kernels = SimpleNamespace(gather=gather, scatter=scatter, scatter_wgrad=scatter_wgrad)
    for module in model.modules():
        if isinstance(getattr(module, "backend", None), TorchAttentionBackend):
            module.backend.__class__ = DocumentAttention
