"""The published selection algorithms in their plain form: the measure for benchmarks, and an oracle.

Written from their description. The whole model is loaded; for each layer the network runs again from the embedding
up to that layer's router (hooks, left early by an exception); experts run one after the other in Python, all of
them, as in transformers before fused experts; layers are pruned in memory on the way up.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

BATCH = 8


class _Reached(Exception):
    """The layer that is being measured has been seen."""


def plain_layerwise(model: Any, prompts: Sequence[Sequence[int]], keep_k: int, pad: int = 1) -> list[list[int]]:
    """Kept experts per layer; `model` is an EMO model in memory, which is pruned."""
    use_plain_experts(model)
    kept = []
    for decoder in model.model.layers:
        averages = _average_probabilities(model, decoder.mlp.gate, prompts, pad)
        shared = decoder.mlp.gate.num_shared
        routed = len(averages) - shared
        best = torch.topk(averages[:routed], keep_k - shared).indices.tolist()
        kept.append([*sorted(best), *range(routed, routed + shared)])
        _prune(decoder.mlp, kept[-1])
    return kept


def plain_easy_ep(model: Any, prompts: Sequence[Sequence[int]], pad: int = 1) -> list[list[float]]:
    """EASY-EP score of every expert: one pass through the unpruned model with a hook on every block."""
    use_plain_experts(model)
    scores = [torch.zeros(layer.mlp.gate.num_experts, dtype=torch.float64) for layer in model.model.layers]
    mask = torch.empty(0)

    def watch(number: int, block: Any) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            real = mask.flatten().bool()
            hidden, out = inputs[0].flatten(0, 1), output.flatten(0, 1)
            turn = (1 - F.cosine_similarity(hidden, hidden + out, dim=-1)).clamp(min=0)
            _, gates, index = block.gate(hidden)
            for expert in range(block.gate.num_experts):
                token, slot = torch.where((index == expert) & real[:, None])
                if len(token):
                    norm = _expert(block.experts, expert, hidden[token]).norm(dim=-1)
                    scores[number][expert] += (gates[token, slot] * norm * turn[token]).double().sum()
        return hook

    handles = [layer.mlp.register_forward_hook(watch(i, layer.mlp)) for i, layer in enumerate(model.model.layers)]
    with torch.no_grad():
        for ids, mask in _batches(prompts, pad):
            model(input_ids=ids, attention_mask=mask, use_cache=False)
    for handle in handles:
        handle.remove()
    return [score.tolist() for score in scores]


def use_plain_experts(model: Any) -> None:
    """Let every block run its experts one by one, with or without tokens."""
    for layer in model.model.layers:
        layer.mlp.experts.forward = _loop(layer.mlp.experts)


def _loop(experts: Any) -> Any:
    def forward(hidden: Tensor, index: Tensor, gates: Tensor) -> Tensor:
        output = torch.zeros_like(hidden)
        chosen = F.one_hot(index, num_classes=experts.num_experts).permute(2, 1, 0)
        for expert in range(experts.num_experts):
            slot, token = torch.where(chosen[expert])
            current = _expert(experts, expert, hidden[token]) * gates[token, slot, None]
            output.index_add_(0, token, current.to(hidden.dtype))
        return output
    return forward


def _expert(experts: Any, expert: int, hidden: Tensor) -> Tensor:
    gate, up = experts.gate_up_proj[expert].chunk(2)
    return F.linear(F.silu(F.linear(hidden, gate)) * F.linear(hidden, up), experts.down_proj[expert])


def _average_probabilities(model: Any, router: Any, prompts: Sequence[Sequence[int]], pad: int) -> Tensor:
    sums, tokens = torch.zeros(router.num_experts), 0

    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        logits = output[0]
        parts = logits.split([router.num_experts - router.num_shared, router.num_shared], dim=-1)
        probabilities = torch.cat([part.softmax(-1) for part in parts], dim=-1)
        sums.add_(probabilities[mask.flatten().bool()].sum(0))
        raise _Reached

    handle = router.register_forward_hook(hook)
    with torch.no_grad():
        for ids, mask in _batches(prompts, pad):
            try:
                model(input_ids=ids, attention_mask=mask, use_cache=False)
            except _Reached:
                tokens += int(mask.sum())
    handle.remove()
    return sums / tokens


def _batches(prompts: Sequence[Sequence[int]], pad: int) -> list[tuple[Tensor, Tensor]]:
    found = []
    for start in range(0, len(prompts), BATCH):
        part = prompts[start:start + BATCH]
        width = max(map(len, part))
        ids = torch.tensor([[*ids, *[pad] * (width - len(ids))] for ids in part])
        mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids in part])
        found.append((ids, mask))
    return found


def _prune(block: Any, kept: list[int]) -> None:
    block.gate.weight = nn.Parameter(block.gate.weight[kept], requires_grad=False)
    block.gate.num_experts = len(kept)
    block.gate.top_k = min(block.gate.top_k, len(kept))
    for name in ("gate_up_proj", "down_proj"):
        setattr(block.experts, name, nn.Parameter(getattr(block.experts, name)[kept], requires_grad=False))
    block.experts.num_experts = len(kept)
