"""What one unit does, what it records, and what `resume` makes of the records."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from sweep_cases import finish, finished_sweep, wait_until
from typer.testing import CliRunner

from emo_select import record
from emo_select.cli.app import app
from emo_select.errors import DiskSpaceError, EmoSelectError, NumericError, SpecError, StandstillError
from emo_select.pipeline.plan import Action, plan
from emo_select.spec import RunSpec
from emo_select.storage import exclusive
from emo_select.sweeps import control as controls
from emo_select.sweeps import estimate, local, store
from emo_select.sweeps.control import Control, find
from emo_select.sweeps.graph import build
from emo_select.sweeps.profile import Profile
from emo_select.sweeps.spec import SweepRun
from emo_select.sweeps.standstill import mark_of
from emo_select.sweeps.states import State
from emo_select.sweeps.store import Attempt, Job
from emo_select.sweeps.work import drop_weights, halved, perform, ran_out_of_memory
from emo_select.tree import Tree

SHORT = {"calibration": {"num_examples": 2}, "evaluation": {"limit": 4}}
DEMO = Path(__file__).parents[2] / "sweeps" / "demo.yaml"
TWINS = [{}, {"evaluation": {"num_shots": 0, "limit": 4}}]


def jobs(control, **changes):
    """The files of all units, written."""
    made = [Job(root=str(control.tree.root), sweep="test", unit=unit, keep_weights=control.submission.keep_weights,
                **changes) for unit in control.units]
    store.save_jobs(control.paths, made)
    return {job.unit.kind: control.paths.unit(job.unit.name) for job in made}


def tried(control, unit, *outcomes, **more):
    """Records of earlier attempts at a unit."""
    before = len(store.attempts_of(control.paths, unit.name))
    for number, outcome in enumerate(outcomes, before + 1):
        store.save_attempt(control.paths, Attempt(
            unit=unit.name, kind=unit.kind, number=number, outcome=outcome, host="node1", pid=1, started=time.time(),
            error="it broke" if outcome == "failed" else None, **more))


def states(control):
    fresh = Control(control.tree, control.submission)
    return {standing.unit.name: standing for standing in fresh.watch.look()}


def test_twins_train_once_and_weights_go_after_evaluation(make_sweep):
    control = make_sweep(methods=["random"], variants=TWINS, settings=SHORT, keep_weights="none")
    perform(jobs(control)["run"])
    first, twin = (control.bench.bind(item) for item in control.runs)
    own, shared = (record.load(run.paths).stages for run in (first, twin))
    assert own.keys() == shared.keys() == {"select", "prune", "finetune", "eval/checkpoint-0", "eval/checkpoint-4"}
    assert shared["finetune"].notes["shared_with"] == first.paths.directory.name and shared["finetune"].seconds == 0
    assert "shared_with" not in own["finetune"].notes and "shared_with" not in shared["eval/checkpoint-4"].notes
    for run in (first, twin):
        assert not run.paths.selected_model.exists() and run.paths.checkpoint_steps() == []
        assert run.paths.selection.exists() and run.paths.result_steps() == [0, 4]
        assert all(step.action is not Action.RUN for step in plan(run))
    [attempt] = store.attempts(control.paths)[control.units[-1].name]
    assert attempt.outcome == "done" and attempt.tokens > 0 and attempt.peak_memory > 2**20
    assert attempt.versions["torch"] and attempt.seconds > own["finetune"].seconds


@pytest.mark.parametrize(("keep", "left"), [("none", []), ("last", [8]), ("all", [4, 8])])
def test_evaluated_weights_are_dropped_as_asked(make_sweep, keep, left):
    control = make_sweep(models=[{"id": "demo/emo", "selects": False}], keep_weights=keep)
    run = control.bench.bind(control.runs[0])
    finish(run, steps=(4, 8))
    perform(jobs(control)["run"])
    assert run.paths.checkpoint_steps() == left
    assert all(step.action is not Action.RUN for step in plan(run))


def test_weights_that_are_not_evaluated_yet_stay(make_sweep):
    control = make_sweep(models=[{"id": "demo/emo", "selects": False}])
    run = control.bench.bind(control.runs[0])
    finish(run, steps=(4,))
    run.paths.checkpoint(8).mkdir()
    drop_weights(run, "none")
    assert run.paths.checkpoint_steps() == [4, 8]


def test_out_of_memory_is_tried_once_more_with_half_the_micro_batch(make_sweep, monkeypatch):
    control = make_sweep(models=[{"id": "demo/emo", "selects": False}], execution={"micro_batch_size": 4})
    sizes = []

    def short_of_memory(*arguments, **options):
        sizes.append(arguments[5].micro_batch_size)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr("emo_select.finetune.finetune", short_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        perform(jobs(control)["run"])
    assert sizes == [4, 2]
    [attempt] = store.attempts(control.paths)[control.units[-1].name]
    assert (attempt.outcome, attempt.micro_batch_size) == ("failed", 2)
    assert "out of memory" in attempt.notes["out_of_memory"] and "out of memory" in attempt.error


def test_other_failures_are_recorded_and_not_repeated(make_sweep, monkeypatch):
    control = make_sweep(models=[{"id": "demo/emo", "selects": False}])
    calls = []

    def diverges(*arguments, **options):
        calls.append(1)
        raise NumericError("The loss is not a number.")

    monkeypatch.setattr("emo_select.finetune.finetune", diverges)
    with pytest.raises(NumericError):
        perform(jobs(control)["run"])
    found = states(control)[control.units[-1].name]
    assert (found.state, found.reason, found.failures, len(calls)) == (State.FAILED, "The loss is not a number.", 1, 1)


@pytest.mark.parametrize(("asked", "batch", "gpus", "expected"), [
    (8, 32, None, 4), (1, 32, None, 1), (None, 32, None, 4), (None, 4, None, 2), (6, 36, 2, 3), (5, 30, None, 2)])
def test_half_a_micro_batch_still_divides_the_batch(asked, batch, gpus, expected):
    spec = RunSpec(model="a/b", task="demo_harbor", keep_k=2, training={"batch_size": batch})
    run = SweepRun(spec=spec, execution={"micro_batch_size": asked, "num_gpus": gpus})
    assert halved(Job(root="/", sweep="test", unit=build([run])[-1])) == expected


def test_lack_of_memory_is_seen_through_its_consequences():
    try:
        try:
            raise RuntimeError("CUDA error: out of memory")
        except RuntimeError as cause:
            raise EmoSelectError("The step failed.") from cause
    except EmoSelectError as error:
        assert ran_out_of_memory(error)
    assert not ran_out_of_memory(RuntimeError("shapes do not fit"))


def test_a_run_held_by_someone_else_is_no_failure(make_sweep):
    control = make_sweep(methods=["random"])
    run = control.bench.bind(control.runs[0])
    file = jobs(control)["run"]
    with exclusive(run.paths.lock), pytest.raises(EmoSelectError, match="in use"):
        perform(file)
    found = states(control)[control.units[-1].name]
    assert found.state is State.FAILED and found.failures == 0 and found.attempt.outcome == "locked"


def test_a_unit_that_is_stopped_again_and_again_and_gets_nowhere_is_set_aside(make_sweep, monkeypatch):
    control = finished_sweep(make_sweep, 1)
    unit, file = control.units[-1], jobs(control)["run"]
    answers = control.bench.bind(control.runs[0]).paths.result(0) / ".responses-0.jsonl"
    answers.parent.mkdir(parents=True, exist_ok=True)
    answers.write_text('["a", 1]\n')
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    mark = mark_of(store.load_job(file))
    with answers.open("a") as stream:
        stream.write("\n")  # opened again, and stopped before the next answer
    tried(control, unit, "interrupted", "running", "interrupted", job="7", mark=mark)
    with pytest.raises(StandstillError, match="--time LONGER"):
        perform(file)
    control.bench.bind(control.runs[0]).paths.record.unlink()  # or it would count as done
    found = states(control)[unit.name]
    assert found.state is State.SET_ASIDE and "3 times" in found.reason and found.attempt.outcome == "stuck"


@pytest.mark.parametrize("change", ["answer", "state", "job", "fewer"])
def test_a_unit_that_gets_further_or_was_handed_in_again_goes_on(make_sweep, monkeypatch, change):
    control = finished_sweep(make_sweep, 1)
    unit, file = control.units[-1], jobs(control)["run"]
    folder = control.bench.bind(control.runs[0]).paths.directory / "finetuned_model" / ".training" / "state"
    folder.mkdir(parents=True)
    (folder / "optimizer.json").write_text("1")
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    monkeypatch.setenv("SLURM_JOB_ID", "8" if change == "job" else "7")
    tried(control, unit, *["interrupted"] * (2 if change == "fewer" else 3), job="7",
          mark=mark_of(store.load_job(file)))
    if change == "state":
        os.utime(folder / "optimizer.json", (1, 1))
    if change == "answer":
        (folder / ".responses-0.jsonl").write_text("{}\n")
    perform(file)
    assert store.attempts_of(control.paths, unit.name)[-1].outcome == "done"


def test_resume_takes_what_failed_once_and_leaves_what_failed_twice(make_sweep):
    control = make_sweep(methods=["random"], keep_k=[4, 8, 16])
    once, twice, lost = (unit for unit in control.units if unit.kind == "run")
    tried(control, once, "failed")
    tried(control, twice, "failed", "failed")
    tried(control, lost, "running")
    found = states(control)
    assert [found[unit.name].state for unit in (once, twice, lost)] == [State.FAILED, State.SET_ASIDE, State.LOST]
    assert found[twice.name].reason == "it broke" and "node1" in found[lost.name].reason
    fetch = control.units[0].name
    assert set(control.chosen(list(found.values()))) == {fetch, once.name, lost.name}
    assert set(control.chosen(list(found.values()), again=True)) == {fetch, once.name, twice.name, lost.name}


def test_runs_that_need_what_failed_twice_are_blocked(make_sweep):
    control = make_sweep(keep_k=[4, 8])
    select = next(unit for unit in control.units if unit.kind == "select")
    tried(control, select, "failed", "failed")
    found = states(control)
    assert [standing.state for standing in found.values()] == [
        State.MISSING, State.SET_ASIDE, State.BLOCKED, State.BLOCKED]
    assert control.chosen(list(found.values())) == {}


def test_done_is_what_the_tree_says_not_what_an_attempt_said(make_sweep):
    control = finished_sweep(make_sweep, 2)
    first, second = (unit for unit in control.units if unit.kind == "run")
    tried(control, first, "failed", "failed")
    tried(control, second, "done")
    control.bench.bind(second.runs[0]).paths.record.unlink()
    found = states(control)
    assert found[first.name].state is State.DONE
    assert found[second.name].state is State.STALE and "finetune: missing" in found[second.name].reason


def test_a_unit_that_slurm_killed_for_its_memory_gets_a_smaller_micro_batch(make_sweep):
    control = make_sweep(methods=["random"])
    unit = control.units[-1]
    tried(control, unit, "running")
    lost = states(control)[unit.name]
    killed = controls.Standing(unit, State.LOST, "ended by Slurm: OUT_OF_MEMORY", attempt=lost.attempt)
    assert control._jobs({unit.name: unit}, [killed])[0].micro_batch_size == 4
    assert control._jobs({unit.name: unit}, [lost])[0].micro_batch_size is None


def test_the_local_executor_goes_round_what_failed(make_sweep, tmp_path):
    bad = tmp_path / "texts.jsonl"
    bad.write_text("not json\n")
    whole = {"models": [{"id": "demo/emo", "selects": False}], "variants": [{}, {"training": {"seed": 1}}]}
    control = make_sweep(keep_k=[4, 8], variants=[{"calibration": {"file": str(bad)}}], include=[whole])
    for item in control.runs:
        if not item.spec.selects:
            finish(control.bench.bind(item))
    jobs(control)
    units = {unit.name: unit for unit in control.units}
    outcomes = local.run(control.paths, units, Profile(executor="local", workers=2))
    found = [(unit.kind, outcomes[unit.name]) for unit in control.units]
    assert sorted(found) == [("fetch", "done"), ("run", "blocked"), ("run", "blocked"), ("run", "done"),
                             ("run", "done"), ("select", "failed")]
    failed = next(standing for standing in states(control).values() if standing.state is State.FAILED)
    assert "texts.jsonl" in failed.reason and "texts.jsonl" in Path(failed.attempt.log).read_text()


def test_a_worker_stops_when_who_started_it_is_gone(make_sweep, tmp_path):
    control = finished_sweep(make_sweep, 1)
    file, log = jobs(control)["run"], tmp_path / "log"
    with exclusive(control.paths.unit_lock(control.units[-1].name)):
        worker = subprocess.Popen([sys.executable, "-m", "emo_select.sweeps.worker"], stdin=subprocess.PIPE, text=True)
        worker.stdin.write(f"{file}\t{log}\n")
        worker.stdin.flush()
        wait_until(lambda: log.exists() and control.units[-1].name in log.read_text())
        worker.stdin.close()
        assert worker.wait(60) == 128 + signal.SIGTERM
    assert store.attempts(control.paths) == {}


def test_workers_get_gpus_and_processors_of_their_own(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    found = local.environments(Profile(workers=2, gpus=2))
    assert [worker["CUDA_VISIBLE_DEVICES"] for worker in found] == ["0,1", "2,3"]
    assert all(int(worker["OMP_NUM_THREADS"]) * 2 <= max(2, os.cpu_count()) for worker in found)
    with pytest.raises(SpecError, match="need 6"):
        local.environments(Profile(workers=3, gpus=2))


def test_the_disk_must_hold_what_stays_and_what_is_at_work(make_sweep, monkeypatch):
    control = make_sweep(methods=["random"], keep_k=[8, 16])
    units = [unit for unit in control.units if unit.kind == "run"]
    sizes = [estimate.Estimator(control.bench).pruned_bytes(unit.runs[0]) for unit in units]
    assert 0 < sizes[0] < sizes[1] < control.bench.model("demo/emo", None).total_bytes
    need = {keep: estimate.disk_need(control.bench, units, keep, 1) for keep in ("none", "last", "all")}
    assert need == {"none": 5 * sizes[1], "last": sum(sizes) + 4 * sizes[1], "all": 2 * sum(sizes) + 3 * sizes[1]}
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000, "total": 2000})())
    with pytest.raises(DiskSpaceError, match="keep-weights all"):
        control.submit()
    assert not control.paths.record.exists()


def test_a_plan_counts_shared_work_once(tmp_path):
    done = CliRunner().invoke(app, ["sweep", "plan", str(DEMO), "-o", str(tmp_path), "--tokens-per-second", "1000",
                                    "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["runs"] == {"all": 20, "done": 0, "to_do": 20}
    assert {kind: counts["all"] for kind, counts in found["units"].items()} == {
        "fetch": 1, "activations": 4, "select": 4, "run": 20}
    shared, alone = found["cost"], found["cost_without_sharing"]
    # 4 groups of 2 keep-k: layerwise passes stay 8 (each keep-k sees its own pruned layers), one-pass ones halve
    assert shared["selection_tokens"] * 4 == pytest.approx(alone["selection_tokens"] * 3, rel=1e-3)
    size = sum(Control(Tree(tmp_path), _submission()).bench.model(name, None).total_bytes for name in (
        "demo/emo", "demo/stdmoe"))
    assert alone["bytes_read"] - shared["bytes_read"] == (8 - 4) * size
    assert shared["training_tokens"] == alone["training_tokens"] and shared["unknown"] == 0
    assert found["seconds"] == pytest.approx(shared["tokens"] / 1000)


def test_keeping_all_experts_costs_once_for_all_methods(make_sweep):
    methods = ["layerwise", "easy_ep", "random"]
    control, single = make_sweep(keep_k=[32], methods=methods), make_sweep(keep_k=[32])
    estimator = estimate.Estimator(control.bench)
    shared, alone = estimator.shared(control.units), estimator.alone(control.runs)
    assert shared == estimator.shared(single.units) and shared.selection_tokens == 0
    assert (alone.tokens, alone.bytes_written) == (3 * shared.tokens, 3 * shared.bytes_written)


def test_a_plan_of_absent_models_says_so_and_downloads_nothing(make_sweep):
    control = make_sweep(models=["some/absent"], keep_k=[8, 16])
    estimator = estimate.Estimator(control.bench)
    assert estimator.shared(control.units) == estimate.Cost(unknown=2)
    assert "not on this machine" in control.bench.problems[control.runs[0]]


def test_a_run_is_found_by_a_part_of_its_directory(make_sweep):
    control = make_sweep(methods=["random"], keep_k=[4, 8])
    standings = list(states(control).values())
    assert find(standings, "keepk_4").unit.runs[0].spec.keep_k == 4
    longer = make_sweep(methods=["random"], variants=[{}, {"evaluation": {"limit": 3}}, {"training": {"seed": 1}}])
    name = longer.runs[0].spec.directory_name
    assert all(run.spec.directory_name.startswith(name) for run in longer.runs)
    assert find(list(states(longer).values()), name).unit.runs[0] == longer.runs[0]
    with pytest.raises(EmoSelectError, match="2 units match 'demo_harbor'"):
        find(standings, "demo_harbor")


def test_an_unknown_sweep_is_named_with_those_there_are(make_sweep):
    control = make_sweep()
    store.save_submission(control.paths, control.submission)
    with pytest.raises(SpecError, match=r"No sweep 'other' .*there: test"):
        Control.named(control.tree, "other")
    assert Control.named(control.tree, "test").submission == control.submission


def test_without_slurm_the_message_names_the_other_executor(make_sweep, monkeypatch):
    monkeypatch.setenv("PATH", "")
    control = make_sweep(methods=["random"])
    with pytest.raises(SpecError, match="executor local"):
        control.submit()
    assert store.arrays(control.paths) == []


def test_a_report_counts_every_attempt(make_sweep, tmp_path):
    control = finished_sweep(make_sweep, 2)
    first, second = (unit for unit in control.units if unit.kind == "run")
    tried(control, first, "failed", "done", seconds=30.0, tokens=100, gpus=("H200", "H200"))
    tried(control, second, "done", seconds=5.0, tokens=10)
    from emo_select.sweeps.report import summary

    found = summary(control.paths, control.units, 1)
    assert found["total"] | {"peak_memory": 0} == {
        "units": 2, "attempts": 3, "not_done": 1, "seconds": 65.0, "gpu_seconds": 120.0, "tokens": 210,
        "peak_memory": 0, "peak_gpu_memory": 0}
    assert [line["seconds"] for line in found["slowest"]] == [30.0] and found["hosts"] == {"node1": 3}


def test_a_report_tells_killed_attempts_from_those_at_work(make_sweep):
    from emo_select.sweeps.report import summary

    control = finished_sweep(make_sweep, 1)
    unit = control.units[-1]
    tried(control, unit, "running", "running")
    with exclusive(control.paths.unit_lock(unit.name)):
        found = summary(control.paths, control.units, 1)
        assert (found["running"], found["killed"], found["total"]["not_done"]) == (1, 1, 1)
        assert found["slowest"] == []
    found = summary(control.paths, control.units, 1)
    assert (found["running"], found["killed"], found["kinds"]["run"]["attempts"]) == (0, 2, 2)


def test_planning_a_sweep_imports_no_torch(tmp_path):
    code = ("import sys; from typer.testing import CliRunner; from emo_select.cli.app import app; "
            f"done = CliRunner().invoke(app, ['sweep', 'plan', {str(DEMO)!r}, '-o', {str(tmp_path)!r}]); "
            "assert done.exit_code == 0, done.output; assert not {'torch', 'lm_eval', 'pandas'} & set(sys.modules)")
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def _submission():
    from emo_select.sweeps.spec import read_sweep

    return store.Submission(sweep=read_sweep(DEMO))
