"""How tokens spread over experts while a model is finetuned: load and entropy, layer by layer.

Shapes: T tokens of a micro-batch, E experts of a layer (listed shared ones last), R routed, K routed per token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from emo_select.finetune.freezing import routed_per_layer
from emo_select.models.families import experts_per_layer, family_of, top_k

if TYPE_CHECKING:
    from torch import Tensor

MAX_SNAPSHOTS = 100  # kept over a training, evenly spaced: enough for a plot, small for any number of experts


class RoutingMeter:
    """Accumulates router logits over the micro-batches of a step, on the device, without waiting for it."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        layers = [(layer, count) for layer, count in enumerate(experts_per_layer(config)) if count]
        self.layers = [layer for layer, _ in layers]
        self._routed = [routed_per_layer(config)[layer] for layer in self.layers]
        self._drawn = [
            max(1, min(top_k(config), count) - (count - routed))
            for (_, count), routed in zip(layers, self._routed, strict=True)
        ]
        self._sigmoid = family_of(config).scoring == "sigmoid"
        self.snapshots: list[dict[str, Any]] = []
        self._sums: list[Tensor] = []  # counts (R,) per layer, entropy (layers,), tokens

    def add(self, router_logits: Sequence[Tensor], real: Tensor) -> None:
        """Count one micro-batch: logits (T, E) per MoE layer, `real` (T,) true where a token is no padding."""
        import torch

        with torch.no_grad():
            results = [self._of_layer(index, logits, real) for index, logits in enumerate(router_logits)]
            entropy = torch.stack([entropy for _, entropy in results])
            counts = [count for count, _ in results]
            added = [*counts, entropy, real.sum()]
            self._sums = [old + new for old, new in zip(self._sums, added, strict=True)] if self._sums else added

    def _of_layer(self, index: int, logits: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens per routed expert (R,), and the entropy of the routing probabilities summed over real tokens."""
        import torch

        scores = logits.detach()[:, : self._routed[index]].float()
        chosen = scores.topk(self._drawn[index], dim=-1).indices
        counts = torch.zeros(self._routed[index], device=scores.device)
        counts.index_add_(0, chosen.flatten(), real.float().repeat_interleave(chosen.shape[1]))
        if self._sigmoid:
            scores = scores.sigmoid()
            shares = scores / scores.sum(dim=-1, keepdim=True)
        else:
            shares = scores.softmax(dim=-1)
        return counts, (torch.special.entr(shares).sum(dim=-1) * real).sum()

    def drain(self, step: int, total: int) -> dict[str, float]:
        """Named numbers of what was added since the last call, over all processes; keeps a snapshot when one is due.

        A snapshot has `step`, `load` (per layer the share of its routed choices that went to each expert, sums to 1)
        and `entropy` (per layer the mean over tokens of the routing distribution's entropy, in nats).
        """
        if not self._sums:
            return {}
        _sum_over_processes(self._sums)
        *counts, entropies, tokens = self._sums
        self._sums = []
        load = [(count / count.sum().clamp(min=1)).tolist() for count in counts]
        entropy = (entropies / tokens.clamp(min=1)).tolist()
        if step == total or (step - 1) % max(1, -(-total // MAX_SNAPSHOTS)) == 0:
            self.snapshots.append({"step": step, "load": load, "entropy": entropy})
        named = {f"routing_entropy/layer_{layer}": entropy[at] for at, layer in enumerate(self.layers)}
        return named | {f"routing_max_load/layer_{layer}": max(load[at]) for at, layer in enumerate(self.layers)}


def _sum_over_processes(tensors: Sequence[Tensor]) -> None:
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        for tensor in tensors:
            dist.all_reduce(tensor)


def plot_routing(layers: Sequence[int], snapshots: Sequence[Mapping[str, Any]], path: Path) -> bool:
    """Draw entropy over steps and first-against-last expert load; False where matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(9, 2.2 + 0.5 * len(layers)), layout="constrained")
    FigureCanvasAgg(figure)
    entropy, load = figure.subplots(1, 2)
    steps = [snapshot["step"] for snapshot in snapshots]
    for at, layer in enumerate(layers):
        entropy.plot(steps, [snapshot["entropy"][at] for snapshot in snapshots], label=f"layer {layer}")
        final = np.sort(np.asarray(snapshots[-1]["load"][at]))[::-1]
        load.plot(np.arange(len(final)) + 1, final * len(final), label=f"layer {layer}")
    entropy.set(xlabel="step", ylabel="routing entropy (nats)", title="Entropy during finetuning")
    load.set(xlabel="experts, busiest first", ylabel="load (1 = even)", title=f"Expert load at step {steps[-1]}")
    load.axhline(1, color="grey", linewidth=0.8)
    load.legend(fontsize="x-small", ncols=2)
    figure.savefig(path, dpi=120)
    return True
