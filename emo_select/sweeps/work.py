"""Doing one unit: what a Slurm job or a local worker runs. Records every attempt, however it ends."""

from __future__ import annotations

import gc
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from emo_select import progress, record
from emo_select.errors import EmoSelectError, LockedError, StandstillError
from emo_select.pipeline.plan import Action, Step, plan
from emo_select.pipeline.runs import Run
from emo_select.pipeline.stages import execute, follow, select_together
from emo_select.record import StageRecord
from emo_select.storage import exclusive, remove_directory
from emo_select.sweeps import store
from emo_select.sweeps.bench import Bench
from emo_select.sweeps.graph import Unit
from emo_select.sweeps.spec import SweepRun
from emo_select.sweeps.standstill import mark_of, require_progress
from emo_select.sweeps.store import Attempt, Job, Keep, Outcome
from emo_select.tree import SweepPaths, Tree

LOG_VARIABLE = "EMO_SELECT_UNIT_LOG"  # set by the local executor
USUAL_MICRO_BATCH = 8  # what finetuning takes at most unless told otherwise
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory")


class UnitJob:
    """A unit for submitit: called with the path of its file, submitted again with the same path when interrupted."""

    def __call__(self, unit_file: str) -> None:
        perform(Path(unit_file))

    def checkpoint(self, unit_file: str) -> Any:
        """What submitit puts into the queue at a time limit or a preemption."""
        from submitit.helpers import DelayedSubmission

        _note_interruption(Path(unit_file))
        return DelayedSubmission(self, unit_file)


def perform(unit_file: Path) -> None:
    """Do what is left of a unit. Whoever else works on it is waited for, so that it is never done twice.

    Raises what stopped it, after recording that.
    """
    job = store.load_job(unit_file)
    paths = Tree(Path(job.root)).sweep(job.sweep)
    progress.say(f"{job.unit.kind} {job.unit.label} ({job.unit.name})")
    with exclusive(paths.unit_lock(job.unit.name), wait=True), _recorded(paths, job) as notes:
        *before, present = store.attempts_of(paths, job.unit.name)
        require_progress(before, present.job, present.mark)
        smaller = _try(job, notes)
        if smaller is not None:
            _free_memory()
            do(smaller, notes)


def do(job: Job, notes: dict[str, Any]) -> None:
    """Do what is left of a unit, adding to `notes`."""
    bench = Bench(Tree(Path(job.root)))
    unit = _with_micro_batch(job.unit, job.micro_batch_size)
    _WORK[unit.kind](unit, bench, notes)
    if unit.kind == "run":
        for item in unit.runs:
            drop_weights(bench.bind(item), job.keep_weights)


def _try(job: Job, notes: dict[str, Any]) -> Job | None:
    """Do the job; where the memory does not suffice, note that and return what to try instead.

    A function of its own, so that the failed attempt's tensors are not held by its traceback any more.
    """
    try:
        do(job, notes)
    except Exception as error:
        if not ran_out_of_memory(error):
            raise
        size = halved(job)
        progress.say(f"Out of memory; once more with micro-batches of {size}.")
        notes |= {"out_of_memory": _sentence(error), "micro_batch_size": size}
        return job.model_copy(update={"micro_batch_size": size})
    return None


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether an error, or what caused it, is a lack of GPU or host memory."""
    chain: BaseException | None = error
    while chain is not None:
        named = type(chain).__name__ in ("OutOfMemoryError", "MemoryError")
        if named or (isinstance(chain, RuntimeError) and any(text in str(chain).lower() for text in OUT_OF_MEMORY)):
            return True
        chain = chain.__cause__ or chain.__context__
    return False


def halved(job: Job) -> int:
    """The largest micro-batch of at most half the present size that divides the batch."""
    run = job.unit.runs[0]
    now = job.micro_batch_size or run.execution.micro_batch_size or min(USUAL_MICRO_BATCH, run.spec.training.batch_size)
    share = max(1, run.spec.training.batch_size // (run.execution.num_gpus or 1))
    return next(size for size in range(max(1, now // 2), 0, -1) if share % size == 0)


def drop_weights(run: Run, keep: Keep) -> None:
    """Delete weights that an evaluated run no longer needs; keep sets, results and records stay."""
    if keep == "all" or any(step.action is Action.RUN for step in plan(run)):
        return
    steps = run.paths.checkpoint_steps()
    last = steps[-1:] if run.spec.training.lora is None or run.spec.training.lora.merge else [0, *steps[-1:]]
    if run.spec.selects:
        remove_directory(run.paths.selected_model)
    for step in set(steps) - set(last if keep == "last" else ()):
        remove_directory(run.paths.checkpoint(step))


def _fetch(unit: Unit, bench: Bench, notes: dict[str, Any]) -> None:
    """Get and check models and data once, before hundreds of units ask for them at the same time."""
    from emo_select.checkpoint import open_checkpoint

    asked: dict[str, Callable[[], object]] = {}
    for item in unit.runs:
        asked[item.spec.source] = partial(open_checkpoint, item.spec.source, data_dir=item.execution.data_dir)
        asked[item.spec.task] = bench.task(item.spec.task, item.execution).require_data
    problems = {}
    for name, check in asked.items():
        try:
            check()
        except EmoSelectError as error:
            problems[name] = str(error)
            progress.say(f"{name}: {error}")
    notes |= {"checked": len(asked), "problems": problems}
    models = {item.spec.source for item in unit.runs}
    if models <= problems.keys() or asked.keys() - models <= problems.keys():
        raise EmoSelectError(f"Nothing can run: {next(iter(problems.values()))}")


def _activations(unit: Unit, bench: Bench, notes: dict[str, Any]) -> None:
    left = _left(unit, bench, notes)
    if left:
        execute(left[0], [Step("activations", Action.RUN, "shared")])


def _select(unit: Unit, bench: Bench, notes: dict[str, Any]) -> None:
    left = _left(unit, bench, notes)
    if left:
        select_together(left)


def _run(unit: Unit, bench: Bench, notes: dict[str, Any]) -> None:
    first = bench.bind(unit.runs[0])
    done = {first.spec.evaluation: first}
    for run in _left(unit, bench, notes):
        if run is first:
            execute(run, plan(run))
        else:
            follow(run, done.get(run.spec.evaluation, first), plan(run))
            done.setdefault(run.spec.evaluation, run)


def _left(unit: Unit, bench: Bench, notes: dict[str, Any]) -> list[Run]:
    """Runs with work left. What cannot be planned here is opened all the same, so that its own error says why."""
    left = bench.left(unit)
    notes["runs"] = len(left)
    return [_opened(item, bench) for item in left]


def _opened(item: SweepRun, bench: Bench) -> Run:
    from emo_select.checkpoint import open_checkpoint

    run = bench.bind(item)
    run.task.require_data()
    if not run.source.has_weights:
        real = Run(run.spec, run.tree, run.execution)
        real.__dict__.update(source=open_checkpoint(item.spec.source, data_dir=item.execution.data_dir), task=run.task)
        return real
    return run


_WORK: dict[str, Callable[[Unit, Bench, dict[str, Any]], None]] = {
    "fetch": _fetch, "activations": _activations, "select": _select, "run": _run,
}


def _with_micro_batch(unit: Unit, size: int | None) -> Unit:
    if size is None:
        return unit
    runs = tuple(item.model_copy(update={"execution": item.execution.model_copy(update={"micro_batch_size": size})})
                 for item in unit.runs)
    return unit.model_copy(update={"runs": runs})


def _free_memory() -> None:
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


@contextmanager
def _recorded(paths: SweepPaths, job: Job) -> Iterator[dict[str, Any]]:
    """Write the record of an attempt when it begins and again when it ends; the body adds to its notes."""
    attempt = _begin(paths, job)
    store.save_attempt(paths, attempt)
    notes: dict[str, Any] = {}
    outcome: Outcome = "interrupted"
    error: str | None = None
    try:
        yield notes
        outcome = "done"
    except Exception as failure:
        outcome, error = _outcome(failure), _sentence(failure)
        raise
    finally:
        size = notes.pop("micro_batch_size", attempt.micro_batch_size)
        ended = {"outcome": outcome, "error": error, "notes": notes, "micro_batch_size": size}
        store.save_attempt(paths, attempt.model_copy(update=ended | _measured(job, attempt)))


def _outcome(failure: Exception) -> Outcome:
    if isinstance(failure, StandstillError):
        return "stuck"
    return "locked" if isinstance(failure, LockedError) else "failed"


def _begin(paths: SweepPaths, job: Job) -> Attempt:
    name, slurm = job.unit.name, _slurm_job()
    return Attempt(
        unit=name, kind=job.unit.kind, number=store.next_number(paths, name), outcome="running",
        host=socket.gethostname(), pid=os.getpid(), job=slurm, log=_log(paths, slurm), started=time.time(),
        versions=record.versions(), commit=record.commit(), micro_batch_size=job.micro_batch_size,
        mark=mark_of(job),
    )


def _measured(job: Job, attempt: Attempt) -> dict[str, Any]:
    """What the attempt took: its own time and memory, and what the stages that it finished have recorded."""
    stages = list(_finished_since(job, attempt.started))
    return {
        "seconds": round(time.time() - attempt.started, 3),
        "peak_memory": max([record.peak_memory() or 0, *(stage.peak_memory or 0 for stage, _ in stages)]) or None,
        "peak_gpu_memory": max([record.peak_gpu_memory() or 0, *(stage.peak_gpu_memory or 0 for stage, _ in stages)])
        or None,
        "gpus": _gpus(),
        "tokens": sum(int(stage.notes.get("tokens", 0) * epochs) for stage, epochs in stages),
    }


def _finished_since(job: Job, begin: float) -> Iterator[tuple[StageRecord, float]]:
    """Stages that this unit finished, with the passes that each made over its tokens."""
    tree = Tree(Path(job.root))
    for item in job.unit.runs if job.unit.kind != "fetch" else ():
        try:
            done = record.load(tree.run(item.spec))
        except EmoSelectError:
            continue  # a damaged record has stopped the unit already; its own message must not be lost
        for name, stage in (done.stages if done else {}).items():
            mine = datetime.fromisoformat(stage.started).timestamp() >= begin - 1  # recorded in whole seconds
            if mine and "shared_with" not in stage.notes:
                yield stage, item.spec.training.epochs if name == "finetune" else 1.0


def _note_interruption(unit_file: Path) -> None:
    """Say so at once: after asking to be requeued, Slurm may not leave the process the time to unwind."""
    job = store.load_job(unit_file)
    paths = Tree(Path(job.root)).sweep(job.sweep)
    tries = store.attempts_of(paths, job.unit.name)
    if tries and tries[-1].outcome == "running" and tries[-1].pid == os.getpid():
        update = {"outcome": "interrupted", "seconds": round(time.time() - tries[-1].started, 3)}
        store.save_attempt(paths, tries[-1].model_copy(update=update))


def _sentence(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, EmoSelectError) else f"{type(error).__name__}: {text}"[:2000]


def _slurm_job() -> str | None:
    array, index = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    if "SUBMITIT_EXECUTOR" not in os.environ:
        return None  # an interactive job, or none
    return f"{array}_{index}" if array else os.environ.get("SLURM_JOB_ID")


def _log(paths: SweepPaths, slurm_job: str | None) -> str | None:
    if slurm_job is not None:
        return str(paths.logs / f"{slurm_job}_0_log.err")
    return os.environ.get(LOG_VARIABLE)


def _gpus() -> tuple[str, ...]:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return ()
    return tuple(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
