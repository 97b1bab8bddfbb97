"""The `sweep` commands as a person meets them; the work itself is tested elsewhere."""

import json
import time

import pytest
from sweep_cases import finished_sweep
from typer.testing import CliRunner

from emo_select.cli.app import app
from emo_select.errors import EmoSelectError, SpecError
from emo_select.pipeline import execute, plan, reopen
from emo_select.spec import Execution
from emo_select.sweeps import store
from emo_select.sweeps.control import Control
from emo_select.sweeps.spec import read_sweep
from emo_select.sweeps.store import Attempt, Submission
from emo_select.sweeps.work import perform
from emo_select.tree import Tree


def call(*words):
    return CliRunner().invoke(app, ["sweep", *map(str, words)])


@pytest.fixture
def written(make_sweep, tmp_path):
    """The file of a sweep of three runs, of which two are done, and the sweep."""
    control = finished_sweep(make_sweep, 3, name="mine")
    control.bench.bind(control.runs[2]).paths.record.unlink()
    file = tmp_path / "mine.yaml"
    file.write_text(json.dumps(control.submission.sweep.model_dump(mode="json", exclude_none=True)))
    return file, control


def failed(control):
    """Record a failure of the run that is left, with a log."""
    unit = control.units[-1]
    log = control.paths.logs / "the.log"
    log.parent.mkdir(parents=True)
    log.write_text("first line\nlast line\n")
    store.save_attempt(control.paths, Attempt(
        unit=unit.name, kind="run", number=1, outcome="failed", host="node1", pid=1, started=time.time(),
        seconds=7200.0, error="The loss is [not] a number.", log=str(log)))
    store.save_submission(control.paths, control.submission)


def test_a_plan_says_what_is_done_and_why_the_rest_is_not(written):
    file, control = written
    done = call("plan", file, "-o", control.tree.root)
    assert "mine: 3 runs, 2 done, 1 to do" in done.stdout and "1 × finetune: missing" in done.stdout
    assert "give --tokens-per-second" in done.stdout


def test_a_dry_run_prints_scripts_and_leaves_nothing(written, monkeypatch):
    monkeypatch.setenv("PATH", "")  # no Slurm needed
    file, control = written
    done = call("submit", file, "-o", control.tree.root, "--dry-run", "--partition", "gpu", "--sbatch", "nice=100",
                "--sbatch", "--exclusive")
    assert done.exit_code == 0, done.output
    assert done.stdout.count("#!/bin/bash") == 2 and "#SBATCH --partition=gpu" in done.stdout
    assert "#SBATCH --nice=100" in done.stdout and "#SBATCH --exclusive\n" in done.stdout
    assert not control.paths.directory.exists()


def test_status_names_the_failure_its_reason_and_its_log(written):
    file, control = written
    failed(control)
    shown = call("status", "mine", "-o", control.tree.root).stdout
    assert "The loss is [not] a number." in shown and str(control.paths.logs / "the.log") in shown
    found = json.loads(call("status", file, "-o", control.tree.root, "--json").stdout)
    assert found["states"] == {"done": 2, "missing": 1, "failed": 1}
    [unit] = [unit for unit in found["units"] if unit["state"] == "failed"]
    assert unit["failures"] == 1 and unit["attempt"]["host"] == "node1"


def test_logs_of_a_run(written):
    _, control = written
    failed(control)
    name = control.runs[2].spec.directory_name
    assert call("logs", "mine", name, "-o", control.tree.root, "-n", 1).stdout == "last line\n"
    missing = call("logs", "mine", control.runs[0].spec.directory_name + "_variant", "-o", control.tree.root)
    assert isinstance(missing.exception, EmoSelectError)


def test_a_report_shows_time_and_the_slowest(written):
    _, control = written
    failed(control)
    shown = call("report", "mine", "-o", control.tree.root).stdout
    assert "2.0 h" in shown and control.units[-1].label in shown and "node1 (1)" in shown


def test_a_sweep_by_name_keeps_the_options_of_its_submission(written, monkeypatch):
    file, control = written
    changed = control.submission.model_copy(update={"profile": control.submission.profile.model_copy(
        update={"partition": "gpu", "max_parallel": 4}), "keep_weights": "last"})
    store.save_submission(control.paths, changed)
    monkeypatch.setenv("PATH", "")
    script = call("submit", "mine", "-o", control.tree.root, "--dry-run", "--time", "3h").stdout
    assert "#SBATCH --partition=gpu" in script and "#SBATCH --time=180" in script
    found = json.loads(call("plan", file, "-o", control.tree.root, "--json").stdout)
    assert found["keep_weights"] == "last"


def test_cancelling_what_was_never_handed_in(written):
    file, control = written
    done = call("cancel", file, "-o", control.tree.root)
    assert done.exit_code == 0


@pytest.mark.parametrize(("text", "message"), [
    ("name: a\nmodels: [demo/emo]\ntasks: [demo]\nkeepk: [2]\n", "did you mean 'keep_k'"),
    ("- a\n", "must be a mapping"), ("a: [", "not valid YAML")])
def test_a_wrong_file_is_one_sentence(tmp_path, text, message):
    file = tmp_path / "wrong.yaml"
    file.write_text(text)
    done = call("plan", file, "-o", tmp_path)
    assert message in str(done.exception)


def test_a_task_file_is_found_from_every_directory(tmp_path, monkeypatch):
    folder, elsewhere = tmp_path / "mine", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    rows = [{"question": f"{n} + 1 =", "answer": str(n + 1)} for n in range(20)]
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "task.yaml").write_text(json.dumps({
        "name": "sums", "kind": "generation", "data": "sums.jsonl", "text": "{{ question }}", "answer": "{{ answer }}",
        "splits": {"train": 0.5, "validation": 0.2, "test": 0.3}}))
    (folder / "sweep.yaml").write_text(json.dumps({
        "name": "own", "models": ["demo/emo"], "tasks": ["task.yaml"], "keep_k": [8], "methods": ["random"],
        "execution": {"device": "cpu"}}))
    control = Control(Tree(tmp_path / "tree"), Submission(sweep=read_sweep(folder / "sweep.yaml")))
    store.save_submission(control.paths, control.submission)
    run = control.bench.bind(control.runs[0])
    execute(run, [step for step in plan(run) if step.stage == "select"])
    store.save_jobs(control.paths, control._jobs({unit.name: unit for unit in control.units}, control.watch.look()))

    monkeypatch.chdir(elsewhere)
    monkeypatch.setattr("emo_select.tasks.registry._user_files", {})  # as in another process
    assert reopen(run.paths.directory, Execution()).task.fingerprint() == run.task.fingerprint()
    monkeypatch.setattr("emo_select.tasks.registry._user_files", {})
    perform(control.paths.unit(control.units[0].name))
    monkeypatch.setattr("emo_select.tasks.registry._user_files", {})
    assert "own: 1 run, 0 done" in call("plan", "own", "-o", control.tree.root).stdout


def test_a_missing_file_is_named(tmp_path):
    done = call("plan", tmp_path / "none.yaml", "-o", tmp_path)
    assert isinstance(done.exception, SpecError) and "does not exist" in str(done.exception)
