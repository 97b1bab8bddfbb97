"""Two CPU processes that shard the model (FSDP2 over gloo) against one: the golden run of one process."""

import json

import pytest
from finetune_cases import CPU, GOLDEN, golden_tokens, golden_training
from safetensors.torch import load_file

from emo_select.errors import EmoSelectError
from emo_select.finetune.run import finetune_tokens

CASE = "moe_shared1_k8"
TWO = CPU.model_copy(update={"num_gpus": 2})


def train(out, execution, **changes):
    training = golden_training(CASE, **changes)
    return finetune_tokens(GOLDEN / CASE / "model", golden_tokens(CASE), out, training, execution, pad_token=1)


def test_two_processes_equal_one(tmp_path):
    """Batches of two micro-batches on one process are one on each of two; shared rows stay frozen in both."""
    report = train(tmp_path / "out", TWO, freeze="routed")
    golden = json.loads((GOLDEN / CASE / "losses.json").read_text())["runs"]["freeze_routed"]
    assert report.processes == 2 and len(report.history) == 16
    for ours, theirs in zip(report.history, golden, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-4)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
        assert ours["ce_loss"] + 0.01 * ours["lb_loss"] == pytest.approx(ours["loss"], abs=1e-4)
    old = load_file(tmp_path / "out" / "checkpoint-0" / "model.safetensors")
    new = load_file(tmp_path / "out" / "checkpoint-16" / "model.safetensors")
    listed = json.loads((GOLDEN / CASE / "freeze_modes.json").read_text())["requires_grad"]["routed"]
    assert list(old) == list(new) and {name for name in old if not old[name].equal(new[name])} == set(listed)


def test_what_stops_one_process_is_told(tmp_path):
    with pytest.raises(EmoSelectError, match=r"diverged at step 1 .* last good checkpoint is .*checkpoint-0"):
        train(tmp_path / "out", TWO, loss_limit=0.001)
