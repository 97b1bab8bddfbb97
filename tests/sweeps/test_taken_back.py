"""What Slurm refuses, what is cancelled, and a limit on parallel units: a sweep is never stuck, and resumed once."""

import subprocess

import pytest

from emo_select.errors import EmoSelectError
from emo_select.sweeps import slurm, store
from emo_select.sweeps.states import State


class Scheduler:
    """Slurm as far as a submitter sees it: what was handed in, what is in the queue, what was taken back."""

    def __init__(self, monkeypatch):
        self.jobs, self.live, self.cancelled, self.refuses = [], {}, [], None
        monkeypatch.setattr(slurm.shutil, "which", lambda name: "/usr/bin/" + name)
        monkeypatch.setattr(slurm, "_submit_block", self.submit)
        monkeypatch.setattr(slurm, "queue", lambda: dict(self.live))
        monkeypatch.setattr(slurm, "ended", lambda jobs: dict.fromkeys(jobs, "CANCELLED"))
        monkeypatch.setattr(slurm, "cancel", lambda jobs: self.cancelled.extend(sorted(jobs)))
        monkeypatch.setattr(slurm, "array_size", lambda profile: 1001)

    def submit(self, paths, block, profile, name, before):
        if self.refuses:
            raise EmoSelectError(self.refuses)
        job = str(100 + len(self.jobs))
        self.jobs.append((job, block))
        ids = [f"{job}_{index}" for index in range(len(block.units))] if len(block.units) > 1 else [job]
        waits = block.after_all or block.after_each is not None
        for one in ids:
            self.live[one] = slurm.Queued("PENDING", "Dependency" if waits else "Resources", name, "1:00")
        return job


@pytest.fixture
def scheduler(monkeypatch):
    return Scheduler(monkeypatch)


def no_slurm():
    raise EmoSelectError("There is no Slurm here (`squeue` is missing).")


def test_what_slurm_refused_is_not_remembered(make_sweep, scheduler):
    control = make_sweep(methods=["layerwise"])
    scheduler.refuses = "Slurm did not take the units: Invalid partition."
    with pytest.raises(EmoSelectError, match="Invalid partition"):
        control.submit()
    assert store.arrays(control.paths) == []
    scheduler.refuses = None
    assert len(control.submit()) == len(control.units) == len(scheduler.live)


@pytest.mark.parametrize("executor", ["slurm", "local"])
def test_an_intention_of_older_versions_does_not_stick(executor, make_sweep, scheduler, monkeypatch):
    control = make_sweep(methods=["random"], profile={"executor": executor})
    array = store.Array(name="x", kind="run", units=(control.units[-1].name,), job=None, submitted=1.0)
    store.save_array(control.paths, array)
    if executor == "local":
        monkeypatch.setattr(slurm, "queue", no_slurm)
        monkeypatch.setattr("emo_select.sweeps.local.run", lambda *args: None)
    assert {standing.state for standing in control.watch.look()} == {State.MISSING}
    assert control.cancel() == 0
    assert control.submit()
    assert executor == "local" or [array.job for array in store.arrays(control.paths)].count(None) == 0


def test_the_limit_counts_what_is_in_the_queue_already(make_sweep, scheduler):
    control = make_sweep(methods=["random"], keep_k=[2, 4, 6, 8, 10, 12], profile={"max_parallel": 3})
    control.submit()
    [(first, block)] = [(job, block) for job, block in scheduler.jobs if block.kind == "run"]
    assert block.at_once == 3
    scheduler.live = {f"{first}_{n}": slurm.Queued("RUNNING", "None", "", "1:00") for n in range(2)}
    control.submit()  # four were taken back, two are still there
    again = [block for _, block in scheduler.jobs[-1:]]
    assert sum(block.at_once for block in again) == 1
    scheduler.live |= {f"900_{n}": slurm.Queued("RUNNING", "None", "", "1:00") for n in range(3)}
    units = [unit for unit in control.units if unit.kind == "run"]
    store.save_array(control.paths, store.Array(name="z", kind="run", units=tuple(u.name for u in units[:3]),
                                                job="900", submitted=9e9))
    blocks = control.blocks({unit.name: unit for unit in units[3:]}, control.watch.look())
    assert all("900" in block.after_jobs for block in blocks if block.after_any is None)


def test_a_child_of_a_cancelled_parent_is_resumed_with_it(make_sweep, scheduler):
    control = make_sweep(methods=["layerwise"], keep_k=[4, 8])
    control.submit()
    jobs = {unit.name: job for job, block in scheduler.jobs for unit in block.units}
    parents = [unit for unit in control.units if unit.kind == "select"]
    children = [unit for unit in control.units if unit.kind == "run"]
    gone = [job for job in scheduler.live if job.split("_")[0] in {jobs[unit.name] for unit in parents}]
    for job in gone:
        del scheduler.live[job]
    handed_in = control.submit()
    assert {unit.name for unit in (*parents, *children)} <= handed_in.keys()
    assert {job.split("_")[0] for job in scheduler.cancelled} == {jobs[unit.name] for unit in children}


def test_a_job_that_can_never_start_is_handed_in_again(make_sweep, scheduler):
    control = make_sweep(methods=["layerwise"])
    control.submit()
    for job, entry in scheduler.live.items():
        if entry.reason == "Dependency":
            scheduler.live[job] = slurm.Queued("PENDING", "DependencyNeverSatisfied", entry.comment, "1:00")
    assert set(control.submit()) and scheduler.cancelled


def test_status_works_where_slurm_is_not(make_sweep, monkeypatch):
    control = make_sweep(methods=["random"])
    store.save_array(control.paths, store.Array(name="x", kind="run", units=(control.units[-1].name,), job="7",
                                                submitted=1.0))
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: (_ for _ in ()).throw(FileNotFoundError(a[0][0])))
    assert {standing.state for standing in control.watch.look()} == {State.MISSING}
