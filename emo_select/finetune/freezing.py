"""Which tensors train: the published freeze modes, by layer, for every family of the table.

Fused expert parameters hold routed and shared experts in one tensor, so a mode that trains only the routed ones
keeps the gradient of the shared rows at zero and puts the rows back after each step.

Shapes: E experts of a layer, the shared ones last.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from emo_select.errors import UsageError
from emo_select.models.families import Family, experts_per_layer, family_of, is_moe, shared_per_layer

if TYPE_CHECKING:
    import torch
    from torch import nn

Kind = Literal["routed", "shared", "router", "other"]

TRAINED: Mapping[str, frozenset[Kind]] = {
    "none": frozenset({"routed", "shared", "router", "other"}),
    "routed": frozenset({"routed"}),
    "routed_shared": frozenset({"routed", "shared"}),
    "routed_shared_router": frozenset({"routed", "shared", "router"}),
}
"""What trains in each freeze mode; the mode names what does, `none` freezes nothing."""


def require_experts(config: Mapping[str, Any], mode: str) -> None:
    """Raise `UsageError` for a freeze mode other than none on a dense model: nothing would train."""
    if mode != "none" and not is_moe(config):
        raise UsageError(f"Freeze mode {mode!r} trains experts, and this model has none; use --freeze none.")


def trained_tensors(config: Mapping[str, Any], names: Sequence[str], mode: str) -> list[str]:
    """Those of the tensors on disk that train in `mode`, by each layer's own expert counts."""
    require_experts(config, mode)
    if mode == "none":
        return list(names)
    family, routed = family_of(config), routed_per_layer(config)
    return [name for name in names if _disk_kind(family, routed, name) in TRAINED[mode]]


def routed_per_layer(config: Mapping[str, Any]) -> list[int]:
    """Routed experts of each layer; in a fused parameter the shared ones follow them. 0 for dense layers."""
    return [
        count - shared for count, shared in zip(experts_per_layer(config), shared_per_layer(config), strict=True)
    ]


def _disk_kind(family: Family, routed: Sequence[int], name: str) -> Kind:
    role = family.role(name)
    if role.kind == "expert" and role.layer is not None and role.expert is not None:
        return "routed" if role.expert < routed[role.layer] else "shared"
    return "routed" if role.suffix in family.expert_names else memory_kind(family, family.in_memory(name))


def memory_kind(family: Family, name: str) -> Kind:
    """What a parameter in memory belongs to; fused experts are "routed" though shared rows may follow."""
    found = family.in_layer(name)
    rest = found[1] if found else ""
    if rest in {fused.parameter for fused in family.experts}:
        return "routed"
    if any(rest.startswith(module + ".") for module in family.separate_shared):
        return "shared"
    if rest in family.router_rows or rest.startswith(f"{family.router_module}."):
        return "router"
    return "other"


@dataclass(frozen=True)
class FrozenPart:
    """The experts from `start` on within one parameter: never to move.

    Experts are its rows or, where `experts` is set, the fastest index of its columns (adapters of fused experts).
    """

    name: str
    start: int
    experts: int | None = None


def freeze(model: nn.Module, config: Mapping[str, Any], mode: str) -> list[FrozenPart]:
    """Set `requires_grad` for `mode` and return the rows that must not move inside parameters that train."""
    require_experts(config, mode)
    if mode == "none":
        return []
    family, routed, experts = family_of(config), routed_per_layer(config), experts_per_layer(config)
    held = []
    for name, parameter in model.named_parameters():
        kind = memory_kind(family, name)
        parameter.requires_grad_(kind in TRAINED[mode])
        place = family.in_layer(name)
        if kind == "routed" and place and mode == "routed" and routed[place[0]] < experts[place[0]]:
            held.append(FrozenPart(name, routed[place[0]]))
    return held


def routed_parameters(model: nn.Module, config: Mapping[str, Any]) -> list[str]:
    """Names of the fused routed experts that train."""
    if not is_moe(config):
        return []
    family = family_of(config)
    trained = (name for name, parameter in model.named_parameters() if parameter.requires_grad)
    return [name for name in trained if memory_kind(family, name) == "routed"]


class Holder:
    """Keeps frozen parts still: gradients zeroed before the clip, values put back after the optimiser's step.

    Works on plain parameters and on the row-sharded ones of FSDP2; make it after the model is wrapped.
    """

    def __init__(self, model: nn.Module, parts: Sequence[FrozenPart]) -> None:
        parameters = dict(model.named_parameters())
        self._held = [(parameters[part.name], part) for part in parts]
        self._values = [_view(parameter.detach(), part).clone() for parameter, part in self._held]

    def clear_gradients(self) -> None:
        """Zero the gradient of the held parts."""
        for parameter, part in self._held:
            if parameter.grad is not None:
                _view(parameter.grad, part).zero_()

    def restore(self) -> None:
        """Undo what the step did to the held parts (weight decay moves even what has no gradient)."""
        for (parameter, part), value in zip(self._held, self._values, strict=True):
            _view(parameter.detach(), part).copy_(value)


def _view(tensor: torch.Tensor, part: FrozenPart) -> torch.Tensor:
    """The held part as far as it lies on this process, as a view."""
    from torch.distributed.tensor import DTensor

    local, offset = (tensor.to_local(), _first_row(tensor)) if isinstance(tensor, DTensor) else (tensor, 0)
    if part.experts is not None:
        return local.view(local.shape[0], -1, part.experts)[..., part.start :]
    return local[min(max(part.start - offset, 0), len(local)) :]


def _first_row(tensor: Any) -> int:
    """Global index of this process's first row."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return int(offset[0])
