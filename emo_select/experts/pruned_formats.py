"""What pruning does to stored tensors that are no plain weights: scales, packed numbers, lists of module names.

An expert that is several stored tensors goes or stays with all of them. Tensors that hold all experts are sliced in
every part that has one row per expert; a part that serves all experts alike (one scale for the whole tensor) stays.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from emo_select.checkpoint import Checkpoint
from emo_select.checkpoint.quantised import SETTINGS, Quantised, without_quantization
from emo_select.errors import CheckpointError, ModelError
from emo_select.models.families import Family, Role, experts_per_layer, layer_names

NewIndex = Sequence[Mapping[int, int]]  # layer → expert → its number in the pruned checkpoint


def renumbered(name: str, role: Role, expert: int) -> str:
    """The name of an expert's tensor once that expert has another number."""
    before = role.prefix + role.suffix.partition("{e}")[0]
    return f"{before}{expert}{name.removeprefix(f'{before}{role.expert}')}"


def serves_all_experts(weight: Quantised | None, name: str, shape: tuple[int, ...]) -> bool:
    """Whether a stored part of a weight that holds all experts has no rows of single experts, and stays as it is.

    Raises `ModelError` where one of its entries serves several experts, but not all.
    """
    if weight is None or (shape and shape[0] == weight.shape[0] and not name.endswith("weight_shape")):
        return False
    if math.prod(shape) == 1:
        return True
    raise ModelError(f"{name} has shape {list(shape)}: experts share its entries, so that none can be taken out of "
                     f"{weight.name}; prune with --dequantize.")


def check_unread(checkpoint: Checkpoint, family: Family) -> None:
    """A checkpoint whose numbers are not read: pruning it needs every router as it is, and every expert by its number.

    Raises:
        ModelError: experts or routers are stored in a way that cannot be taken apart. CheckpointError: one is missing.
    """
    method, names = checkpoint.formats.method, layer_names(checkpoint)
    whole = {*family.router, *(fused.parts[0] for fused in family.experts if not fused.per_expert)}
    for layer, count in enumerate(experts_per_layer(checkpoint.config)):
        if not count:
            continue
        roles = [family.role(name) for name in names.get(layer, ())]
        if lacking := whole - {role.suffix for role in roles}:
            raise ModelError(f"{min(lacking)} of layer {layer} is quantised by {method}, and which bytes of it "
                             "belong to which expert is not known; prune the bfloat16 original.")
        present = {role.expert for role in roles if role.expert is not None}
        if family.expert_parts and present != set(range(count)):
            raise CheckpointError(f"Layer {layer} of {checkpoint.directory} has {len(present)} experts, but its "
                                  f"config.json counts {count}.")


def pruned_quantization(checkpoint: Checkpoint, config: dict[str, Any], family: Family, new_index: NewIndex
                        ) -> dict[str, Any]:
    """`config` with quantization_config as the pruned tensors need it: modules renamed, or none where none is left."""
    if not (checkpoint.formats.weights or checkpoint.formats.unread):
        return without_quantization(config)
    changed = {key: _renamed(value, family, new_index) if key in SETTINGS else value for key, value in config.items()}
    if isinstance(config.get("text_config"), dict):
        changed["text_config"] = pruned_quantization(checkpoint, config["text_config"], family, new_index)
    return changed


def _renamed(value: Any, family: Family, new_index: NewIndex) -> Any:
    """The settings with the modules of kept experts under their new numbers and those of dropped ones left out."""
    if isinstance(value, dict):
        renamed = {_module(key, family, new_index): _renamed(one, family, new_index) for key, one in value.items()}
        return {key: one for key, one in renamed.items() if key is not None}
    if isinstance(value, list):
        return [one for one in (_renamed(one, family, new_index) for one in value) if one is not None]
    return _module(value, family, new_index) if isinstance(value, str) else value


def _module(name: str, family: Family, new_index: NewIndex) -> str | None:
    role = family.role(f"{name}.weight")
    if role.kind != "expert" or role.layer is None or role.expert is None or role.layer >= len(new_index):
        return name
    new = new_index[role.layer].get(role.expert)
    return None if new is None else renumbered(name, role, new)
