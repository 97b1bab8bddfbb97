"""Sweeps on a real Slurm: what fails, is cancelled, signalled or loses its submitter is finished by `resume`."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from contextlib import ExitStack

import pytest
from sweep_cases import finish, finished_sweep, wait_until

from emo_select import record
from emo_select.cli.sweep_views import follow
from emo_select.errors import EmoSelectError
from emo_select.storage import exclusive
from emo_select.sweeps import slurm as scheduler
from emo_select.sweeps import store
from emo_select.sweeps.states import ALIVE, State

pytestmark = [pytest.mark.slurm, pytest.mark.usefixtures("slurm")]
QUICK = {"calibration": {"num_examples": 4}, "evaluation": {"limit": 8}}
KILLED_SUBMITTER = """
import os, signal, sys
from pathlib import Path
from emo_select.cli.app import main
answers = []
def watch(event, arguments):  # the second record of an array says which id Slurm gave it
    if event == "os.rename" and "/arrays/" in str(arguments[1]) and "submission" not in str(arguments[1]):
        answers.append(arguments[1])
        if len(answers) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(watch)
main()
"""


def hand_in(control, units=None):
    """Submit units whether or not anything is left to do in them."""
    chosen = {unit.name: unit for unit in units or control.units}
    store.save_jobs(control.paths, control._jobs(chosen, control.watch.look()))
    return scheduler.submit(control.paths, control.blocks(chosen, control.watch.look()), control.submission.profile)


def end(control):
    """Wait until nothing of the sweep is in Slurm's queue."""
    mine = {array.job for array in store.arrays(control.paths)}
    wait_until(lambda: not any(job.split("_")[0] in mine for job in scheduler.queue()))


def by_state(control):
    return Counter(standing.state for standing in control.watch.look())


def test_200_units_in_one_array_never_more_at_once_than_allowed(make_sweep):
    control = finished_sweep(make_sweep, 200, profile={"max_parallel": 5})
    arrays = hand_in(control)
    assert [len(array.units) for array in arrays] == [1, 200]
    end(control)
    tries = [attempt for attempts in store.attempts(control.paths).values() for attempt in attempts]
    assert len(tries) == 201 and {attempt.outcome for attempt in tries} == {"done"}
    moments = sorted([(attempt.started, 1) for attempt in tries]
                     + [(attempt.started + attempt.seconds, -1) for attempt in tries])
    at_work, most = 0, 0
    for _, change in moments:
        at_work += change
        most = max(most, at_work)
    assert 1 <= most <= 5


def test_a_failing_unit_stops_only_what_needs_it(make_sweep, tmp_path):
    bad = tmp_path / "texts.jsonl"
    bad.write_text("not json\n")
    whole = {"models": [{"id": "demo/emo", "selects": False}], "variants": [{}, {"training": {"seed": 1}}]}
    control = make_sweep(keep_k=[4, 8], variants=[{"calibration": {"file": str(bad)}}], include=[whole])
    for item in control.runs:
        if not item.spec.selects:
            finish(control.bench.bind(item))
    hand_in(control)
    end(control)
    found = control.watch.look()
    states = Counter((standing.unit.kind, standing.state) for standing in found)
    assert states == {("fetch", State.DONE): 1, ("select", State.FAILED): 1, ("run", State.BLOCKED): 2,
                      ("run", State.DONE): 2}
    [failed] = [standing for standing in found if standing.state is State.FAILED]
    assert "texts.jsonl" in failed.reason and failed.failures == 1
    worked = {name.split("-")[0] for name in store.attempts(control.paths)}
    assert len(store.attempts(control.paths)) == 4 and worked == {"fetch", "select", "run"}


def test_a_signal_before_the_time_limit_requeues_the_unit(make_sweep):
    control = finished_sweep(make_sweep, 1)
    unit = control.units[1]
    with exclusive(control.paths.unit_lock(unit.name)):
        [_, array] = hand_in(control)
        wait_until(lambda: (entry := scheduler.queue().get(array.job)) and entry.running)
        wait_until(lambda: _log(control, array.job).count(unit.name) == 1)
        _signal(array.job)
        wait_until(lambda: _log(control, array.job).count(unit.name) == 2)
        assert control.watch.look()[1].state in (*ALIVE, State.DONE)
    end(control)
    assert [attempt.outcome for attempt in store.attempts(control.paths)[unit.name]] == ["done"]


def test_preempted_then_its_node_failed_then_held_and_yet_no_stage_is_done_twice(make_sweep):
    control = make_sweep(methods=["random"], settings=QUICK, profile={"cpus": 8})  # all of the node
    control.submit()
    run, unit = control.bench.bind(control.runs[0]), control.units[-1]
    [_, array] = store.arrays(control.paths)
    wait_until(run.paths.selected_model.exists)
    finished = dict(record.load(run.paths).stages)

    process = _attempt_at_work(control, unit, 1).pid
    os.kill(process, signal.SIGSTOP)  # so that it cannot finish before Slurm takes its place, and lets it go on
    _slurm("sbatch", "--partition=urgent", "--cpus-per-task=8", "--output=/dev/null", "--wrap=true")
    process = _attempt_at_work(control, unit, 2).pid
    assert store.attempts_of(control.paths, unit.name)[0].outcome == "interrupted"

    node = socket.gethostname().split(".")[0]
    _slurm("scontrol", "update", f"nodename={node}", "state=down", "reason=test")
    os.kill(process, signal.SIGKILL)  # nothing survives where a node fails
    wait_until(lambda: scheduler.queue()[array.job].state == "PENDING")
    _slurm("scontrol", "uhold", array.job)
    _slurm("scontrol", "update", f"nodename={node}", "state=resume", check=False)  # it may have come back by itself
    wait_until(lambda: control.watch.look()[1].state is State.HELD)
    assert control.submit() == {}  # nothing new, but what is held goes on
    assert {standing.state for standing in follow(control, 1)} == {State.DONE}
    outcomes = [attempt.outcome for attempt in store.attempts_of(control.paths, unit.name)]
    assert outcomes == ["interrupted", "running", "done"]
    assert {name: record.load(run.paths).stages[name] for name in finished} == finished and len(finished) >= 2


def test_cancelled_in_the_middle_then_resumed_and_the_same_as_the_local_executor(make_sweep, tmp_path):
    control = make_sweep(keep_k=[4, 8], settings=QUICK)
    control.submit()
    runs = [control.bench.bind(item) for item in control.runs]
    wait_until(lambda: all(run.paths.selection.exists() for run in runs), 500)
    chosen_at = [run.paths.selection.stat().st_mtime_ns for run in runs]
    assert control.cancel() > 0
    end(control)
    assert State.DONE in by_state(control) and not set(ALIVE) & set(by_state(control))
    again = make_sweep(keep_k=[4, 8], settings=QUICK)
    assert {unit.kind for unit in again.submit().values()} == {"fetch", "run"}
    standings = follow(again, 1)
    assert {standing.state for standing in standings} == {State.DONE}
    assert [run.paths.selection.stat().st_mtime_ns for run in runs] == chosen_at

    here = make_sweep(root=tmp_path / "here", keep_k=[4, 8], settings=QUICK, profile={"executor": "local"})
    here.submit()
    for run, twin in zip(runs, [here.bench.bind(item) for item in here.runs], strict=True):
        assert _outcome(run) == _outcome(twin)


def test_what_a_killed_submitter_left_is_found_and_done_once(make_sweep, tmp_path):
    control = make_sweep(models=[{"id": "demo/emo", "selects": False}], settings=QUICK,
                         variants=[{"training": {"seed": seed}} for seed in range(3)])
    file = tmp_path / "test.yaml"
    file.write_text(json.dumps(control.submission.sweep.model_dump(mode="json", exclude_none=True)))
    command = [sys.executable, "-c", KILLED_SUBMITTER, "sweep", "submit", str(file), "-o", str(control.tree.root)]
    killed = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert killed.returncode == -9, killed.stderr
    [lost] = store.arrays(control.paths)
    assert lost.job is None and len(lost.units) == 1
    assert scheduler.orphans(control.paths, scheduler.queue())
    for item in control.runs:  # so that the units are quick
        finish(control.bench.bind(item))
    control.cancel()
    wait_until(lambda: not scheduler.orphans(control.paths, scheduler.queue()))
    hand_in(control)
    end(control)
    assert set(by_state(control)) == {State.DONE}
    assert {len(tries) for name, tries in store.attempts(control.paths).items() if name.startswith("run")} == {1}


def test_what_slurm_refuses_is_forgotten_and_handed_in_once_it_is_right(make_sweep):
    refused = finished_sweep(make_sweep, 2, profile={"partition": "nowhere"})
    with pytest.raises(EmoSelectError, match="nvalid partition"):
        hand_in(refused)
    assert store.arrays(refused.paths) == []
    again = make_sweep(**refused.submission.sweep.model_dump(mode="json", exclude_unset=True, exclude={"name"}))
    hand_in(again)
    end(again)
    assert set(by_state(again)) == {State.DONE}


def test_a_run_whose_select_unit_was_cancelled_is_finished_by_one_resume(make_sweep):
    control = make_sweep(keep_k=[4, 8], settings=QUICK)
    [parent] = [unit for unit in control.units if unit.kind == "select"]
    with exclusive(control.paths.unit_lock(parent.name)):  # it waits, and its children with it
        control.submit()
        jobs = {name: array.job for array in store.arrays(control.paths) for name in array.units}
        wait_until(lambda: (entry := scheduler.queue().get(jobs[parent.name])) and entry.running)
        _slurm("scancel", jobs[parent.name])
        wait_until(lambda: jobs[parent.name] not in scheduler.queue())
    handed_in = control.submit()
    assert {unit.kind for unit in handed_in.values()} == {"fetch", "select", "run"}
    assert {standing.state for standing in follow(control, 1)} == {State.DONE}
    outcomes = Counter(attempt.outcome for unit in control.units if unit.kind == "run"
                       for attempt in store.attempts_of(control.paths, unit.name))
    assert outcomes == {"done": 2}


def test_a_parent_that_is_held_keeps_its_children_waiting_and_resume_lets_it_go(make_sweep):
    control = make_sweep(keep_k=[4, 8], settings=QUICK)
    [parent] = [unit for unit in control.units if unit.kind == "select"]
    with exclusive(control.paths.unit_lock(parent.name)):
        control.submit()
        jobs = {name: array.job for array in store.arrays(control.paths) for name in array.units}
        wait_until(lambda: (entry := scheduler.queue().get(jobs[parent.name])) and entry.running)
        _slurm("scontrol", "requeuehold", jobs[parent.name])
        wait_until(lambda: State.HELD in by_state(control))
        assert by_state(control)[State.DONE] <= 1
    assert control.submit() == {}  # what is held goes on; nothing is handed in twice
    assert {standing.state for standing in follow(control, 1)} == {State.DONE}


def _log(control, job):
    path = control.paths.logs / f"{job}_0_log.err"
    return path.read_text() if path.exists() else ""


def _attempt_at_work(control, unit, number):
    """The record of this attempt, once it has begun."""
    wait_until(lambda: len(store.attempts_of(control.paths, unit.name)) == number)
    return store.attempts_of(control.paths, unit.name)[-1]


def _slurm(*command, check=True):
    subprocess.run(command, check=check, capture_output=True, timeout=60)


def _signal(job):
    from submitit import SlurmJob

    SlurmJob(folder=os.devnull, job_id=job, tasks=[0])._interrupt(timeout=True)


def _outcome(run):
    """The keep set and every metric of a run."""
    files = sorted(run.paths.results.rglob("*-metrics.json"))
    metrics = {str(file.relative_to(run.paths.results)): json.loads(file.read_text())["metrics"] for file in files}
    assert metrics and len(record.load(run.paths).stages) == 5
    return json.loads(run.paths.selection.read_text()), metrics


def test_a_limit_on_parallel_units_holds_after_a_resume(make_sweep):
    control = make_sweep(methods=["random"], keep_k=[2, 4, 6, 8, 10, 12], profile={"max_parallel": 2})
    runs = [unit for unit in control.units if unit.kind == "run"]

    def at_work():
        return [one for one, entry in scheduler.queue().items() if entry.running]

    with ExitStack() as locks:
        for unit in runs:  # whatever begins waits here
            locks.enter_context(exclusive(control.paths.unit_lock(unit.name)))
        control.submit()
        wait_until(lambda: len(at_work()) == 2)
        [array] = [array for array in store.arrays(control.paths) if array.kind == "run"]
        subprocess.run(["scancel", f"{array.job}_4", f"{array.job}_5"], check=True)
        wait_until(lambda: by_state(control)[State.MISSING] == 2)
        again = control.submit()
        assert sum(unit.kind == "run" for unit in again.values()) == 2
        time.sleep(5)  # longer than Slurm takes to begin one
        assert len(at_work()) == 2
        control.cancel()
    end(control)
