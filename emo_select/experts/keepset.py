"""Which experts stay: the value that selection produces and pruning consumes, and the files it is stored in.

Legend: L layer, E experts of a layer, K kept ones; indices are those of the unpruned model, ascending, so that
routed experts come before shared ones, as in the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from pydantic import ValidationError, model_validator

from emo_select.errors import CheckpointError, KeepKError
from emo_select.models.families import (
    always_active_per_layer,
    experts_per_layer,
    family_of,
    groups_per_token,
    num_groups,
    shared_per_layer,
    top_k,
)
from emo_select.spec import Frozen
from emo_select.storage import json_bytes, read_json, write_output

PUBLISHED_METHODS = {"layerwise": "greedy_layerwise", "variable": "greedy_layerwise_variable"}


class KeepSet(Frozen):
    """The experts kept per layer and how they were chosen."""

    experts: tuple[tuple[int, ...] | None, ...]
    """Kept indices per layer, ascending; None for dense layers."""
    method: str
    """As in the run's name: layerwise, easy_ep, random, …"""
    keep_k: int
    """Experts asked for per layer, shared ones included; a layer that has fewer keeps all of its own."""
    schedule: tuple[int, ...] | None = None
    """For method "variable" only: the number asked for in each layer (`keep_k` is then the smallest)."""
    num_shared: int = 0
    """How many of them are listed shared experts (the most that any layer keeps)."""
    score: str | None = None
    """Criterion that ranked them; None for random."""
    scores: tuple[tuple[float, ...] | None, ...] | None = None
    """Per layer, one number per expert of the unpruned layer; None where there is none."""
    model: str | None = None
    """Source the indices refer to, as given by the user."""
    fingerprint: str | None = None
    """`Checkpoint.forward_fingerprint` of that source."""
    task: str | None = None
    split: str | None = None
    num_shots: int | None = None
    num_examples: int | None = None
    seed: int = 0

    @model_validator(mode="after")
    def _ascending(self) -> KeepSet:
        for layer, kept in enumerate(self.experts):
            if kept is not None and (not kept or kept[0] < 0 or any(a >= b for a, b in pairwise(kept))):
                raise ValueError(f"experts of layer {layer} are not an ascending list of indices")
        return self

    @property
    def uniform(self) -> bool:
        """Whether all MoE layers keep the same number of experts."""
        return len({len(kept) for kept in self.experts if kept is not None}) <= 1

    def save(self, path: Path) -> None:
        """Write selection.json; raises `OwnershipError` where a file is there that is not ours, or was changed."""
        write_output(path, self.as_bytes())

    def as_bytes(self) -> bytes:
        """What `save` writes."""
        return json_bytes(self.model_dump(mode="json"))

    @classmethod
    def load(cls, path: Path) -> KeepSet:
        """Read selection.json; CheckpointError if it is missing or not one."""
        data = read_json(path)
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "content"
            raise CheckpointError(f"{path} is not a selection ({where}: {first['msg']}); select again.") from None


def keep_everything(config: Mapping[str, Any], method: str = "layerwise") -> KeepSet:
    """The keep set that drops nothing."""
    counts = experts_per_layer(config)
    return KeepSet(experts=tuple(tuple(range(count)) if count else None for count in counts), method=method,
                   keep_k=max(counts), num_shared=max(shared_per_layer(config)))


def shared_kept(config: Mapping[str, Any], keep_set: KeepSet) -> list[int]:
    """How many listed shared experts each layer keeps."""
    bounds = zip(keep_set.experts, experts_per_layer(config), shared_per_layer(config), strict=True)
    return [sum(e >= count - shared for e in kept or ()) for kept, count, shared in bounds]


def pruned_top_k(config: Mapping[str, Any], kept: int) -> int:
    """Experts per token of a model whose smallest layer keeps `kept` experts: top-k shrinks when it must."""
    groups = num_groups(config)
    reachable = kept if groups == 1 else kept // groups * groups_per_token(config)
    return min(top_k(config), reachable)


def check_keep_k(config: Mapping[str, Any], keep_k: int, num_shared: int | None = None) -> str | None:
    """Whether `keep_k` experts per layer (`num_shared` of them shared; None: all) can be kept, from the config alone.

    Returns:
        A notice for the user when top-k shrinks, else None.

    Raises:
        ModelError: not a supported MoE. KeepKError: more than there are, no room for a routed one, unequal groups.
    """
    counts, shared = experts_per_layer(config), max(shared_per_layer(config))
    staying = shared if num_shared is None else num_shared
    active = max(map(len, always_active_per_layer(config)))
    if keep_k > max(counts):
        raise KeepKError(f"Cannot keep {keep_k} experts per layer: the model has {max(counts)}; choose "
                         f"{max(staying, active) + 1} to {max(counts)}.")
    if staying > shared:
        raise KeepKError(f"Cannot keep {staying} shared experts: the model has {shared}.")
    if keep_k <= staying:
        raise KeepKError(f"keep-k {keep_k} leaves no routed expert, because it counts the {staying} shared; choose at "
                         f"least {staying + 1}.")
    if keep_k <= active:
        raise KeepKError(f"keep-k {keep_k} leaves no routed expert, because {active} are always active; choose at "
                         f"least {active + 1}.")
    _check_groups(config, keep_k)
    return top_k_notice(config, [keep_k])


def top_k_notice(config: Mapping[str, Any], kept: Sequence[int]) -> str | None:
    """What to tell a user who keeps `kept` experts (per layer, or once for all) where that lowers top-k, else None.

    One number of experts per token holds for all layers, so the smallest layer decides.
    """
    smallest = min((count for count in kept if count), default=0)
    shrunk = pruned_top_k(config, smallest) if smallest else top_k(config)
    if shrunk >= top_k(config):
        return None
    if len(set(kept) - {0}) == 1:
        return (f"With {smallest} experts per layer the model uses {shrunk} experts per token instead of "
                f"{top_k(config)}.")
    return (f"Layer {list(kept).index(smallest)} keeps {smallest} experts, fewer than the {top_k(config)} that a token "
            f"uses, so the pruned model uses {shrunk} per token in every layer.")


def _check_groups(config: Mapping[str, Any], keep_k: int) -> None:
    groups = num_groups(config)
    if groups > 1 and keep_k % groups:
        raise KeepKError(f"The router picks among {groups} equal groups of experts, so keep-k must be a multiple of "
                         f"{groups}, not {keep_k}.")
    if groups > 1 and family_of(config).scoring != "softmax" and keep_k < 2 * groups:
        raise KeepKError(f"The router ranks each group by its two best experts, so keep-k must be at least "
                         f"{2 * groups}.")


def check_keep_set(config: Mapping[str, Any], keep_set: KeepSet) -> None:
    """Compare a keep set with the model it is to be applied to.

    Raises:
        KeepKError: another number of layers, an index out of range, unequal groups, a missing always-active expert.
    """
    counts = experts_per_layer(config)
    if len(counts) != len(keep_set.experts):
        raise KeepKError(f"The selection has {len(keep_set.experts)} layers, the model {len(counts)}; select again for "
                         "this model.")
    for layer, (kept, count) in enumerate(zip(keep_set.experts, counts, strict=True)):
        if (kept is None) != (count == 0) or (kept and kept[-1] >= count):
            raise KeepKError(f"The selection does not fit layer {layer}, which has {count} experts; select again for "
                             "this model.")
    for layer, active in enumerate(always_active_per_layer(config)):
        if lost := set(active) - set(keep_set.experts[layer] or ()):
            raise KeepKError(f"The selection drops expert {min(lost)} of layer {layer}, which is always active.")
    for layer, kept in enumerate(keep_set.experts):
        _check_equal_groups(config, layer, kept or ())


def _check_equal_groups(config: Mapping[str, Any], layer: int, kept: Sequence[int]) -> None:
    groups = num_groups(config)
    if groups == 1 or not kept:
        return
    size = experts_per_layer(config)[layer] // groups
    sizes = {sum(e // size == group for e in kept) for group in range(groups)}
    if len(sizes) > 1:
        raise KeepKError(f"The selection keeps different numbers of experts of the {groups} groups in layer {layer}.")


def expert_mask(config: Mapping[str, Any], keep_set: KeepSet) -> list[list[int]]:
    """Per layer, 1 for each kept and 0 for each dropped expert of the unpruned model, nothing for dense layers.

    What engines take that run the unpruned model and skip experts.
    """
    return [[int(e in set(kept or ())) for e in range(count)]
            for kept, count in zip(keep_set.experts, experts_per_layer(config), strict=True)]


def pruning_metadata(keep_set: KeepSet) -> dict[str, Any]:
    """Content of pruning_metadata.json, keys and order as published (they differ by method)."""
    method = PUBLISHED_METHODS.get(keep_set.method, keep_set.method)
    head: dict[str, Any] = {"original_model": keep_set.model, "prune_keep_k": keep_set.keep_k,
                            "num_shared_experts": keep_set.num_shared, "pruning_method": method}
    tail = {"experts_kept_per_layer": [None if kept is None else list(kept) for kept in keep_set.experts]}
    if keep_set.method == "random":
        return {**head, "seed": keep_set.seed, **tail}
    if keep_set.schedule is not None:
        head = {"original_model": keep_set.model, "keep_k_per_layer": list(keep_set.schedule), **head}
        del head["prune_keep_k"]
    calibration = {"task": keep_set.task, "split": keep_set.split, "num_shots_override": keep_set.num_shots,
                   "num_calibration": keep_set.num_examples, "prune_seed": keep_set.seed}
    if keep_set.schedule is not None:
        del calibration["num_shots_override"]
    return {**head, **calibration, **tail}
