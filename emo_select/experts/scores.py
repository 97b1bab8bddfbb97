"""Statistics of expert use, from which every one-pass method ranks the experts.

Sums over tokens are kept, not means, per group of examples: any subset of the groups can be scored later, and sums of
several processes can be added. G groups, E experts of a layer; padding never counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emo_select.errors import CheckpointError, NumericError, SpecError, UnknownNameError
from emo_select.ownership import require_own_files
from emo_select.record import STATISTICS
from emo_select.storage import json_bytes, read_json, write_output

TENSORS, RECORD = "scores.safetensors", "scores.json"

SUMS: Mapping[str, str] = {
    "probability": "router probability over all tokens",
    "count": "tokens routed to the expert",
    "gate": "routing weight over the tokens routed to the expert",
    "easy_ep": "router probability × output norm × (1 − cos(h, h + MoE(h))) over those tokens",
    "norm": "L2 norm of the expert's output over those tokens",
    "reap": "routing weight × output norm over those tokens",
    "reap_renormalised": "routing weight, divided by their sum over the token's top-k, × output norm over those tokens",
}
NEEDS_EXPERTS = frozenset({"easy_ep", "norm", "reap", "reap_renormalised"})


@dataclass(frozen=True)
class Criterion:
    """A score per expert, computed from sums (E,) and the number of tokens they run over."""

    sums: tuple[str, ...]
    formula: Callable[[Mapping[str, Tensor], float], Tensor]

    @property
    def needs_experts(self) -> bool:
        """Whether expert outputs are needed, or the router suffices."""
        return not NEEDS_EXPERTS.isdisjoint(self.sums)


def _per_use(total: Tensor, count: Tensor) -> Tensor:
    return torch.where(count > 0, total / count.clamp(min=1), 0.0)


# router_probability: EMO, arXiv 2605.06663, selection appendix. easy_ep: arXiv 2504.06792, eq. for output-aware
# importance, accumulated in fp64. reap: arXiv 2510.13999, with the gate that the model applies. frequency, gate_mass,
# ean: the usual baselines there.
CRITERIA: Mapping[str, Criterion] = {
    "router_probability": Criterion(("probability",), lambda s, tokens: s["probability"] / max(tokens, 1)),
    "frequency": Criterion(("count",), lambda s, tokens: s["count"] / max(tokens, 1)),
    "gate_mass": Criterion(("gate",), lambda s, tokens: s["gate"] / max(tokens, 1)),
    "easy_ep": Criterion(("easy_ep",), lambda s, tokens: s["easy_ep"]),
    "ean": Criterion(("norm", "count"), lambda s, tokens: _per_use(s["norm"], s["count"])),
    "reap": Criterion(("reap", "count"), lambda s, tokens: _per_use(s["reap"], s["count"])),
    "reap_renormalised": Criterion(
        ("reap_renormalised", "count"), lambda s, tokens: _per_use(s["reap_renormalised"], s["count"])),
}


def criterion(name: str) -> Criterion:
    """The criterion of that name; UnknownNameError with near matches."""
    if name not in CRITERIA:
        raise UnknownNameError("score", name, CRITERIA)
    return CRITERIA[name]


Part = tuple[str, int, Tensor]
"""Name of a sum, group, and (E,) in fp64: what one batch adds to it."""


class LayerSums:
    """Sums (G, E) in fp64 of one MoE layer."""

    def __init__(self, groups: int, experts: int, names: Iterable[str] = SUMS,
                 device: torch.device | str = "cpu") -> None:
        self.values = {name: torch.zeros(groups, experts, dtype=torch.float64, device=device) for name in names}

    @property
    def experts(self) -> int:
        """E."""
        return next(iter(self.values.values())).shape[1]

    def add(self, parts: Iterable[Part]) -> None:
        """Add what `Recorder` found in a batch."""
        for name, group, sums in parts:
            self.values[name][group] += sums

    def check(self, layer: int) -> None:
        """Raise `NumericError` naming layer and expert of the first sum that is not finite."""
        for name, values in self.values.items():
            bad = torch.nonzero(~torch.isfinite(values))
            if len(bad):
                raise NumericError(f"The {name} statistic of layer {layer}, expert {int(bad[0, 1])} is not a finite "
                                   f"number; the weights or the activations below contain NaN or infinity.")


@dataclass
class Scores:
    """Statistics of a model on a calibration set.

    Attributes:
        layers: sums per layer, None for dense layers.
        groups: names of the example groups, the first axis of every sum.
        tokens, examples: how many each group has.
        record: what it was computed from (model fingerprint, dtype, …), kept beside the numbers.
    """

    layers: list[LayerSums | None]
    groups: list[str]
    tokens: list[int]
    examples: list[int]
    record: dict[str, Any] = field(default_factory=dict)

    def score(self, name: str, weights: Mapping[str, float] | None = None,
              groups: Iterable[str] | None = None) -> list[list[float] | None]:
        """The criterion `name` for each layer, E values (None for dense layers).

        `groups` restricts it to some example groups. `weights` mixes tasks: each task's scores are divided by their
        sum over the layer's experts, multiplied by its weight and added. A group `task/part` belongs to `task`.
        """
        chosen = range(len(self.groups)) if groups is None else [self._index(group) for group in groups]
        return [None if layer is None else layer_score(layer, self.tokens, name, self._mixture(chosen, weights))
                for layer in self.layers]

    def _index(self, group: str) -> int:
        if group not in self.groups:
            raise UnknownNameError("example group", group, self.groups)
        return self.groups.index(group)

    def _mixture(self, chosen: Sequence[int], weights: Mapping[str, float] | None) -> list[tuple[float, list[int]]]:
        return mixture([self.groups[i] for i in chosen], weights, list(chosen))

    def save(self, folder: Path) -> None:
        """Write `scores.safetensors` (fp64) and `scores.json`, each by rename.

        Raises `OwnershipError`, before either is written, where one is there that is not ours, or was changed.
        """
        from safetensors.torch import save

        tensors = {f"layers.{i}.{name}": values.cpu().contiguous()
                   for i, layer in enumerate(self.layers) if layer for name, values in layer.values.items()}
        require_own_files(folder / TENSORS, folder / RECORD)
        write_output(folder / TENSORS, save(tensors))
        experts = [layer.experts if layer else 0 for layer in self.layers]
        write_output(folder / RECORD, json_bytes({
            "format": STATISTICS, "groups": self.groups, "tokens": self.tokens, "examples": self.examples,
            "experts_per_layer": experts, "sums": dict(SUMS), **self.record}))

    @classmethod
    def load(cls, folder: Path) -> Scores:
        """Read what `save` wrote; CheckpointError if it is missing or damaged."""
        from safetensors import SafetensorError
        from safetensors.torch import load

        record = read_json(folder / RECORD)
        try:
            tensors = load((folder / TENSORS).read_bytes())
            counts, groups = record.pop("experts_per_layer"), record.pop("groups")
            layers = [_layer(tensors, i, len(groups), count) for i, count in enumerate(counts)]
            tokens, examples = record.pop("tokens"), record.pop("examples")
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise CheckpointError(f"The statistics in {folder} cannot be read ({error}); delete the folder and run "
                                  "`emo-select activations` again.") from None
        return cls(layers, groups, tokens, examples, {k: v for k, v in record.items() if k not in ("format", "sums")})


def mixture(groups: Sequence[str], weights: Mapping[str, float] | None, index: Sequence[int] | None = None
            ) -> list[tuple[float, list[int]]]:
    """(weight, group indices) of each task; without weights all groups form one task.

    Raises:
        SpecError: a weight that is not positive, or whose task has no examples.
    """
    index = range(len(groups)) if index is None else index
    if weights is None:
        return [(1.0, list(index))]
    parts = []
    for task, weight in weights.items():
        members = [i for i, group in zip(index, groups, strict=True) if group == task or group.startswith(f"{task}/")]
        if weight <= 0 or not members:
            raise SpecError(f"The weight {weight:g} of {task!r} needs a positive number and a task with examples.")
        parts.append((weight, members))
    return parts


def layer_score(sums: LayerSums, tokens: Sequence[int], name: str,
                parts: Sequence[tuple[float, Sequence[int]]]) -> list[float]:
    """The criterion `name` of one layer over `parts`, (weight, group indices) per task; see `Scores.score`."""
    rule = criterion(name)
    total = torch.zeros(sums.experts, dtype=torch.float64)
    for weight, members in parts:
        chosen = {s: sums.values[s][list(members)].sum(dim=0).cpu() for s in rule.sums}
        score = rule.formula(chosen, sum(tokens[i] for i in members))
        total += score if len(parts) == 1 else weight * score / score.sum().clamp(min=1e-300)
    return total.tolist()


def _layer(tensors: Mapping[str, Tensor], layer: int, groups: int, experts: int) -> LayerSums | None:
    if not experts:
        return None
    sums = LayerSums(groups, experts, ())
    sums.values = {name: tensors[f"layers.{layer}.{name}"] for name in SUMS}
    if any(values.shape != (groups, experts) for values in sums.values.values()):
        raise ValueError(f"layer {layer} has another shape than scores.json says")
    return sums
