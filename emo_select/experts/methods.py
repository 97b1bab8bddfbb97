"""Keep sets that need no pass through the model: from stored statistics, or at random."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from emo_select.errors import CheckpointError, UnknownNameError
from emo_select.experts.keepset import KeepSet
from emo_select.experts.rules import KeepK, LayerRules, choose, layer_rules, resolve_keep_k

if TYPE_CHECKING:
    from emo_select.experts.scores import Scores

# method of a run → criterion it ranks by
ONE_PASS: Mapping[str, str] = {"easy_ep": "easy_ep", "global": "router_probability", "frequency": "frequency",
                               "gate_mass": "gate_mass", "ean": "ean", "reap": "reap",
                               "reap_renormalised": "reap_renormalised"}


def select_from_scores(scores: Scores, method: str, keep_k: KeepK, config: Mapping[str, Any], *,
                       num_shared: int | None = None, weights: Mapping[str, float] | None = None,
                       groups: Iterable[str] | None = None, about: Mapping[str, Any] | None = None) -> KeepSet:
    """Keep the experts with the highest score of the unpruned model, layer by layer.

    Args:
        scores: statistics from `collect_activations`.
        method: a key of `ONE_PASS`.
        keep_k: experts kept per layer, shared ones included; a number, or one per layer.
        config: config.json of the model that the statistics belong to.
        num_shared: shared experts kept per layer; None keeps all.
        weights, groups: see `Scores.score`.
        about: fields of `KeepSet` that say what it was made from.

    Raises:
        UnknownNameError: no such method. KeepKError: a keep-k that a layer cannot satisfy.
        CheckpointError: the statistics belong to a model of another shape.
    """
    if method not in ONE_PASS:
        raise UnknownNameError("one-pass method", method, ONE_PASS)
    rules, counts = layer_rules(config, num_shared), resolve_keep_k(config, keep_k, num_shared)
    if [layer.experts if layer else 0 for layer in scores.layers] != [rule.experts if rule else 0 for rule in rules]:
        raise CheckpointError("The statistics belong to a model with other layers or experts; run "
                              "`emo-select activations` for this one.")
    values = scores.score(ONE_PASS[method], weights, groups)
    kept = [None if rule is None or count is None or score is None else tuple(choose(score, count, rule))
            for rule, count, score in zip(rules, counts, values, strict=True)]
    stored = tuple(None if score is None else tuple(score) for score in values)
    return _keep_set(rules, kept, keep_k, {
        "method": method, "score": ONE_PASS[method], "scores": stored,
        "fingerprint": scores.record.get("model_fingerprint"), **(about or {})})


def select_random(config: Mapping[str, Any], keep_k: KeepK, seed: int = 0, *, num_shared: int | None = None,
                  about: Mapping[str, Any] | None = None) -> KeepSet:
    """Keep a seeded random choice of experts per layer: the published draw.

    One CPU generator serves all layers; each MoE layer draws a permutation of its routed experts and, if it has any,
    one of its shared experts, and keeps the first ones. Always-active experts take the place of drawn ones, and
    groups fill up in the order of the draw.

    Raises:
        KeepKError: a keep-k that a layer cannot satisfy.
    """
    import torch

    rules, counts = layer_rules(config, num_shared), resolve_keep_k(config, keep_k, num_shared)
    generator = torch.Generator().manual_seed(seed)
    kept: list[tuple[int, ...] | None] = []
    for rule, count in zip(rules, counts, strict=True):
        if rule is None or count is None:
            kept.append(None)
            continue
        drawn = torch.randperm(rule.routed, generator=generator).tolist()
        if rule.shared:
            drawn += [rule.routed + i for i in torch.randperm(rule.shared, generator=generator).tolist()]
        rank = {expert: -float(place) for place, expert in enumerate(drawn)}  # drawn first = highest
        kept.append(tuple(choose([rank[expert] for expert in range(rule.experts)], count, rule)))
    return _keep_set(rules, kept, keep_k, {"method": "random", "seed": seed, **(about or {})})


def _keep_set(rules: list[LayerRules | None], kept: list[tuple[int, ...] | None], keep_k: KeepK,
              fields: dict[str, Any]) -> KeepSet:
    if isinstance(keep_k, tuple):
        fields |= {"schedule": keep_k}
    return KeepSet(experts=tuple(kept), keep_k=keep_k if isinstance(keep_k, int) else min(keep_k),
                   num_shared=max(rule.keep_shared for rule in rules if rule), **fields)
