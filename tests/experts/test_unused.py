"""What a checkpoint has and its model does not use: prediction layers by choice, leftovers carried along everywhere."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM
from word_tokenizer import add_tokenizer

from emo_select.checkpoint import open_checkpoint
from emo_select.errors import CheckpointError
from emo_select.experts import select_layerwise
from emo_select.experts.keepset import KeepSet
from emo_select.experts.prune import plan_prune, prune_checkpoint
from emo_select.models import load_model
from emo_select.models.families import experts_per_layer, family_of
from emo_select.models.unused import prediction_role

KEPT = (0, 2, 4, 6, 9, 11)  # two of each group of four
PROMPTS = [[3 + (7 * row + 5 * at) % 61 for at in range(6 + row)] for row in range(4)]
LEFTOVERS = ("self_attn.rotary_emb.inv_freq", "self_attn.k_proj.k_scale", "self_attn.o_proj.weight_scale")


def predicting(family: str, folder: Path, place: str, extra: tuple[str, ...], **changes: Any) -> Path:
    """A tiny model with a prediction layer that is a copy of its last layer, and leftovers in every layer."""
    tiny_model(family, **changes).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    with open_checkpoint(folder) as checkpoint:
        last = len(experts_per_layer(checkpoint.config)) - 1
    prefix = f"model.layers.{last}."
    tensors |= {name.replace(prefix, place): value + 1 for name, value in tensors.items() if name.startswith(prefix)}
    tensors |= {place + name: torch.ones(4, 8) for name in extra}
    tensors |= {f"model.layers.{layer}.{name}": torch.ones(1) for layer in range(last + 1) for name in LEFTOVERS}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    add_tokenizer(folder, 64)
    return folder


@pytest.fixture(scope="module", params=["deepseek_v3", "qwen3_next"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    folder = tmp_path_factory.mktemp("predicting") / request.param
    if request.param == "deepseek_v3":
        place = "model.layers.3."
        predicting("deepseek_v3", folder, place, ("eh_proj.weight", "shared_head.head.weight"))
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 1}))
    else:
        place = "mtp.layers.0."
        predicting("qwen3_next", folder, place, (),
                   layer_types=["linear_attention", "full_attention", "linear_attention"])
    yield folder, place


def kept_of(folder: Path) -> KeepSet:
    with open_checkpoint(folder) as checkpoint:
        experts = tuple(KEPT if count else None for count in experts_per_layer(checkpoint.config))
    return KeepSet(experts=experts, method="given", keep_k=len(KEPT))


@pytest.mark.parametrize("choice", ["drop", "prune", "keep"])
def test_prediction_layers_are_dropped_pruned_or_kept(model: tuple[Path, str], choice: Any, tmp_path: Path,
                                                      capsys: pytest.CaptureFixture[str]) -> None:
    folder, place = model
    prune_checkpoint(folder, kept_of(folder), tmp_path / "pruned", prediction=choice)
    assert {"drop": "left out", "prune": "experts of the last layer", "keep": "kept whole"}[choice] in (
        capsys.readouterr().err)
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "pruned" / "model.safetensors")
    mine = {name: value for name, value in after.items() if name.startswith(place)}
    config = json.loads((tmp_path / "pruned" / "config.json").read_text())
    metadata = json.loads((tmp_path / "pruned" / "pruning_metadata.json").read_text())
    assert metadata.get("prediction_layers", "drop") == choice
    if "deepseek" in folder.name:
        assert config["num_nextn_predict_layers"] == (choice != "drop")
    if choice == "drop":
        assert not mine
    elif choice == "keep":
        assert mine.keys() == {name for name in before if name.startswith(place)}
        assert all(torch.equal(value, before[name]) for name, value in mine.items())
    else:
        assert torch.equal(mine[f"{place}mlp.gate.weight"], before[f"{place}mlp.gate.weight"][list(KEPT)])
        for new, old in enumerate(KEPT):
            name = f"{place}mlp.experts.{{}}.up_proj.weight"
            assert torch.equal(mine[name.format(new)], before[name.format(old)])
        assert f"{place}mlp.experts.{len(KEPT)}.up_proj.weight" not in mine
    leftovers = [name for name in before if name.endswith(LEFTOVERS) and not name.startswith(place)]
    assert leftovers and all(torch.equal(after[name], before[name]) for name in leftovers)


def test_every_stage_works_beside_tensors_that_the_model_does_not_use(model: tuple[Path, str], tmp_path: Path) -> None:
    from emo_select.finetune.examples import from_lists
    from emo_select.finetune.merge import merge_back
    from emo_select.finetune.run import finetune_tokens
    from emo_select.spec import Execution, Training

    folder, place = model
    with open_checkpoint(folder) as checkpoint:
        keep_set = select_layerwise(checkpoint, PROMPTS, [6])[6]
    pruned = tmp_path / "pruned"
    prune_checkpoint(folder, keep_set, pruned, prediction="prune")
    ids = torch.tensor([PROMPTS[0]])
    ours, stock = load_model(str(pruned)), AutoModelForCausalLM.from_pretrained(pruned, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, stock.eval()(ids).logits)
    finetune_tokens(pruned, from_lists([{"input_ids": ids, "labels": ids} for ids in PROMPTS]), tmp_path / "tuned",
                    Training(epochs=1, batch_size=4, checkpoints=1),
                    Execution(device="cpu", micro_batch_size=4, gradient_checkpointing=False), pad_token=0)
    tuned = tmp_path / "tuned" / "checkpoint-1"
    start, end = load_file(pruned / "model.safetensors"), load_file(tuned / "model.safetensors")
    assert start.keys() == end.keys()
    carried = [name for name in start if name.startswith(place) or name.endswith(LEFTOVERS)]
    assert carried and all(torch.equal(start[name], end[name]) for name in carried)
    merge_back(tuned, str(folder), tmp_path / "merged")
    full, merged = load_file(folder / "model.safetensors"), load_file(tmp_path / "merged" / "model.safetensors")
    assert all(torch.equal(full[name], merged[name]) for name in full if name.startswith(place))


@pytest.mark.parametrize(("name", "kind", "prefix"), [
    ("model.layers.3.mlp.experts.5.up_proj.weight", "expert", "model.layers.3."),
    ("model.layers.3.eh_proj.weight", "other", "model.layers.3."),
    ("mtp.layers.0.mlp.experts.5.up_proj.weight", "expert", "mtp.layers.0."),
    ("model.mtp_block.1.mlp.gate.weight", "rows", "model.mtp_block.1."),
    ("mtp.mlp.experts.5.up_proj.weight", "expert", "mtp."), ("mtp.fc.weight", "other", ""),
    ("model.layers.2.mlp.experts.5.up_proj.weight", None, ""), ("model.norm.weight", None, ""),
    ("smtp.layers.0.mlp.gate.weight", None, ""),
])
def test_which_tensors_belong_to_a_prediction_layer(model: tuple[Path, str], name: str, kind: str | None, prefix: str
                                                    ) -> None:
    with open_checkpoint(model[0]) as checkpoint:
        role = prediction_role(family_of(checkpoint.config), name)
    assert (role and role.kind) == kind and (role is None or role.prefix == prefix)


def test_a_prediction_layer_with_another_number_of_experts_is_not_pruned(model: tuple[Path, str], tmp_path: Path
                                                                         ) -> None:
    folder, place = model
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{place}mlp.gate.weight"] = tensors[f"{place}mlp.gate.weight"][:7].clone()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with open_checkpoint(tmp_path) as checkpoint:
        plan_prune(checkpoint, kept_of(folder))
        with pytest.raises(CheckpointError, match="does not fit 12 experts"):
            plan_prune(checkpoint, kept_of(folder), prediction="prune")
