"""Selection by its definition: hooks on whole models in transformers, one prompt at a time, nothing streamed.

Layer after layer, the model runs with the layers below built and filled as the pruned checkpoint has them.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from emo_select.experts.keepset import KeepSet
from emo_select.experts.prune import pruned_config
from emo_select.experts.routers import Ear
from emo_select.experts.rules import choose, layer_rules
from emo_select.models.conversion import built_config
from emo_select.models.families import Family, family_of


class Hooked:
    """Router probabilities and REAP of every layer of a model in memory."""

    def __init__(self, model: Any, config: dict[str, Any], layers: Sequence[int]) -> None:
        self.family = family_of(config)
        counts = {layer: self.family.counts[layer] for layer in layers}
        self.probability = {layer: torch.zeros(count, dtype=torch.float64) for layer, count in counts.items()}
        self.reap = {layer: torch.zeros(count, dtype=torch.float64) for layer, count in counts.items()}
        self.used = {layer: torch.zeros(count, dtype=torch.float64) for layer, count in counts.items()}
        self.tokens, self._model = 0, model

    def run(self, prompts: Sequence[Sequence[int]]) -> Hooked:
        """Add up what these prompts show. The model is a copy of one's own: it stays hooked."""
        for layer in self.probability:
            self._attach(layer)
        with torch.no_grad():
            for prompt in prompts:
                self.tokens += len(prompt)
                self._model(torch.tensor([prompt]), use_cache=False)
        return self

    def _attach(self, number: int) -> None:
        layer = self._model.get_submodule(f"{self.family.layers}.{number}")
        experts = layer.get_submodule(self.family.experts_module)
        plain = experts.forward

        def scored(scores: Any) -> None:
            self.probability[number] += scores.probabilities.sum(0, dtype=torch.float64)

        def called(hidden: torch.Tensor, index: torch.Tensor, gates: torch.Tensor, *rest: Any) -> Any:
            flat, width = hidden.reshape(-1, hidden.shape[-1]), index.shape[-1]
            index, gates = index.reshape(-1, width), gates.reshape(-1, width)
            for expert in range(len(self.used[number])):
                token, slot = torch.where(index == expert)
                if len(token):
                    alone = torch.full((len(token), width), expert)
                    once = torch.zeros(len(token), width, dtype=gates.dtype)
                    once[:, 0] = 1
                    output = plain(flat[token], alone, once).reshape(len(token), -1)
                    self.used[number][expert] += len(token)
                    self.reap[number][expert] += (gates[token, slot] * output.norm(dim=-1)).sum(dtype=torch.float64)
            return plain(hidden, index, gates, *rest)

        Ear(layer.get_submodule(self.family.router_module), len(self.used[number]), scored)
        if not rest_of_call(experts):
            experts.forward = called


def rest_of_call(experts: Any) -> bool:
    """Whether the experts are called otherwise than with hidden states, index and gates (llama4)."""
    return experts.forward.__code__.co_argcount < 4 if hasattr(experts.forward, "__code__") else False


def cut(state: dict[str, torch.Tensor], family: Family, kept: Sequence[Sequence[int] | None]
        ) -> dict[str, torch.Tensor]:
    """The weights without those of dropped experts; layers of None stay as they are."""
    rows = family.router_rows | {fused.parameter: fused.rows for fused in family.experts}
    found = {}
    for name, value in state.items():
        place = family.in_layer(name)
        chosen = kept[place[0]] if place and place[1] in rows else None
        if chosen is not None and place is not None:
            layout = rows[place[1]]
            entries = torch.tensor(layout.entries(chosen, family.counts[place[0]]))
            value = value.index_select(layout.axis, entries)
        found[name] = value
    return found


def smaller(model: Any, config: dict[str, Any], kept: Sequence[int]) -> tuple[Any, KeepSet]:
    """The whole model that keeps these experts in every layer, filled from the full model's weights."""
    family = family_of(config)
    keep_set = KeepSet(experts=tuple(tuple(kept) if count else None for count in family.counts), method="random",
                       keep_k=len(kept))
    small = AutoModelForCausalLM.from_config(built_config(pruned_config(config, family, keep_set))).eval()
    small.load_state_dict(cut(model.state_dict(), family, keep_set.experts))
    return small, keep_set


def layerwise(model: Any, config: dict[str, Any], prompts: Sequence[Sequence[int]], keep: int
              ) -> list[list[int] | None]:
    """Experts kept per layer by router probability, each layer seeing the pruned ones below."""
    family, restricted, kept = family_of(config), model, list[list[int] | None]()
    for number, rules in enumerate(layer_rules(config)):
        if rules is None:
            kept.append(None)
            continue
        hooked = Hooked(copy.deepcopy(restricted), config, [number]).run(prompts)
        chosen = choose((hooked.probability[number] / hooked.tokens).tolist(), keep, rules)
        kept.append(chosen)
        restricted = copy.deepcopy(restricted)
        small, _ = smaller(model, config, chosen)
        restricted.get_submodule(family.layers)[number] = small.get_submodule(family.layers)[number]
    return kept
