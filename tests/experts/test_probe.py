"""What the small copy of an architecture shows, and what is said where layers cannot be run one at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import tiny_checkpoint, tiny_config

from emo_select import progress
from emo_select.checkpoint import open_checkpoint
from emo_select.errors import ModelError
from emo_select.experts import probe as trying
from emo_select.experts import select_layerwise
from emo_select.experts.frame import Frame, Texts
from emo_select.experts.kinds import kind_of
from emo_select.experts.layers import AttentionHalf
from emo_select.experts.prefixes import Segment
from emo_select.experts.probe import probe, small_copy
from emo_select.models.families import family_of
from emo_select.models.tiny import tiny_config as smaller

TEXTS = [[5, 6, 7], [8, 9]]


def as_dict(name: str, **changes: Any) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(tiny_config(name, **changes).to_json_string(use_diff=False))
    return config


@pytest.mark.parametrize(("name", "split", "shares"), [
    ("granitemoe", True, True),  # multipliers of embedding and residual
    ("gemma4_text", False, True),  # the layer itself mixes experts in, and scales its output
    ("cohere2_moe", False, True),  # attention and experts side by side
    ("minimax", False, False),  # the residual is the norm's output; linear attention
    ("jamba", True, False),  # Mamba has no mask between texts
    ("kolibri1", True, True),  # norms behind attention and experts
    ("nemotron_h", True, False),  # a layer is attention or experts
])
def test_which_layers_split(name: str, split: bool, shares: bool) -> None:
    config = as_dict(name)
    found = probe(config)
    layers = small_copy(config).get_submodule(family_of(config).layers)
    moe = {kind_of(layer) for layer, count in zip(layers, family_of(config).counts, strict=True) if count}
    assert all(found.kinds[kind].split == split for kind in moe)
    assert found.shares_prefixes == shares


def test_a_fault_of_ours_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were a layer run from half of its state, no number that comes of it would be right."""
    trying._probe.cache_clear()
    plain = trying.Skeleton.back

    def wrong(self: Any, *args: Any, **kwargs: Any) -> Any:
        back = plain(self, *args, **kwargs)
        return lambda batch, hidden: back(batch, hidden / 2)

    monkeypatch.setattr(trying.Skeleton, "back", wrong)
    with pytest.raises(ModelError, match=r"small copy of this olmoe model gives other numbers.*layer 0.*apart"):
        probe(as_dict("olmoe"))


def test_a_half_that_is_wrong_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    trying._probe.cache_clear()
    plain = AttentionHalf.__call__
    monkeypatch.setattr(AttentionHalf, "__call__", lambda self, *args: 1.1 * plain(self, *args))
    found = probe(as_dict("olmoe"))
    assert not any(kind.split for kind in found.kinds.values())
    trying._probe.cache_clear()


def test_layers_that_look_further_back_are_refused() -> None:
    with pytest.raises(ModelError, match=r"zaya model gives other numbers layer by layer than whole \(.*layer 1"):
        probe(as_dict("zaya"))


def test_arguments_that_come_from_further_below() -> None:
    """inkling2 shows every few layers' states to all that follow, which a small copy may be too small for."""
    texts = Texts([Segment(np.array([5, 6]), ((0, 1),))])

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = torch.nn.Embedding(8, 4)
            self.layers = torch.nn.ModuleList(torch.nn.Identity() for _ in range(3))

        def forward(self, input_ids: torch.Tensor, use_cache: bool) -> torch.Tensor:
            hidden, older = self.embed(input_ids), None
            for layer in self.layers:
                hidden, older = layer(hidden, older=older), hidden
            return hidden

    model = Model()
    frame = Frame(model, list(model.layers), texts, [0, 0, 0], torch.device("cpu"))
    assert frame.first_that_looks_further() == 2  # what layer 1 is shown is the embedding


def test_it_is_said_that_attention_runs_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(progress, "say_once", said.append)
    _, folder = tiny_checkpoint("cohere2_moe", tmp_path)
    select_layerwise(open_checkpoint(folder), TEXTS, [6])
    assert any("3 of 3 layers do not split into attention and experts" in line for line in said)


@pytest.mark.parametrize("name", ["gpt_oss", "deepseek_v3", "qwen3_next", "jamba", "nemotron_h"])
def test_a_published_size_is_tried_as_a_small_copy(name: str) -> None:
    """What a family's class has by default are the sizes of a published model."""
    from transformers import AutoConfig

    config = json.loads(AutoConfig.for_model(name).to_json_string(use_diff=False))
    model = small_copy(config)
    assert sum(parameter.numel() for parameter in model.parameters()) < 1_000_000
    assert probe(config).kinds


def test_the_copy_is_the_same_every_time_and_leaves_random_numbers_alone() -> None:
    torch.manual_seed(7)
    expected = torch.rand(2)
    torch.manual_seed(7)
    first, again = (small_copy(as_dict("olmoe")).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert torch.equal(torch.rand(2), expected)


def test_small_sizes_keep_what_shapes_depend_on() -> None:
    config = {"model_type": "x", "hidden_size": 4096, "num_attention_heads": 96, "num_key_value_heads": 8,
              "num_hidden_layers": 46, "layer_types": ["a"] * 46, "n_group": 8, "topk_group": 4, "q_lora_rank": None,
              "attention_bias": True, "num_experts_per_tok": 8, "rope_scaling": {"short_factor": [1.0] * 48}}
    found = smaller(config, 3)
    assert found["num_attention_heads"] == 2 * found["num_key_value_heads"]
    assert found["layer_types"] == ["a"] * 3 and found["num_hidden_layers"] == 3
    assert (found["q_lora_rank"], found["attention_bias"]) == (None, True)
    assert len(found["rope_scaling"]["short_factor"]) == 4
