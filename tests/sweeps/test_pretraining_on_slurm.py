"""`pretrain --profile` on a real Slurm: stopped before its time limit, requeued, cancelled, and going on each time."""

import json
import subprocess

import numpy as np
import pytest
from sweep_cases import wait_until
from typer.testing import CliRunner

pytest.importorskip("olmo_core", reason="needs the extra pretrain: pip install emo-select[pretrain]")

from emo_select.cli.app import app
from emo_select.convert.dcp import TrainingTensors
from emo_select.demo import demo_path
from emo_select.pretrain.engine.starting import saved_steps
from emo_select.sweeps import slurm as scheduler

pytestmark = [pytest.mark.slurm, pytest.mark.usefixtures("slurm")]
STEPS = 150
RECIPE = f"""
name: tiny
seed: 5
tokens: {STEPS * 64}
any_tokenizer: true
tokenizer: {{vocab_size: 128, eos_token_id: 0, pad_token_id: 1}}
model: {{hidden_size: 8, layers: 1, heads: 2, init_std: 0.1, experts: {{count: 4, shared: 1, top_k: 2, width: 8}}}}
objective: {{pool: {{smallest: 1, largest: 3}}}}
data: {{sequence_length: 16, mask_documents: false}}
batch: {{sequences: 4, micro_batch: 4}}
optimizer: {{learning_rate: 0.01}}
schedule: {{warmup_steps: 1}}
save: {{every: 100, temporary_every: 10}}
"""


@pytest.fixture
def command(tmp_path, monkeypatch):
    """`command(folder, *options)`: pretrain the tiny recipe into that folder; what it said."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    (tmp_path / "profiles.yaml").write_text("node: {cpus: 1, time: '00:20:00'}\n")
    told = json.loads((demo_path("emo") / "config.json").read_text())
    tokens = np.random.default_rng(0).integers(4, told["vocab_size"], 4000)
    tokens[19::20] = told["eos_token_id"]
    tokens.astype("u1" if told["vocab_size"] <= 256 else "<u2").tofile(tmp_path / "tokens.npy")

    def call(out, *options):
        words = ["pretrain", "tiny.yaml", "--data", "tokens.npy", "--tokenizer", "demo/emo", "--device", "cpu", "--out",
                 out, *options]
        result = CliRunner().invoke(app, words, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.stderr

    return call


def weights(run, step=STEPS):
    stored = TrainingTensors(run / f"step{step}/model_and_optim")
    return {name: stored.read(name).tolist() for name in stored.tensors}


def test_requeued_cancelled_and_handed_in_again_it_ends_as_undisturbed(command, tmp_path):
    slurm, run = ["--profile", "node", "--profiles", "profiles.yaml"], tmp_path / "run"

    def steps():
        return (saved_steps(run) or [0])[-1]

    job = command("run", *slurm).partition("Slurm job ")[2].split()[0]
    wait_until(lambda: steps() >= 20)
    subprocess.run(["scancel", "--batch", "--signal=USR1", job], check=True)  # what Slurm sends before the time limit
    wait_until(lambda: (entry := scheduler.queue().get(job)) and not entry.running)
    stopped = steps()
    assert 20 <= stopped < STEPS
    wait_until(lambda: steps() > stopped)  # the same job, again
    subprocess.run(["scancel", job], check=True)
    wait_until(lambda: job not in scheduler.queue())
    assert steps() < STEPS
    job = command("run", *slurm).partition("Slurm job ")[2].split()[0]
    wait_until(lambda: job not in scheduler.queue())
    command("alone")
    assert weights(run) == weights(tmp_path / "alone")
    lines = (run / "watch/metrics.jsonl").read_text().splitlines()
    done = [json.loads(line)["step"] for line in lines]
    assert done == sorted(set(done)) and len(done) >= STEPS - 3  # a line at each stop may be missing
