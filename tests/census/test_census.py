"""Every causal MoE family of the installed transformers, as a tiny model: what can be done is done and compared.

`REFUSED` are those that cannot be pruned, with what is said of them. A family that a newer transformers brings is
tested without a change here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import EXPERTS, VOCABULARY, moe_types, tiny_checkpoint, tiny_config
from transformers import AutoModelForCausalLM

from emo_select.checkpoint import open_checkpoint
from emo_select.errors import ModelError
from emo_select.experts.keepset import KeepSet
from emo_select.experts.prune import prune_checkpoint
from emo_select.models.families import family_of, layer_parameters, model_parameters, read_parameter

REFUSED = {
    "doge": "grows with the number of experts otherwise than by entries of each expert",
    "jetmoe": "counts several sets of experts in one layer by one key",
}
FAMILIES = [name for name in moe_types() if name not in REFUSED]
KEPT = (0, 2, 4, 6, 9, 11)  # two of each group of four
IDS = torch.randint(3, VOCABULARY, (2, 11), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the tiny checkpoints are."""
    return tmp_path_factory.mktemp("census")


def keep_set(config: dict[str, Any], kept: tuple[int, ...] = KEPT) -> KeepSet:
    return KeepSet(experts=tuple(kept if count else None for count in family_of(config).counts), method="random",
                   keep_k=len(kept))


def load(folder: Path) -> Any:
    """The model in stock transformers, every tensor from the checkpoint."""
    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(report.values()), report
    return model.eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


def cut(model: Any, config: dict[str, Any], pruned: Any) -> Any:
    """`pruned` with the weights of the full model in memory, without those of dropped experts."""
    family = family_of(config)
    rows = family.router_rows | {fused.parameter: fused.rows for fused in family.experts}
    state = model.state_dict()
    for name, value in state.items():
        place = family.in_layer(name)
        if place and place[1] in rows and family.counts[place[0]]:
            layout = rows[place[1]]
            index = torch.tensor(layout.entries(KEPT, EXPERTS))
            state[name] = value.index_select(layout.axis, index)
    pruned.load_state_dict(state)
    return pruned


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_pruned_copy_is_the_model_without_the_experts(model_type: str, models: Path, tmp_path: Path) -> None:
    model, folder = tiny_checkpoint(model_type, models)
    config = open_checkpoint(folder).config
    prune_checkpoint(folder, keep_set(config), tmp_path / "pruned")
    pruned = load(tmp_path / "pruned")
    found = logits(pruned)
    assert (found - logits(model)).abs().max() > 1e-4  # experts matter
    assert (found - logits(cut(model, config, pruned))).abs().max() < 2e-5


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


@pytest.mark.parametrize("model_type", REFUSED)
def test_what_cannot_be_pruned_is_refused_by_name(model_type: str) -> None:
    with pytest.raises(ModelError, match=REFUSED[model_type]) as refusal:
        family_of(json.loads(tiny_config(model_type).to_json_string(use_diff=False)))
    assert model_type in str(refusal.value)
