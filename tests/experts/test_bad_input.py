"""Mistakes end in one sentence that names what is wrong; nothing half-written is left."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from emo_select.checkpoint import open_checkpoint
from emo_select.checkpoint.fingerprint import Content
from emo_select.errors import CheckpointError, KeepKError, ModelError, NumericError, SpecError, UnknownNameError
from emo_select.experts import (
    KeepSet,
    Scores,
    StreamOptions,
    collect_activations,
    select_from_scores,
    select_layerwise,
)
from emo_select.experts.scores import RECORD, TENSORS, LayerSums

PROMPTS = [[5, 9, 11, 30], [7, 8]]


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors",
              {"format": "pt"})


def put(name: str, value: float) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name].view(-1)[3] = value
    return change


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["model.layers.2.mlp.experts.17.up_proj.weight", "model.layers.1.mlp.gate.weight",
                                  "model.layers.0.self_attn.q_proj.weight"])
def test_bad_weights_are_named(copy_of_tiny: Path, tmp_path: Path, name: str, value: float) -> None:
    edit(copy_of_tiny, put(name, value))
    with pytest.raises(NumericError) as error:
        collect_activations(open_checkpoint(copy_of_tiny), PROMPTS, out_dir=tmp_path / "activations")
    if "experts" in name:
        assert "model.layers.2.mlp.experts.17." in str(error.value)
    else:
        assert name in str(error.value)
    assert not (tmp_path / "activations").exists()


def test_overflowing_scores_name_layer_and_expert() -> None:
    sums = LayerSums(1, 4)
    sums.values["norm"][0, 2] = float("inf")
    with pytest.raises(NumericError, match="layer 7, expert 2"):
        sums.check(7)


def test_large_but_finite_weights_pass(copy_of_tiny: Path) -> None:
    """Their sum overflows fp32, which must not be taken for infinity."""
    edit(copy_of_tiny, lambda tensors: tensors["model.layers.2.mlp.experts.17.up_proj.weight"].fill_(3e38))
    edit(copy_of_tiny, lambda tensors: tensors["model.layers.2.mlp.experts.17.down_proj.weight"].fill_(0))
    kept = select_layerwise(open_checkpoint(copy_of_tiny), PROMPTS, [4])[4]
    assert kept.experts[2] is not None


@pytest.mark.parametrize(("change", "message"), [
    (lambda t: t.pop("model.layers.1.self_attn.k_proj.weight"), "no tensor model.layers.1.self_attn.k_proj.weight"),
    (lambda t: t.update({"model.layers.1.self_attn.k_proj.weight": torch.zeros(3, 24)}), "self_attn.k_proj.weight"),
    (lambda t: t.pop("model.layers.1.mlp.experts.4.up_proj.weight"), r"experts\.4\.up_proj"),
    (lambda t: t.update({"model.layers.1.mlp.gate.weight": torch.zeros(31, 24)}), r"mlp\.gate\.weight"),
    (lambda t: t.update({"model.layers.1.self_attn.odd.weight": torch.zeros(2)}), r"self_attn\.odd"),
])
def test_weights_that_do_not_fit_the_config(copy_of_tiny: Path, tmp_path: Path, change: Callable[[Any], Any],
                                            message: str) -> None:
    edit(copy_of_tiny, change)
    with pytest.raises(CheckpointError, match=message):
        collect_activations(open_checkpoint(copy_of_tiny), PROMPTS, out_dir=tmp_path / "activations")
    assert not (tmp_path / "activations").exists()


def test_tokens_of_another_vocabulary(tiny: Path) -> None:
    with pytest.raises(ModelError, match=r"id 96.*another vocabulary"):
        select_layerwise(open_checkpoint(tiny), [[5, 96]], [4])


@pytest.mark.parametrize("prompts", [[], [[]], [[], []]])
def test_empty_calibration(tiny: Path, prompts: list[list[int]]) -> None:
    with pytest.raises(SpecError, match="empty"):
        collect_activations(open_checkpoint(tiny), prompts)


@pytest.mark.parametrize("keep_ks", [[33], [1], [8, 40], [(8, 8)], [(8, 8, 1, 8)]])
def test_impossible_keep_k(tiny: Path, keep_ks: list[Any]) -> None:
    with pytest.raises(KeepKError):
        select_layerwise(open_checkpoint(tiny), PROMPTS, keep_ks)


def test_unknown_names(tiny: Path) -> None:
    checkpoint = open_checkpoint(tiny)
    with pytest.raises(UnknownNameError, match="'router_probability'"):
        select_layerwise(checkpoint, PROMPTS, [4], score="router_probabilty")
    scores = collect_activations(checkpoint, PROMPTS, ["a", "b"])
    with pytest.raises(UnknownNameError, match="'easy_ep'"):
        select_from_scores(scores, "easy_eb", 4, checkpoint.config)
    with pytest.raises(UnknownNameError, match="example group"):
        scores.score("reap", groups=["c"])
    with pytest.raises(SpecError, match="task with examples"):
        scores.score("reap", {"a": 1, "x": 2})
    for options in ({"dtype": "int8"}, {"device": "gpu"}, {"memory_budget": "lots"}):
        with pytest.raises(SpecError):
            collect_activations(checkpoint, PROMPTS, options=StreamOptions(**options))


def test_statistics_of_another_model(tiny: Path) -> None:
    scores = collect_activations(open_checkpoint(tiny), PROMPTS)
    other = {**open_checkpoint(tiny).config, "num_experts": 16}
    with pytest.raises(CheckpointError, match="other layers or experts"):
        select_from_scores(scores, "reap", 4, other)


def test_statistics_survive_storage_and_damage_is_named(tiny: Path, tmp_path: Path) -> None:
    scores = collect_activations(open_checkpoint(tiny), PROMPTS, ["a", "b"], tmp_path / "s", record={"model": "m"})
    again = Scores.load(tmp_path / "s")
    assert again.record["model"] == "m" and again.groups == ["a", "b"] and again.tokens == [4, 2]
    assert again.score("easy_ep") == scores.score("easy_ep")
    for name, damage in ((TENSORS, b"x"), (RECORD, b"{}"), (RECORD, b"{")):
        whole = (tmp_path / "s" / name).read_bytes()
        (tmp_path / "s" / name).write_bytes(damage)
        with pytest.raises(CheckpointError):
            Scores.load(tmp_path / "s")
        (tmp_path / "s" / name).write_bytes(whole)
    record = json.loads((tmp_path / "s" / RECORD).read_text())
    record["experts_per_layer"][1] = 7
    (tmp_path / "s" / RECORD).write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match="cannot be read"):
        Scores.load(tmp_path / "s")


def test_keeping_everything_reads_no_weights(copy_of_tiny: Path) -> None:
    checkpoint = open_checkpoint(copy_of_tiny)
    checkpoint.close()
    (copy_of_tiny / "model.safetensors").rename(copy_of_tiny / "away")
    checkpoint.__dict__["content"] = Content("c", "t", "g", "p", "w")
    found: KeepSet = select_layerwise(checkpoint, PROMPTS, [32])[32]
    assert found.experts == (tuple(range(32)),) * 4 and found.scores is None
