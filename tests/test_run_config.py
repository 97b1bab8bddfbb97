"""One run as a YAML file: everything in it, options given beside it win, the resolved one is kept with the run."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from emo_select.cli.app import app
from emo_select.errors import KeepKError, SpecError

FILE = """
model: demo/emo
task: [demo_railway]
keep_k: 25%
method: random
num_shared: 1
calibration: {seed: 3, max_length: 300}
training:
  epochs: 2
  learning_rate: 0.001
  packing: true
  seed: 5
  freeze: none
  lora: {rank: 4, targets: [attention], merge: true}
evaluation: {limit: 4}
execution: {device: cpu, micro_batch_size: 2}
output_dir: tree
"""


def typed(*words):
    done = CliRunner().invoke(app, [str(word) for word in words])
    if done.exception is not None and not (isinstance(done.exception, SystemExit) and done.exit_code == 0):
        raise done.exception
    return done.stdout


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "run.yaml"
    path.write_text(FILE)
    return path


def planned(*words):
    return json.loads(typed("run", *words, "--dry-run", "--json"))


def test_everything_in_the_file_is_taken(file):
    [run] = planned("--config", file)
    spec = run["spec"]
    assert (spec["model"], spec["task"], spec["keep_k"], spec["method"], spec["num_shared"]) == (
        "demo/emo", "demo_railway", 8, "random", 1)
    assert (spec["calibration"]["seed"], spec["calibration"]["max_length"]) == (3, 300)
    training = spec["training"]
    assert (training["epochs"], training["learning_rate"], training["packing"], training["seed"]) == (
        2, "0.001", True, 5)
    assert training["lora"] == {"rank": 4, "alpha": 32.0, "dropout": 0.0, "targets": ["attention"], "router": False,
                                "shared": False, "merge": True}
    assert spec["evaluation"]["limit"] == 4
    assert Path(run["directory"]).parts[0] == "tree"


def test_options_win_over_the_file(file):
    runs = planned("--config", file, "--keep-k", "4,full", "--lr", "1e-4", "--lora-rank", "2", "--max-length", "200")
    assert [run["spec"]["keep_k"] for run in runs] == [4, 32]
    training = runs[0]["spec"]["training"]
    assert (training["learning_rate"], training["lora"]["rank"], training["lora"]["targets"]) == (
        "1e-4", 2, ["attention"])
    assert runs[0]["spec"]["calibration"]["max_length"] == training["max_length"] == 200


def test_the_resolved_run_is_kept_and_gives_the_same_run_again(file):
    typed("run", "--config", file, "--stages", "select")
    [run] = planned("--config", file)
    kept = Path(run["directory"]) / "config.yaml"
    assert "learning_rate: '0.001'" in kept.read_text()
    [again] = planned("--config", kept, "--output-dir", "tree")
    assert again["spec"] == run["spec"]
    assert again["directory"] == run["directory"]
    assert next(step for step in again["steps"] if step["stage"] == "select")["action"] == "done"


def test_files_are_found_beside_it(file, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    moved = tmp_path / "elsewhere" / "run.yaml"
    moved.write_text("{model: demo/emo, task: demo_railway, keep_k: 8, method: easy_ep, calibration: {file: own.txt}}")
    (tmp_path / "elsewhere" / "own.txt").write_text("A text.\n")
    [run] = planned("-c", moved)
    assert run["spec"]["calibration"]["file"] == str(tmp_path / "elsewhere" / "own.txt")


@pytest.mark.parametrize(("text", "error", "said"), [
    ("{model: demo/emo, trainin: {}}", SpecError, "did you mean 'training'"),
    ("{training: {lora: {rnak: 4}}}", SpecError, "rnak"),
    ("{execution: {divice: cpu}}", SpecError, "did you mean 'execution.device'"),
    ("{keep_k: '12,5%'}", KeepKError, "two ways"),
    ("- a\n- b", SpecError, "must be a mapping"),
])
def test_mistakes_are_one_sentence(file, text, error, said):
    file.write_text(text)
    with pytest.raises(error, match=said):
        planned("--config", file)
