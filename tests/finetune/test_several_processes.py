"""Two CPU processes that shard the model (FSDP2 over gloo) against one: the golden run of one process."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from accelerate import FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState
from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
from finetune_cases import (
    CPU,
    GOLDEN,
    family_tokens,
    forked,
    golden_tokens,
    golden_training,
    letter_rows,
    save_family,
)
from safetensors.torch import load_file
from tiny_models import tiny_config
from transformers import AutoConfig, AutoModelForCausalLM, TrainingArguments
from typer.testing import CliRunner

from emo_select.cli.app import app
from emo_select.errors import EmoSelectError, NumericError
from emo_select.finetune import recipe, saving, worker
from emo_select.finetune.job import Job
from emo_select.finetune.run import finetune_tokens
from emo_select.models import register
from emo_select.spec import Training

CASE = "moe_shared1_k8"
TRAINED = ("olmoe", "mixtral", "qwen3_moe")
DIES_AFTER = 3  # steps
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


def test_what_stops_a_process_is_told(tmp_path, monkeypatch):
    """The first process of several writes it down, and the one that started them raises it."""
    one = CPU.model_copy(update={"num_gpus": 1})
    with pytest.raises(NumericError):
        train(tmp_path / "out", one, loss_limit=0.001)
    job = Job.read(tmp_path / "out" / ".training")
    with pytest.raises(SystemExit) as ended:
        worker.main(str(job.folder))
    script = tmp_path / "worker"
    script.write_text(f"#!/bin/sh\nmv {job.folder / 'told'} {job.folder / worker.ERROR}; exit {ended.value.code}")
    script.chmod(0o700)
    (job.folder / worker.ERROR).rename(job.folder / "told")
    monkeypatch.setattr(sys, "executable", str(script))
    with pytest.raises(EmoSelectError, match=r"diverged at step 1 .* last good checkpoint is .*checkpoint-0"):
        worker.launch(job, 2)


def train_family(folder, family, out, **changes):
    """Four steps, each of two micro-batches on one process and of one on each of two."""
    training = Training(batch_size=4, learning_rate="1e-2", warmup=0, **changes)
    execution = CPU.model_copy(update={"micro_batch_size": 2})
    return finetune_tokens(folder / family, family_tokens(), out, training, execution, pad_token=1)


def command(folder, out):
    return ["--quiet", "finetune", "--model", folder / "mixtral", "--train-file", folder / "own.jsonl", "--out", out,
            "--device", "cpu", "--batch-size", 4, "--micro-batch-size", 2, "--lr", "1e-2", "--epochs", 3,
            "--checkpoints", 2, "--json"]  # fmt: skip


def train_much_and_die(folder):
    """In each of two processes: a training per family, one that diverges, and one whose third step is the last."""
    for name in TRAINED:
        train_family(folder, name, folder / f"{name}-two")
        AcceleratorState._reset_state()  # as in a new process
    try:
        train_family(folder, "mixtral", folder / "diverged", loss_limit=0.001)
    except NumericError as error:
        (folder / f"said-by-{os.environ['RANK']}").write_text(str(error))
    AcceleratorState._reset_state()
    save = saving.Keeper.save

    def save_and_die(self, step):
        save(self, step)
        if step == DIES_AFTER:
            os.kill(os.getpid(), signal.SIGKILL)

    saving.SAVING_SHARE, saving.Keeper.save = 1e9, save_and_die  # the state is written at every step
    app([*map(str, command(folder, folder / "killed"))])


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A folder of models, trained by two processes, which then were killed in the training `killed`."""
    folder = tmp_path_factory.mktemp("families")
    for family in TRAINED:
        save_family(family, folder / family)
    (folder / "own.jsonl").write_text(letter_rows())
    assert -signal.SIGKILL in forked(lambda: train_much_and_die(folder), 2)
    return folder


def require_same(sharded, alone):
    """The same losses, up to the order of sums, and weights in the layout they had."""
    for ours, theirs in zip(sharded, alone, strict=True):
        for name, tolerance in {"loss": 1e-4, "ce_loss": 1e-4, "lb_loss": 1e-2, "grad_norm": 1e-3}.items():
            assert ours[name] == pytest.approx(theirs[name], rel=tolerance), name


def test_both_processes_see_that_a_training_diverges(killed):
    first, second = ((killed / f"said-by-{rank}").read_text() for rank in range(2))
    assert first == second and "diverged at step 1" in first


@pytest.mark.parametrize("family", TRAINED)
def test_families_are_sharded_too(killed, family):
    report = json.loads((killed / f"{family}-two" / "training.json").read_text())
    alone = train_family(killed, family, killed / f"{family}-one")
    assert report["processes"] == 2 and alone.processes == 1 and len(alone.history) == 4
    require_same(report["history"], alone.history)
    old, new = (load_file(killed / f"{family}-two" / f"checkpoint-{n}" / "model.safetensors") for n in (0, 4))
    one = load_file(killed / f"{family}-one" / "checkpoint-4" / "model.safetensors")
    assert old.keys() == new.keys() and not any(old[name].equal(new[name]) for name in old)
    assert all(new[name].shape == one[name].shape for name in one)


def test_accelerate_goes_on_with_a_killed_training(killed):
    """`accelerate launch -m emo_select finetune …` continues what two killed processes left; one of its two writes."""
    out = killed / "killed"
    state = json.loads((out / ".training" / "state" / "trainer_state.json").read_text())
    assert state["global_step"] == DIES_AFTER and not (out / "training.json").exists()
    start = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2",
             "--main_process_port=0", "-m", "emo_select", *map(str, command(killed, out))]
    ended = subprocess.run(start, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    report = json.loads(ended.stdout)  # one document: the second process prints nothing
    assert report["processes"] == 2 and report["checkpoints"] == [0, 3, 6] and not (out / ".training").exists()
    alone = CliRunner().invoke(app, [*map(str, command(killed, killed / "alone"))])
    require_same(report["history"], json.loads(alone.stdout)["history"])
    assert report["history"][:DIES_AFTER] == [
        {name: entry[name] for name in report["history"][0]} for entry in state["log_history"]]


@pytest.mark.parametrize(
    "family", ["emo", "olmoe", "mixtral", "qwen2_moe", "deepseek_v3", "gpt_oss", "jamba", "gemma4"])
def test_every_family_is_sharded_per_decoder_layer(family, tmp_path):
    """The wrapping that training asks for picks the decoder layers, all and alone."""
    register()
    config = AutoConfig.for_model("emo", num_hidden_layers=2) if family == "emo" else tiny_config(family)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    asked = TrainingArguments(str(tmp_path), use_cpu=True, **recipe.sharding(config.to_dict(), 2))
    wraps = fsdp2_prepare_auto_wrap_policy(FullyShardedDataParallelPlugin(**asked.fsdp_plugin_args), model)
    assert [module for module in model.modules() if wraps(module)] == list(model.get_decoder().layers)
