"""Trainings equal to the published code's: data order, losses, gradient norms, updates, freeze modes."""

import json
import shutil

import pytest
from finetune_cases import CASES, CPU, GOLDEN, golden_tokens, golden_training
from safetensors import safe_open
from safetensors.torch import load_file

from emo_select.checkpoint import open_checkpoint
from emo_select.finetune.freezing import trained_tensors
from emo_select.finetune.run import finetune_tokens


def recorded(case: str) -> dict:
    return json.loads((GOLDEN / case / "losses.json").read_text())


def trained(case, out, *, checkpointing=False, **changes):
    execution = CPU.model_copy(update={"gradient_checkpointing": checkpointing})
    return finetune_tokens(
        GOLDEN / case / "model", golden_tokens(case), out, golden_training(case, **changes), execution, pad_token=1
    )


def require_equal(history, steps, capsys):
    assert len(history) == len(steps)
    losses = [abs(ours["loss"] - theirs["loss"]) for ours, theirs in zip(history, steps, strict=True)]
    norms = [abs(ours["grad_norm"] / theirs["grad_norm"] - 1) for ours, theirs in zip(history, steps, strict=True)]
    with capsys.disabled():
        print(f"\n  largest difference: loss {max(losses):.1e}, gradient norm {max(norms):.1e} (relative)", end="")
    assert max(losses) < 1e-4 and max(norms) < 1e-3


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_losses_and_gradient_norms(case, checkpointing, tmp_path, capsys):
    report = trained(case, tmp_path / "out", checkpointing=checkpointing, checkpoints=8)
    steps = recorded(case)["runs"]["gradient_checkpointing_" + ("on" if checkpointing else "off")]
    require_equal(report.history, steps, capsys)
    for ours, theirs in zip(report.history, recorded(case)["runs"]["gradient_checkpointing_on"], strict=True):
        assert ours["learning_rate"] == pytest.approx(theirs["lr"], abs=1e-12)
        logged = theirs["logged"].get("train/lb_loss")
        if logged is not None:  # the published log multiplies it by the coefficient and calls the sum "ce"
            assert 0.01 * ours["lb_loss"] == pytest.approx(logged, abs=1e-6)
            assert ours["ce_loss"] + 0.01 * ours["lb_loss"] == pytest.approx(theirs["loss"], abs=1e-4)
    assert report.checkpoints == list(range(0, 17, 2))
    require_golden_updates(case, tmp_path / "out")


def test_load_balancing_is_on_whatever_the_checkpoint_returns_and_its_config_stays(tmp_path):
    source = tmp_path / "model"
    shutil.copytree(GOLDEN / "moe_shared1_k8" / "model", source)
    config = json.loads((source / "config.json").read_text()) | {"output_router_logits": False}
    (source / "config.json").write_text(json.dumps(config))
    training = golden_training("moe_shared1_k8", epochs=0.25)
    report = finetune_tokens(source, golden_tokens("moe_shared1_k8"), tmp_path / "out", training, CPU, pad_token=1)
    steps = recorded("moe_shared1_k8")["runs"]["gradient_checkpointing_off"]
    assert report.history[0]["loss"] == pytest.approx(steps[0]["loss"], abs=1e-4) and report.history[0]["lb_loss"] > 0
    assert json.loads((tmp_path / "out" / "checkpoint-2" / "config.json").read_text()) == config


@pytest.mark.parametrize("mode", ["routed", "routed_shared", "routed_shared_router"])
def test_freeze_modes(mode, tmp_path, capsys):
    case = "moe_shared1_k8"
    report = trained(case, tmp_path / "out", freeze=mode)
    require_equal(report.history, recorded(case)["runs"][f"freeze_{mode}"], capsys)
    moved = set(changed_tensors(tmp_path / "out" / "checkpoint-0", tmp_path / "out" / "checkpoint-16"))
    listed = json.loads((GOLDEN / case / "freeze_modes.json").read_text())["requires_grad"][mode]
    assert moved == set(listed)


@pytest.mark.parametrize("mode", ["routed", "routed_shared"])
def test_weight_decay_does_not_move_frozen_rows(mode, tmp_path):
    trained("moe_densefirst_k8", tmp_path / "out", freeze=mode, weight_decay=0.1, epochs=0.5)
    moved = set(changed_tensors(tmp_path / "out" / "checkpoint-0", tmp_path / "out" / "checkpoint-4"))
    listed = json.loads((GOLDEN / "moe_densefirst_k8" / "freeze_modes.json").read_text())["requires_grad"][mode]
    assert moved == set(listed)


def changed_tensors(before, after) -> list[str]:
    old, new = load_file(before / "model.safetensors"), load_file(after / "model.safetensors")
    assert list(old) == list(new)
    return [name for name in old if not old[name].equal(new[name])]


def require_golden_updates(case, out):
    """What ten of the sixteen steps did to each tensor; checkpoint 5 of 8 evenly spaced ones."""
    expected = json.loads((GOLDEN / case / "step10_update_norms.json").read_text())["parameters"]
    old = load_file(out / "checkpoint-0" / "model.safetensors")
    new = load_file(out / "checkpoint-10" / "model.safetensors")
    assert set(expected) == set(new)
    for name, (change, norm) in expected.items():
        assert (new[name] - old[name]).norm().item() == pytest.approx(change, rel=1e-2, abs=1e-7), name
        assert new[name].norm().item() == pytest.approx(norm, rel=1e-5), name


@pytest.mark.parametrize("case", ["moe_densefirst_k8", "moe_shared1_k8"])
@pytest.mark.parametrize("mode", ["none", "routed", "routed_shared", "routed_shared_router"])
def test_freeze_lists(case, mode):
    golden = json.loads((GOLDEN / case / "freeze_modes.json").read_text())
    with open_checkpoint(GOLDEN / case / "model") as checkpoint:
        assert set(checkpoint.tensors) == set(golden["all_parameters"])
        assert set(trained_tensors(checkpoint.config, golden["all_parameters"], mode)) == set(
            golden["requires_grad"][mode]
        )


def test_freeze_lists_follow_each_layer_where_the_published_code_does_not():
    """A schedule of 32, 12, 8, 6 experts: the published lists cut every layer at five routed experts."""
    golden = json.loads((GOLDEN / "moe_shared1_k8" / "freeze_modes.json").read_text())["variable_schedule_checkpoint"]
    with open_checkpoint(GOLDEN / "moe_shared1_k8" / "model") as checkpoint:
        config = checkpoint.config | golden["config"]
    names = golden["requires_grad"]["routed_shared"]
    ours = trained_tensors(config, names, "routed")
    assert len(ours) == 3 * (31 + 11 + 7 + 5) and set(golden["requires_grad"]["routed"]) <= set(ours)
    assert trained_tensors(config, names, "routed_shared") == names


def test_checkpoints_keep_layout_config_and_dtype(tmp_path):
    source = GOLDEN / "moe_shared1_k8" / "model"
    trained("moe_shared1_k8", tmp_path / "out", epochs=0.25)
    start, last = tmp_path / "out" / "checkpoint-0", tmp_path / "out" / "checkpoint-2"
    assert (start / "model.safetensors").stat().st_ino == (source / "model.safetensors").stat().st_ino
    assert (last / "config.json").read_bytes() == (source / "config.json").read_bytes()
    with safe_open(source / "model.safetensors", "pt") as old, safe_open(last / "model.safetensors", "pt") as new:
        assert sorted(old.keys()) == sorted(new.keys())
        for name in old.keys():  # noqa: SIM118 - not a mapping
            assert old.get_slice(name).get_shape() == new.get_slice(name).get_shape()
            assert old.get_slice(name).get_dtype() == new.get_slice(name).get_dtype()
