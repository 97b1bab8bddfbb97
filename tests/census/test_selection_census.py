"""Every causal MoE family selected layer by layer, against hooks on the whole model in stock transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import VOCABULARY, moe_types, tiny_checkpoint, tiny_config
from transformers import AutoModelForCausalLM

from emo_select.checkpoint import open_checkpoint
from emo_select.errors import ModelError
from emo_select.experts import collect_activations, select_layerwise
from emo_select.experts.probe import probe
from emo_select.experts.prune import prune_checkpoint
from emo_select.experts.rules import choose, layer_rules
from emo_select.models.families import family_of

REFUSED = {  # why, where experts can be pruned but not selected layer by layer
    "hy_v4": "gives other numbers layer by layer than whole", "zaya": "gives other numbers layer by layer than whole",
}
NOT_PRUNED = ("doge", "jetmoe")
FAMILIES = [name for name in moe_types() if name not in (*REFUSED, *NOT_PRUNED)]
KEEP = 6
LENGTHS, SHORT = (11, 6, 6), (4, 4, 3)  # above the windows of the tiny models, below their numbers of best keys

# What the modelling file of a family makes of its router's first output; the others take the softmax of all logits.
SIGMOID = frozenset((
    "afmoe", "axk1", "axk2", "bailing_hybrid", "beam", "deepseek_v3", "deepseek_v32", "dots1", "dots3_note",
    "dots3_note_text", "exaone_moe", "flint", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa", "hy_v3", "inkling2_text",
    "inkling_text", "kimi_linear", "kolibri1", "laguna", "lfm2_moe", "llama4", "llama4_text", "mimo_v2_flash",
    "minimax_m2", "minimax_m3_vl_text", "nemotron_h", "solar_open"))
SQUARE_ROOT = ("deepseek_v4",)  # of softplus
ITSELF = ("gemma4", "gemma4_text")  # probabilities come first, not logits
SCALED_INPUT = ("llama4", "llama4_text")  # experts get all tokens, multiplied by the router's first output


def probability(name: str, first: torch.Tensor, experts: int) -> torch.Tensor:
    if name in ITSELF:
        return first
    if name in SQUARE_ROOT:
        return torch.nn.functional.softplus(first).sqrt()
    return (first.sigmoid() if name in SIGMOID else first.softmax(-1))[:, :experts]


class Hooked:
    """Sums of a whole model over texts, one text at a time, one expert at a time."""

    def __init__(self, name: str, model: Any, config: dict[str, Any]) -> None:
        self.name, self.model, self.family = name, model, family_of(config)
        self.layers = model.get_submodule(self.family.layers)
        self.sums = [{kind: torch.zeros(count, dtype=torch.float64) for kind in ("probability", "count", "reap")}
                     for count in self.family.counts]
        self.first: Any = None

    def run(self, text: torch.Tensor, inputs: dict[int, Any] | None = None) -> dict[int, Any]:
        """What each layer was given; `inputs` replaces it."""
        seen: dict[int, Any] = {}
        hooks = []
        for index, layer in enumerate(self.layers):
            hooks.append(layer.register_forward_pre_hook(_input_hook(index, seen, inputs), with_kwargs=True))
            if self.family.counts[index]:
                hooks.append(layer.get_submodule(self.family.router_module).register_forward_hook(self._router(index)))
                experts = layer.get_submodule(self.family.experts_module)
                hooks.append(experts.register_forward_hook(self._experts(index)))
        with torch.no_grad():
            self.model(text, use_cache=False)
        for hook in hooks:
            hook.remove()
        return seen

    def _router(self, index: int) -> Callable[..., None]:
        def heard(module: Any, args: Any, output: Any) -> None:
            self.first = output[0] if isinstance(output, tuple) else output
            said = output[1] if self.name in SCALED_INPUT else self.first
            found = probability(self.name, said.reshape(-1, said.shape[-1]), self.family.counts[index])
            self.sums[index]["probability"] += found.sum(0, dtype=torch.float64)

        return heard

    def _experts(self, index: int) -> Callable[..., None]:
        busy = False

        def ran(module: Any, args: Any, output: Any) -> None:
            nonlocal busy
            if busy:
                return
            busy = True
            for expert in range(self.family.counts[index]):
                gates, norms = self._of(module, args, output, expert)
                self.sums[index]["count"][expert] += len(gates)
                self.sums[index]["reap"][expert] += (gates * norms).sum(dtype=torch.float64)
            busy = False

        return ran

    def _of(self, module: Any, args: Any, output: torch.Tensor, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Gates of an expert, and the norms of what it gives, over the tokens that chose it."""
        if self.name in SCALED_INPUT:
            gates = self.first[:, expert]
            norms = output.view(self.first.shape[1], -1, output.shape[-1])[expert].norm(dim=-1)
            return gates[gates > 0], norms[gates > 0]
        hidden, index, gates = args[0].reshape(-1, args[0].shape[-1]), args[1], args[2]
        token, slot = torch.where(index.reshape(len(hidden), -1) == expert)
        if not len(token):
            return gates.new_zeros(0), gates.new_zeros(0)
        twice, once = torch.full((len(token), 2), expert), torch.tensor([[1.0, 0.0]]).expand(len(token), -1)
        given = module(hidden[token], twice, once).reshape(len(token), -1)
        return gates.reshape(len(hidden), -1)[token, slot].float(), given.norm(dim=-1)


def _input_hook(index: int, seen: dict[int, Any], inputs: dict[int, Any] | None) -> Callable[..., Any]:
    def given(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        seen[index] = args[0] if args else kwargs["hidden_states"]
        if inputs is None:
            return None
        changed = inputs[index].clone()
        return ((changed, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": changed})

    return given


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("selected")


def texts_for(config: dict[str, Any]) -> list[torch.Tensor]:
    """Among the tiny models' keys many are equally good, so attention that looks for the best ones gets few."""
    lengths = SHORT if "index_topk" in json.dumps(config) else LENGTHS
    return [torch.randint(3, VOCABULARY, (1, length), generator=torch.Generator().manual_seed(seed))
            for seed, length in enumerate(lengths)]


def as_lists(texts: list[torch.Tensor]) -> list[list[int]]:
    return [text[0].tolist() for text in texts]


@pytest.mark.parametrize("name", FAMILIES)
def test_statistics_are_those_of_the_whole_model(name: str, models: Path) -> None:
    model, folder = tiny_checkpoint(name, models)
    checkpoint = open_checkpoint(folder)
    hooked = Hooked(name, model, checkpoint.config)
    texts = texts_for(checkpoint.config)
    for text in texts:
        hooked.run(text)
    found = collect_activations(checkpoint, as_lists(texts))
    for layer, (sums, expected) in enumerate(zip(found.layers, hooked.sums, strict=True)):
        for kind, values in expected.items() if sums else ():
            ours = sums.values[kind][0]  # type: ignore[union-attr]
            torch.testing.assert_close(ours, values, rtol=2e-4, atol=2e-5, msg=lambda m, at=(layer, kind): f"{at} {m}")


@pytest.mark.parametrize("name", FAMILIES)
def test_layerwise_chooses_what_the_pruned_model_s_states_say(name: str, models: Path, tmp_path: Path) -> None:
    """With the states in front of each layer of the pruned model, the full model's routers rank the kept ones first."""
    model, folder = tiny_checkpoint(name, models)
    checkpoint = open_checkpoint(folder)
    texts = texts_for(checkpoint.config)
    kept = select_layerwise(checkpoint, as_lists(texts), [KEEP])[KEEP]
    prune_checkpoint(folder, kept, tmp_path / "pruned")
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned", dtype=torch.float32).eval()
    full = Hooked(name, model, checkpoint.config)
    cut = Hooked(name, pruned, open_checkpoint(tmp_path / "pruned").config)
    for text in texts:
        full.run(text, cut.run(text))
    for rules, chosen, sums in zip(layer_rules(checkpoint.config), kept.experts, full.sums, strict=True):
        assert (None if rules is None else tuple(choose(sums["probability"].tolist(), KEEP, rules))) == chosen


@pytest.mark.parametrize("name", REFUSED)
def test_layers_that_look_further_back_are_refused(name: str) -> None:
    config = json.loads(tiny_config(name).to_json_string(use_diff=False))
    with pytest.raises(ModelError, match=REFUSED[name]) as refusal:
        probe(config)
    assert name in str(refusal.value)
