"""A training that was stopped continues as if it had not been: bit for bit."""

import json
import os
import signal
from itertools import pairwise
from pathlib import Path

import pytest
from finetune_cases import CPU, GOLDEN, forked, golden_tokens, golden_training
from safetensors.torch import load_file

from emo_select.errors import CheckpointError
from emo_select.finetune import saving, worker
from emo_select.finetune.run import finetune_tokens

CASE = "moe_shared1_k8"


class Stopped(BaseException):
    """Stands for whatever ends a process."""


def train(out: Path, **changes):
    tokens = golden_tokens(CASE)
    training = golden_training(CASE, checkpoints=4, **changes)
    return finetune_tokens(GOLDEN / CASE / "model", tokens, out, training, CPU, pad_token=1)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    return out, train(out)


def require_same(out, report, undisturbed):
    expected_out, expected = undisturbed
    assert report.checkpoints == expected.checkpoints == [0, 4, 8, 12, 16]
    for step in report.checkpoints:
        ours = load_file(out / f"checkpoint-{step}" / "model.safetensors")
        theirs = load_file(expected_out / f"checkpoint-{step}" / "model.safetensors")
        assert all(ours[name].equal(theirs[name]) for name in theirs)
    unmeasured = {"tokens_per_second"}
    for ours, theirs in zip(report.history, expected.history, strict=True):
        assert {k: v for k, v in ours.items() if k not in unmeasured} == {
            k: v for k, v in theirs.items() if k not in unmeasured
        }
    assert not (out / ".training").exists()


def stop_after(monkeypatch, stopping_step, action):
    """Write the state at every step, and do `action` when that of `stopping_step` has been written."""
    save = saving.Keeper.save

    def save_and_act(self, step):
        save(self, step)
        if step == stopping_step:
            action()

    monkeypatch.setattr(saving, "SAVING_SHARE", 1e9)
    monkeypatch.setattr(saving.Keeper, "save", save_and_act)


def test_killed_in_the_second_epoch(tmp_path, undisturbed):
    out = tmp_path / "out"

    def train_and_die():
        stop_after(pytest.MonkeyPatch(), 11, lambda: os.kill(os.getpid(), signal.SIGKILL))
        train(out)

    assert forked(train_and_die) == [-signal.SIGKILL]
    assert (out / ".training" / "state").is_dir() and (out / "checkpoint-8").is_dir()
    require_same(out, train(out), undisturbed)


def test_stopped_while_writing_the_state(tmp_path, undisturbed, monkeypatch):
    """The half-written state is ignored and the one before it is taken up."""
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        stop_after(patch, 6, lambda: patch.setattr(worker, "publish", stop))
        with pytest.raises(Stopped):
            train(out)
    assert (out / ".training" / ".state.partial").is_dir()
    require_same(out, train(out), undisturbed)


def stop(*_):
    raise Stopped


def test_terminated_by_the_scheduler(tmp_path, undisturbed, monkeypatch):
    """SIGTERM ends training after the step at hand with its state written, then does what it would have done."""
    out = tmp_path / "out"
    before = signal.signal(signal.SIGTERM, stop)
    try:
        with monkeypatch.context() as patch:
            stop_after(patch, 4, lambda: os.kill(os.getpid(), signal.SIGTERM))
            with pytest.raises(Stopped):
                train(out)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert json.loads((out / ".training" / "state" / "trainer_state.json").read_text())["global_step"] == 5
    require_same(out, train(out), undisturbed)


def test_a_complete_training_is_not_repeated(undisturbed, monkeypatch):
    out, report = undisturbed
    monkeypatch.setattr("emo_select.finetune.run.train", lambda job: pytest.fail("trained again"))
    assert train(out) == report


def test_a_damaged_state_is_named(tmp_path, monkeypatch):
    out = tmp_path / "out"
    stop_after(monkeypatch, 2, stop)
    with pytest.raises(Stopped):
        train(out)
    path = out / ".training" / "state" / "optimizer.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"optimizer.safetensors cannot be read"):
        train(out)


def test_states_cost_a_small_share_of_the_time(monkeypatch):
    """The next state waits until the last one's cost is a twentieth of the time."""
    now = [0.0]
    monkeypatch.setattr(saving.time, "monotonic", lambda: now[0])
    from transformers import TrainerControl, TrainerState

    from emo_select.progress import Bar

    keeper = saving.Keeper(count=1, bar=Bar("", None, None, None), state_bytes=0)
    keeper.writers = {"state": lambda step: now.__setitem__(0, now[0] + 2.0), "weights": lambda step: None}
    state, saves = TrainerState(max_steps=1000), []
    keeper.on_train_begin(None, state, TrainerControl())
    for step in range(1, 500):
        now[0] += 1.0
        state.global_step, control = step, TrainerControl()
        keeper.on_step_end(None, state, control)
        if control.should_save:
            keeper.save(step)
            saves.append(step)
    assert saves[0] == 1 and {later - earlier for earlier, later in pairwise(saves)} == {41}
