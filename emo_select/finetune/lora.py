"""Low-rank adapters on attention, dense parts and the fused routed experts, by peft.

Which modules those are is read from the checkpoint's headers and the family's row, before a model is built.
Adapters of fused experts: `lora_A` is (E·r, in) and `lora_B` (out, r·E) with the expert as the faster index, so the
shared experts' part of `lora_B`, which starts at zero, is held there unless they are to be adapted.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emo_select.errors import SpecError, UnknownNameError
from emo_select.finetune.freezing import FrozenPart, routed_per_layer
from emo_select.models.adapters import quiet_peft
from emo_select.models.families import Family, experts_per_layer, family_of, is_moe

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from emo_select.checkpoint import Checkpoint
    from emo_select.spec import Lora

GROUPS = ("attention", "dense", "experts")


@dataclass(frozen=True)
class Targets:
    """What peft is told: linear modules and bare parameters, by the ends of their names."""

    modules: tuple[str, ...]
    parameters: tuple[str, ...]


def lora_targets(checkpoint: Checkpoint, lora: Lora) -> Targets:
    """Resolve group names and module names against the checkpoint.

    Raises `UnknownNameError` for a module that the model does not have and `SpecError` for settings that peft cannot
    combine.
    """
    family = family_of(checkpoint.config) if is_moe(checkpoint.config) else None
    linear = _linear_modules(checkpoint, family)
    chosen: set[str] = set()
    for target in lora.targets:
        found = {name for name, group in linear.items() if target in (group, name, name.rpartition(".")[2])}
        if not found and target not in GROUPS:
            raise UnknownNameError("LoRA target", target, [*GROUPS, *linear, *(n.rpartition(".")[2] for n in linear)])
        chosen |= found
    chosen |= {name for name, group in linear.items() if lora.shared and group == "shared"}
    parameters = _bare_parameters(family, lora)
    if parameters and lora.dropout:
        raise SpecError("peft has no dropout on adapters of fused experts or routers; set the LoRA dropout to 0.")
    if not chosen and not parameters:
        raise SpecError(f"The LoRA targets {', '.join(lora.targets)} match nothing in this model; choose others.")
    return Targets(tuple(sorted(chosen)), parameters)


def _linear_modules(checkpoint: Checkpoint, family: Family | None) -> dict[str, str]:
    """Layer-relative in-memory names of matrices outside router and routed experts, with their group."""
    found = {}
    for name, info in checkpoint.tensors.items():
        own = _own_name(name, family)
        if own and own.endswith(".weight") and len(info.shape) == 2:
            module = own.removesuffix(".weight")
            found[module] = _group(module, family)
    return found


def _own_name(name: str, family: Family | None) -> str | None:
    """The layer-relative in-memory name of a stored tensor that experts have no part in; None of others."""
    if family is None:
        matched = re.fullmatch(r"model\.layers\.\d+\.(.+)", name)
        return matched[1] if matched else None
    role = family.role(name)
    place = family.in_layer(family.in_memory(name)) if role.kind == "other" and role.layer is not None else None
    return place[1] if place else None


def _group(module: str, family: Family | None) -> str:
    if "attn" in module.split(".")[0] or "attention" in module.split(".")[0]:
        return "attention"
    shared = family is not None and any(module.startswith(prefix + ".") for prefix in family.separate_shared)
    return "shared" if shared else "dense"


def _bare_parameters(family: Family | None, lora: Lora) -> tuple[str, ...]:
    if family is None:
        return ()
    experts = tuple(fused.parameter for fused in family.experts) if "experts" in lora.targets else ()
    routers = tuple(name for name in family.router_rows if name.endswith("weight")) if lora.router else ()
    return experts + routers


def add_adapters(model: PreTrainedModel, targets: Targets, lora: Lora) -> PeftModel:
    """Wrap the model; only adapters train. They are float32 whatever the weights are."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(targets.modules),
        target_parameters=list(targets.parameters),
        task_type="CAUSAL_LM",
    )
    with quiet_peft():
        return get_peft_model(model, config)


def held_adapters(model: PeftModel, config: dict[str, Any], lora: Lora) -> list[FrozenPart]:
    """The shared experts' part of the adapters of fused experts, unless shared experts are adapted."""
    if lora.shared or not is_moe(config):
        return []
    module = family_of(config).experts_module
    routed, experts = routed_per_layer(config), experts_per_layer(config)
    held = []
    for name in expert_adapters(model, module):
        layer = int(name.partition("layers.")[2].partition(".")[0])
        if routed[layer] < experts[layer]:
            held.append(FrozenPart(name, routed[layer], experts=experts[layer]))
    return held


def expert_adapters(model: PeftModel, module: str) -> list[str]:
    """Names of the `lora_B` matrices of fused experts: the ones whose gradient is not zero from the start."""
    return [name for name, _ in model.named_parameters() if f".{module}." in name and ".lora_B." in name]


def save_adapter(model: PeftModel, tensors: dict[str, Any], folder: Path, base: str) -> None:
    """Write the adapter in peft's layout; `base` is the path from it to its model, which moves along with it."""
    model.peft_config["default"].base_model_name_or_path = base
    model.save_pretrained(str(folder), state_dict=tensors, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # peft's blank model card
