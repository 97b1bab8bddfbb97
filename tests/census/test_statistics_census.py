"""Statistics of every causal MoE family, against hooks on the whole model in stock transformers.

What a router thinks of its experts is written down here family by family, as its modelling file has it, and not
listened to as the engine does.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import VOCABULARY, moe_types, tiny_checkpoint

from emo_select.checkpoint import open_checkpoint
from emo_select.experts import collect_activations
from emo_select.models.families import family_of

REFUSED = ("doge", "jetmoe", "hy_v4", "zaya")
NEWER = ("inkling2_loop_text", "sarvam_mla", "sarvam_moe")  # of transformers 5.24
READ = {*json.loads(resources.files("emo_select.models").joinpath("census.json").read_text())["families"], *NEWER}
FAMILIES = [name for name in moe_types() if name in READ and name not in REFUSED]  # what SIGMOID and others cover
LENGTHS, SHORT = (11, 6, 6), (4, 4, 3)  # above the windows of the tiny models, below their numbers of best keys

# What the modelling file of a family makes of its router's first output; the others take the softmax of all logits.
SIGMOID = frozenset((
    "afmoe", "axk1", "axk2", "bailing_hybrid", "beam", "deepseek_v3", "deepseek_v32", "dots1", "dots3_note",
    "dots3_note_text", "exaone_moe", "flint", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa", "hy_v3", "inkling2_text",
    "inkling_text", "kimi_linear", "kolibri1", "laguna", "lfm2_moe", "llama4", "llama4_text", "mimo_v2_flash",
    "minimax_m2", "minimax_m3_vl_text", "nemotron_h", "solar_open", *NEWER))
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

    def run(self, text: torch.Tensor) -> None:
        """Add what a text shows."""
        hooks = []
        for index, layer in enumerate(self.layers):
            if self.family.counts[index]:
                hooks.append(layer.get_submodule(self.family.router_module).register_forward_hook(self._router(index)))
                experts = layer.get_submodule(self.family.experts_module)
                hooks.append(experts.register_forward_hook(self._experts(index)))
        with torch.no_grad():
            self.model(text, use_cache=False)
        for hook in hooks:
            hook.remove()

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
