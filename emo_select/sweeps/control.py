"""Carrying out a sweep: what to hand in, where, and what must be true before."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from emo_select.errors import EmoSelectError
from emo_select.names import TASKS, claim
from emo_select.ownership import MODEL_NOTE
from emo_select.storage import exclusive, require_space, stop_holder
from emo_select.sweeps import estimate, local, slurm, store
from emo_select.sweeps.bench import Bench, pending
from emo_select.sweeps.graph import Unit, build
from emo_select.sweeps.slurm import Block
from emo_select.sweeps.spec import SweepRun, expand_sweep
from emo_select.sweeps.states import HANDED_IN, Standing, State, Watch
from emo_select.sweeps.store import Job, Submission
from emo_select.sweeps.work import halved
from emo_select.tree import SweepPaths, Tree

OUT_OF_HOST_MEMORY = "OUT_OF_MEMORY"  # Slurm's word for it


@dataclass
class Control:
    """A sweep in a tree. Planning it needs neither torch nor the models themselves, only their headers."""

    tree: Tree
    submission: Submission
    bench: Bench = field(init=False)

    def __post_init__(self) -> None:
        self.bench = Bench(self.tree)

    @classmethod
    def named(cls, tree: Tree, name: str) -> Control:
        """A sweep that was submitted before. Raises `SpecError` where it was not."""
        return cls(tree, store.load_submission(tree, name))

    @property
    def paths(self) -> SweepPaths:
        """Where its state lies."""
        return self.tree.sweep(self.submission.sweep.name)

    @cached_property
    def runs(self) -> list[SweepRun]:
        """Every run of the sweep."""
        return expand_sweep(self.submission.sweep, self.tree)

    @cached_property
    def units(self) -> list[Unit]:
        """Every unit of work, each after those it needs."""
        return build(self.runs)

    @cached_property
    def watch(self) -> Watch:
        """Its states, now and later."""
        return Watch(self.paths, self.units, self.bench)

    def chosen(self, standings: Sequence[Standing], *, again: bool = False) -> dict[str, Unit]:
        """Units to hand in: work left, not in the queue, not set aside (unless `again`), nothing needed in the way."""
        by_name = {standing.unit.name: standing for standing in standings}
        found: dict[str, Unit] = {}
        for name, unit in pending(self.bench, self.units).items():
            if by_name[name].state in HANDED_IN or (by_name[name].state is State.SET_ASIDE and not again):
                continue
            if all(need in found or by_name[need].state in (*HANDED_IN, State.DONE) for need in unit.needs):
                found[name] = unit
        return found if any(unit.kind != "fetch" for unit in found.values()) else {}

    def blocks(self, chosen: Mapping[str, Unit], standings: Sequence[Standing]) -> list[Block]:
        """The arrays that Slurm will be given."""
        profile = self.submission.profile
        live = {standing.unit.name: standing.job for standing in standings
                if standing.state in HANDED_IN and standing.job is not None}
        return slurm.blocks(chosen, slurm.array_size(profile), profile.max_parallel, live)

    def submit(self, *, again: bool = False, began: Callable[[int], None] = lambda units: None,
               changed: Callable[[Unit, str], None] = lambda unit, outcome: None) -> dict[str, Unit]:
        """Hand in what has to be done (Slurm) or do it (local), and return it. One submitter at a time.

        Raises `DiskSpaceError` before anything starts where the weights would not fit.
        """
        self.tree.require_writable()
        with exclusive(self.paths.lock):
            self._take_back_orphans()
            self.watch.needs_queue = self.submission.profile.executor == "slurm"
            standings = _without_forsaken(_released(self.watch.look()))
            chosen = self.chosen(standings, again=again)
            self._check_disk(chosen)
            self._take_names()
            store.save_submission(self.paths, self.submission)
            store.save_jobs(self.paths, self._jobs(chosen, standings))
            began(len(chosen))
            if self.submission.profile.executor == "slurm":
                slurm.submit(self.paths, self.blocks(chosen, standings), self.submission.profile)
            else:
                local.run(self.paths, chosen, self.submission.profile, changed)
        return chosen

    def cancel(self) -> int:
        """Take back everything that is in Slurm's queue, and stop who carries the sweep out on this machine.

        Returns how many units were in the queue.
        """
        stop_holder(self.paths.lock)
        arrays = store.arrays(self.paths)
        mine = [array.job for array in arrays if array.job is not None]
        try:
            live = slurm.queue() if arrays else {}
        except EmoSelectError:
            if mine:
                raise
            live = {}  # Slurm has never taken anything of it
        jobs = [job for job in live if job.split("_")[0] in mine]
        slurm.cancel({job.split("_")[0] for job in jobs} | set(slurm.orphans(self.paths, live)))
        return len(jobs)

    def _take_back_orphans(self) -> None:
        """Take back what a killed submitter handed in without noting its id, and forget its intentions."""
        unknown = [array for array in store.arrays(self.paths) if array.job is None]
        if not unknown:
            return
        try:
            slurm.cancel(slurm.orphans(self.paths, slurm.queue()))
        except EmoSelectError:
            if self.submission.profile.executor == "slurm":
                raise
            return  # a unit that is at work somewhere else is locked there
        for array in unknown:
            store.drop_array(self.paths, array)

    def _take_names(self) -> None:
        """So that units, which know only their own runs, find every model and task under the name it has here."""
        for run in self.runs:
            note = self.tree.root / run.spec.model_directory / MODEL_NOTE
            claim(note, run.spec.model, run.spec.model_path)
            if run.execution.task_file is not None:
                task = self.bench.task(run.spec.task, run.execution)
                claim(self.tree.root / TASKS / f"{run.spec.task}.json", task.name, task.file, task.fingerprint())

    def _check_disk(self, chosen: Mapping[str, Unit]) -> None:
        keep, profile = self.submission.keep_weights, self.submission.profile
        at_once = profile.workers if profile.executor == "local" else profile.max_parallel
        needed = estimate.disk_need(self.bench, chosen.values(), keep, at_once)
        require_space(self.tree.root, needed, f"Writing the weights of {len(chosen)} units (--keep-weights {keep})")

    def _jobs(self, chosen: Mapping[str, Unit], standings: Sequence[Standing]) -> list[Job]:
        by_name = {standing.unit.name: standing for standing in standings}
        jobs = []
        for unit in chosen.values():
            job = Job(root=str(self.tree.root.absolute()), sweep=self.submission.sweep.name, unit=unit,
                      keep_weights=self.submission.keep_weights)
            jobs.append(_with_less_memory(job, by_name[unit.name]))
        return jobs


def _released(standings: Sequence[Standing]) -> list[Standing]:
    """Let go what the queue holds, as it does with a job whose node failed while it started."""
    held = [standing for standing in standings if standing.state is State.HELD]
    slurm.release(standing.job for standing in held if standing.job is not None)
    return [replace(standing, state=State.QUEUED) if standing in held else standing for standing in standings]


def _without_forsaken(standings: Sequence[Standing]) -> list[Standing]:
    """Take back what waits in the queue for a job that is not there any more, so that it can be handed in again."""
    found: dict[str, Standing] = {}
    for standing in standings:
        gone = [need for need in standing.unit.needs if found[need].state not in (*HANDED_IN, State.DONE)]
        lost = standing.state is State.WAITING and (gone or standing.reason)
        found[standing.unit.name] = replace(standing, state=State.MISSING) if lost else standing
    jobs = [old.job for old, new in zip(standings, found.values(), strict=True) if old is not new and old.job]
    slurm.cancel(jobs)
    return list(found.values())


def _with_less_memory(job: Job, standing: Standing) -> Job:
    """Keep a micro-batch that was cut before. Where Slurm killed the unit for its memory, nobody has cut it yet."""
    last = standing.attempt
    if job.unit.kind != "run" or last is None:
        return job
    before = job.model_copy(update={"micro_batch_size": last.micro_batch_size})
    killed = OUT_OF_HOST_MEMORY in standing.reason
    return before.model_copy(update={"micro_batch_size": halved(before)}) if killed else before


def find(standings: Sequence[Standing], text: str) -> Standing:
    """The unit whose name, or run directory, contains `text`. Raises `EmoSelectError` unless it is one."""
    names = {standing.unit.name: _names(standing.unit) for standing in standings}
    exact = [standing for standing in standings if text in names[standing.unit.name]]
    found = exact or [standing for standing in standings if any(text in name for name in names[standing.unit.name])]
    if len(found) == 1:
        return found[0]
    some = ", ".join(standing.unit.label for standing in found[:5])
    raise EmoSelectError(f"{len(found)} units match {text!r}{': ' + some if some else ''}; give one run's directory.")


def _names(unit: Unit) -> list[str]:
    """What a unit may be called: its name, its label, and the directories of its runs."""
    runs = [item.spec for item in unit.runs] if unit.kind == "run" else []
    directories = [spec.directory_name for spec in runs]
    return [unit.name, unit.label, *directories, *(f"{spec.model_directory}/{spec.directory_name}" for spec in runs)]
