"""Every causal MoE family of the installed transformers, as a tiny model: what can be done is done and compared.

`REFUSED` are those that cannot be pruned, with what is said of them. A family that a newer transformers brings is
tested without a change here.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hooked import Hooked, layerwise, smaller
from tiny_models import VOCABULARY, moe_types, tiny_checkpoint, tiny_config
from transformers import AutoModelForCausalLM

from emo_select.checkpoint import open_checkpoint
from emo_select.errors import ModelError
from emo_select.experts import collect_activations, select_layerwise
from emo_select.experts.prune import prune_checkpoint
from emo_select.models.families import family_of, layer_parameters, model_parameters, read_parameter

REFUSED = {
    "doge": "grows with the number of experts otherwise than by entries of each expert",
    "jetmoe": "counts several sets of experts in one layer by one key",
}
UNSTREAMED = {  # that cannot be selected layer by layer
    "hy_v4": "Shared DSA layers require top-k indices from a previous full indexer layer",
    "zaya": "gives other numbers layer by layer than whole",
}
FAMILIES = [name for name in moe_types() if name not in REFUSED]
KEPT = (0, 2, 4, 6, 9, 11)  # two of each group of four
PROMPTS = [torch.randint(3, VOCABULARY, (length,), generator=torch.Generator().manual_seed(length)).tolist()
           for length in (7, 3, 12, 5)]
IDS = torch.randint(3, VOCABULARY, (2, 11), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the tiny checkpoints are."""
    return tmp_path_factory.mktemp("census")


def load(folder: Path) -> Any:
    """The model in stock transformers, every tensor from the checkpoint."""
    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(report.values()), report
    return model.eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_pruned_copy_is_the_model_without_the_experts(model_type: str, models: Path, tmp_path: Path) -> None:
    model, folder = tiny_checkpoint(model_type, models)
    config = open_checkpoint(folder).config
    small, keep_set = smaller(model, config, KEPT)
    prune_checkpoint(folder, keep_set, tmp_path / "pruned")
    found = logits(load(tmp_path / "pruned"))
    assert (found - logits(model)).abs().max() > 1e-4  # experts matter
    assert (found - logits(small)).abs().max() < 2e-5


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_parameter_can_be_read_by_itself(model_type: str, models: Path) -> None:
    model, folder = tiny_checkpoint(model_type, models)
    checkpoint, state = open_checkpoint(folder), model.state_dict()
    family = family_of(checkpoint.config)
    read = {source.parameter: read_parameter(checkpoint, source)
            for layer in range(len(family.counts)) for source in layer_parameters(checkpoint, layer)}
    assert read.keys() == {name for name in state if family.in_layer(name)}
    read |= {source.parameter: read_parameter(checkpoint, source) for source in model_parameters(checkpoint)}
    assert all(torch.equal(read[name], state[name]) for name in read)
    head = {name for name in state if not name.startswith(family.layers.rpartition(".")[0] + ".")}
    assert read.keys() == state.keys() - head


@pytest.mark.parametrize("model_type", FAMILIES)
def test_selection_is_that_of_hooks_on_the_loaded_model(model_type: str, models: Path) -> None:
    model, folder = tiny_checkpoint(model_type, models)
    checkpoint = open_checkpoint(folder)
    if model_type in UNSTREAMED:
        with pytest.raises(ModelError, match=UNSTREAMED[model_type]):
            select_layerwise(checkpoint, PROMPTS, [6])
        return
    found = select_layerwise(checkpoint, PROMPTS, [6])[6]
    assert [kept and list(kept) for kept in found.experts] == layerwise(model, checkpoint.config, PROMPTS, 6)
    layers = [layer for layer, count in enumerate(family_of(checkpoint.config).counts) if count]
    ours = collect_activations(checkpoint, PROMPTS)
    theirs = Hooked(copy.deepcopy(model), checkpoint.config, layers).run(PROMPTS)
    for layer in layers:
        expected = {"router_probability": theirs.probability[layer] / theirs.tokens,
                    "reap": theirs.reap[layer] / theirs.used[layer].clamp(min=1)}
        for name in expected if theirs.used[layer].any() else ["router_probability"]:
            assert ours.score(name)[layer] == pytest.approx(expected[name].tolist(), rel=2e-4, abs=2e-6), (name, layer)


@pytest.mark.parametrize("model_type", REFUSED)
def test_what_cannot_be_pruned_is_refused_by_name(model_type: str) -> None:
    with pytest.raises(ModelError, match=REFUSED[model_type]) as refusal:
        family_of(json.loads(tiny_config(model_type).to_json_string(use_diff=False)))
    assert model_type in str(refusal.value)
