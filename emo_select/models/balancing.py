"""The load-balancing loss of EMO: routed experts only, label tokens only.

Shapes: T tokens, E experts of a layer (shared last), R experts that take part, K of them chosen per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from emo_select.models.config import EmoConfig


class Balanced(NamedTuple):
    """Which experts of a layer are balanced: not the last `num_shared`, not the always-active ones."""

    num_shared: int
    always_active: list[int]


def balanced_experts(config: EmoConfig) -> list[Balanced]:
    """Per MoE layer, the experts to leave out of the loss.

    Where all MoE layers have the same number of experts, the global number of shared experts and the always-active
    list of the first layer hold for all of them: the published training loss does so, and finetuning must equal it.
    """
    layers = config.moe_layers()
    if len({config.experts_in(layer) for layer in layers}) == 1:
        return [Balanced(config.num_shared_experts, config.always_active_in(0))] * len(layers)
    return [Balanced(config.shared_in(layer), config.always_active_in(layer)) for layer in layers]


def load_balancing_loss(
    config: EmoConfig,
    router_logits: Sequence[Tensor],
    token_mask: Tensor | None = None,
    num_items: Tensor | int | None = None,
) -> Tensor:
    """Mean over MoE layers of Σ_e count_e · probability_e · R / (items · K).

    Args:
        router_logits: per MoE layer (T, E).
        token_mask: (B, S) with B·S = T; tokens that count, the labels ≠ -100 or the attention mask.
        num_items: divides the counts; by default the number of tokens in the mask.

    count_e sums over the tokens of the mask, probability_e averages over them. Without a mask the counts
    are divided by the number of choices twice, as in the published code, which puts the loss on another scale.
    """
    mask = None if token_mask is None else token_mask.reshape(-1).to(torch.float32)
    parts = [_layer_loss(logits, part, config.num_experts_per_tok, mask, num_items)
             for logits, part in zip(router_logits, balanced_experts(config), strict=True)]
    return torch.stack([part.to(parts[0].device) for part in parts]).mean()


def _layer_loss(
    logits: Tensor, part: Balanced, top_k: int, mask: Tensor | None, num_items: Tensor | int | None
) -> Tensor:
    probabilities = _balanced_probabilities(logits, part)
    experts = probabilities.shape[-1]
    top_k = min(top_k, logits.shape[-1]) - part.num_shared - len(part.always_active)
    if top_k < 1:  # nothing is routed: nothing to balance
        return probabilities.new_zeros(())
    chosen = torch.topk(probabilities, top_k, dim=-1).indices
    weights = probabilities.new_ones(len(probabilities)) if mask is None else mask.to(probabilities.device)
    tokens = weights.sum()
    counts = probabilities.new_zeros(experts).index_add(0, chosen.reshape(-1), weights.repeat_interleave(top_k))
    mean_probability = (probabilities * weights[:, None]).sum(dim=0) / tokens
    if mask is None:
        counts = counts / (tokens * top_k)
    items = tokens if num_items is None else num_items
    return (counts * mean_probability).sum() * experts / (items * top_k)


def _balanced_probabilities(logits: Tensor, part: Balanced) -> Tensor:
    """Softmax (T, R) in fp32: shared columns are cut before it, always-active ones after it."""
    routed = F.softmax(logits[:, :logits.shape[-1] - part.num_shared], dim=-1, dtype=torch.float)
    if not part.always_active:
        return routed
    others = [expert for expert in range(routed.shape[-1]) if expert not in part.always_active]
    return routed[:, others]
