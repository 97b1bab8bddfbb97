"""Which experts of a layer may be chosen, and the one rule by which every method chooses them.

Scores come from anywhere; this module only ranks. It needs no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from emo_select.errors import KeepKError
from emo_select.experts.keepset import check_keep_k
from emo_select.models.families import (
    always_active_per_layer,
    experts_per_layer,
    num_groups,
    shared_per_layer,
)

KeepK = int | tuple[int, ...]
"""Experts kept per layer, shared ones included: one number, or one per layer (entries of dense layers are ignored)."""


@dataclass(frozen=True)
class LayerRules:
    """What a keep set of one MoE layer has to respect."""

    experts: int
    shared: int = 0
    """The last `shared` experts are shared: ranked among themselves, not against the routed ones."""
    keep_shared: int = 0
    always_active: tuple[int, ...] = ()
    """Experts that every token uses; they stay, and count towards keep-k."""
    groups: int = 1
    """Equal groups of routed experts; each keeps the same number."""

    @property
    def routed(self) -> int:
        """Experts that are not shared."""
        return self.experts - self.shared

    def fixed(self) -> set[int]:
        """Routed experts that are kept whatever their score."""
        return {expert for expert in self.always_active if expert < self.routed}


def layer_rules(config: Mapping[str, Any], num_shared: int | None = None) -> list[LayerRules | None]:
    """Rules of each layer, None for dense ones. `num_shared` limits the shared experts kept; None keeps all."""
    columns = (experts_per_layer(config), shared_per_layer(config), always_active_per_layer(config))
    groups = num_groups(config)
    return [
        LayerRules(experts, shared, shared if num_shared is None else min(num_shared, shared), tuple(active), groups)
        if experts else None
        for experts, shared, active in zip(*columns, strict=True)
    ]


def resolve_keep_k(config: Mapping[str, Any], keep_k: KeepK, num_shared: int | None = None) -> list[int | None]:
    """Experts to keep in each layer, None for dense layers.

    A uniform keep-k above the experts of a smaller layer keeps that whole layer; so does a schedule's entry.

    Raises:
        KeepKError: a number that a layer cannot satisfy.
    """
    rules = layer_rules(config, num_shared)
    if isinstance(keep_k, int):
        check_keep_k(config, keep_k, num_shared)
        keep_k = (keep_k,) * len(rules)
    if len(keep_k) != len(rules):
        raise KeepKError(f"The schedule has {len(keep_k)} entries for {len(rules)} layers; give one per layer.")
    kept = [min(k, rule.experts) if rule else None for k, rule in zip(keep_k, rules, strict=True)]
    for layer, (k, rule) in enumerate(zip(kept, rules, strict=True)):
        if k is not None and rule is not None:
            _check(k, rule, layer)
    return kept


def choose(scores: Sequence[float], keep: int, rules: LayerRules) -> list[int]:
    """Indices of the `keep` experts with the highest scores, ascending. Equal scores: the lowest index wins."""
    if keep >= rules.experts:
        return list(range(rules.experts))
    shared = _best(range(rules.routed, rules.experts), scores, rules.keep_shared)
    per_group = (keep - len(shared)) // rules.groups
    size = rules.routed // rules.groups
    kept: list[int] = []
    for first in range(0, rules.routed, size):
        fixed = sorted(rules.fixed() & set(range(first, first + size)))
        rest = [expert for expert in range(first, first + size) if expert not in fixed]
        kept += fixed + _best(rest, scores, per_group - len(fixed))
    return sorted(kept) + sorted(shared)


def full_set(rules: Sequence[LayerRules | None]) -> list[list[int] | None]:
    """The keep set that keeps everything."""
    return [list(range(rule.experts)) if rule else None for rule in rules]


def _best(candidates: Sequence[int], scores: Sequence[float], count: int) -> list[int]:
    return sorted(candidates, key=lambda expert: (-scores[expert], expert))[:count]


def _check(keep: int, rules: LayerRules, layer: int) -> None:
    if keep == rules.experts:
        return
    least = rules.keep_shared + max(1, len(rules.fixed()))
    if keep < least:
        always = "shared and always-active" if rules.fixed() else "shared"
        raise KeepKError(f"keep-k {keep} leaves no routed expert in layer {layer} beside its {always} experts; "
                         f"choose at least {least}.")
    if (keep - rules.keep_shared) % rules.groups:
        raise KeepKError(f"keep-k {keep} cannot be divided evenly among the {rules.groups} expert groups of layer "
                         f"{layer}; choose a multiple of {rules.groups}.")
