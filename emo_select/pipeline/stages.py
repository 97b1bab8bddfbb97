"""Doing what plans say: one function per stage, each from files to files, each finished by its record."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emo_select import progress, record
from emo_select.checkpoint.card import add_scores
from emo_select.errors import EmoSelectError, LockedError
from emo_select.faults import require_writable, translated
from emo_select.ownership import require_own_run
from emo_select.pipeline import runfile
from emo_select.pipeline.adopt import adopt, twin_key
from emo_select.pipeline.cost import written
from emo_select.pipeline.plan import Action, Step, downstream, evaluated_steps, plan
from emo_select.pipeline.runs import Run, checkpoint_fingerprint
from emo_select.record import Measurement, RunRecord
from emo_select.spec import Evaluation, Training
from emo_select.storage import discard, drop_unfinished, exclusive, leftovers, write_bytes

if TYPE_CHECKING:
    from emo_select.evaluate import EvalOptions
    from emo_select.experts import KeepSet, StreamOptions
    from emo_select.experts.calibration import CalibrationTexts

TINY_MODEL = 32 * 2**20  # bytes of weights
Planned = tuple[Run, Sequence[Step]]
Work = Callable[[Run, Measurement], list[Path]]
"""Does a stage, adds notes to the measurement, returns what it wrote."""


def execute_all(planned: Sequence[Planned]) -> list[tuple[Run, EmoSelectError]]:
    """Do every step that is marked to run; returns the runs that failed, after doing all the others.

    Layerwise selections of one model, task and calibration for several keep-k share one pass over the weights.
    """
    failed: list[tuple[Run, EmoSelectError]] = []
    for together in _shared_selections(planned):
        failed += _attempt(together, partial(select_together, together))
    broken = {id(run) for run, _ in failed}
    todo = [(run, steps) for run, steps in planned if id(run) not in broken and _has_work(steps)]
    first: dict[str, Run] = {}
    for run, _ in planned:
        first.setdefault(twin_key(run.spec, keeps_all=run.keeps_all), run)
    with progress.track("Runs", total=len(todo)) as bar:
        for run, steps in todo:
            bar.update(f"{run.spec.model} {run.spec.task} keep-k {run.spec.keep_k} {run.spec.method}")
            other = first[twin_key(run.spec, keeps_all=run.keeps_all)]
            work = partial(execute, run, steps) if other is run else partial(follow, run, other, steps)
            failed += _attempt([run], work)
            bar.advance()
    for run, _ in planned:
        tidy(run)
    return failed


def follow(run: Run, other: Run, steps: Sequence[Step]) -> None:
    """Do the steps of a run after a run that shares stages with it, taking over what would come out the same."""
    if run.keeps_all:  # a keep set says which method it is of, so each run has its own; nothing depends on it
        execute(run, [step for step in steps if step.stage == "select"])
    adopt(run, other)
    left = {step.stage for step in plan(run) if step.action is Action.RUN}
    execute(run, [step for step in steps if step.stage in left])


def _has_work(steps: Sequence[Step]) -> bool:
    return any(step.action is Action.RUN for step in steps)


@translated()
def execute(run: Run, steps: Sequence[Step]) -> None:
    """Do the steps of one run that are marked; each is recorded as soon as its files are in place."""
    require_writable(run.paths.directory, "--output-dir")
    if _has_work(steps):
        run.claim()
    with exclusive(run.paths.lock), _threads_for(run):
        if _has_work(steps):
            begin(run)
            runfile.store(run)
        for step in steps:
            if step.action is Action.RUN:
                with translated(f"The stage {step.stage} stopped", run.paths.directory, written(run, step.stage)):
                    _WORK[step.stage](run)
        _tidy(run)


def _tidy(run: Run) -> None:
    """Remove what killed commands left of stages that are done; what others can go on with stays."""
    done, paths = record.load(run.paths), run.paths
    outputs = {"select": [paths.selection], "prune": [paths.selected_model],
               "finetune": [path for folder in (paths.finetuned_model, paths.results) for path in _hidden(folder)]}
    for stage, finals in outputs.items():
        if finals and record.state(paths, done, stage, partial(run.fingerprint, stage))[0] is record.State.DONE:
            for final in finals:
                drop_unfinished(final)
            if stage == "select":
                discard(paths.selection_work)


def _hidden(folder: Path) -> list[Path]:
    """What the leftovers in a folder were to become."""
    return [left.with_name(left.stem.lstrip(".")) for left in leftovers(folder)]


def tidy(run: Run) -> None:
    """`_tidy` for a run without work, unless somebody works on it; and the statistics that it uses."""
    if leftovers(run.paths.directory) or _hidden(run.paths.finetuned_model) or _hidden(run.paths.results):
        with suppress(LockedError), exclusive(run.paths.lock):
            _tidy(run)
    final = run.tree.activations(run.spec)
    if leftovers(final.parent, final.name):
        with suppress(LockedError), exclusive(run.tree.activations_lock(run.spec)):
            if record.activations_fingerprint(run.tree.activations_record(run.spec)) == run.fingerprint("activations"):
                drop_unfinished(final)


@contextmanager
def _threads_for(run: Run) -> Iterator[None]:
    """One thread for tiny models: their products are done before a second thread has woken up."""
    import torch

    before = torch.get_num_threads()
    if run.source.total_bytes < TINY_MODEL:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _attempt(runs: Sequence[Run], work: Callable[[], None]) -> list[tuple[Run, EmoSelectError]]:
    """A failure concerns these runs alone, also where it is a mistake in this program."""
    try:
        work()
    except EmoSelectError as error:
        return [(run, error) for run in runs]
    except Exception as error:
        failure = EmoSelectError(f"A mistake in emo-select ({type(error).__name__}: {error}); please report it.")
        failure.__cause__ = error
        return [(run, failure) for run in runs]
    return []


def _perform(run: Run, stage: str, fingerprint: str, work: Work) -> None:
    done = _opened(run)
    done = record.forget(run.paths, done, _outdated(done, stage, fingerprint))
    with record.measured() as measured:
        outputs = work(run, measured)
    record.finish(run.paths, done, stage, fingerprint, outputs, measured, run.execution.device)


def begin(run: Run) -> None:
    """Say in the run's directory that it is ours, before anything else is written there.

    Raises `OwnershipError` where somebody else's run is there.
    """
    if record.load(run.paths) is None:
        require_own_run(run.paths.directory)
        record.save(run.paths, _opened(run))


def _opened(run: Run) -> RunRecord:
    done = record.load(run.paths) or RunRecord(spec=run.spec)
    now = {"spec": run.spec, "model_fingerprint": run.source.fingerprint, "data_fingerprint": run.task.fingerprint(),
           "task_name": run.task.name if run.task.name != run.spec.task else None, "task_file": run.task.file}
    return done.model_copy(update=now)


def _outdated(done: RunRecord, stage: str, fingerprint: str) -> set[str]:
    """Records that no longer hold once `stage` writes anew: its own, and those after it unless it repeats itself."""
    before = done.stages.get(stage)
    if before is not None and before.fingerprint == fingerprint:
        return {stage}
    later = downstream(stage.split("/")[0])
    finished = {name for name in done.stages if name.split("/")[0] in later}
    return {stage, *finished} - ({"eval/checkpoint-0"} if stage == "finetune" else set())


def _shared_selections(planned: Sequence[Planned]) -> list[list[Run]]:
    """Runs whose layerwise selection is to be made and that differ only in keep-k, in groups of two and more."""
    groups: dict[str, list[Run]] = {}
    for run, steps in planned:
        marked = any(step.stage == "select" and step.action is Action.RUN for step in steps)
        if marked and run.spec.method == "layerwise" and not run.keeps_all:
            shared = run.spec.model_copy(update={"keep_k": 1, "training": Training(), "evaluation": Evaluation()})
            groups.setdefault(shared.model_dump_json(), []).append(run)
    return [group for group in groups.values() if len(group) > 1]


@translated()
def select_together(runs: Sequence[Run]) -> None:
    """Select the experts of runs that differ only in keep-k (and in what comes later), in one pass over the weights."""
    with ExitStack() as locks:
        for run in runs:
            run.claim()
            locks.enter_context(exclusive(run.paths.lock))
            begin(run)
        with record.measured() as measured:
            chosen = _layerwise(runs[0], sorted({run.spec.keep_k for run in runs}), measured)
        for run in runs:
            share = replace(measured, notes={**measured.notes, "shared_by": len(runs)},
                            seconds=measured.seconds / len(runs))
            _store_selection(run, chosen[run.spec.keep_k], share)
        discard(runs[0].paths.selection_work)


def _activations(run: Run) -> None:
    """Statistics are shared by other runs, so they carry their own fingerprint and have a lock of their own."""
    fingerprint = run.fingerprint("activations")
    with exclusive(run.tree.activations_lock(run.spec), wait=True):
        if record.activations_fingerprint(run.tree.activations_record(run.spec)) == fingerprint:
            return  # made by another process while this one waited
        _perform(run, "activations", fingerprint, partial(_collect, fingerprint))


def collect(run: Run) -> None:
    """Make the statistics that runs of its calibration share, without beginning the run itself."""
    run.claim()
    fingerprint = run.fingerprint("activations")
    with exclusive(run.tree.activations_lock(run.spec), wait=True), record.measured() as measured:
        if record.activations_fingerprint(run.tree.activations_record(run.spec)) != fingerprint:
            _collect(fingerprint, run, measured)


def _collect(fingerprint: str, run: Run, measured: Measurement) -> list[Path]:
    from emo_select.experts import collect_activations

    texts = calibration(run)
    scores = collect_activations(run.source, texts.token_ids, texts.groups, run.tree.activations(run.spec),
                                 stream_options(run), {record.ACTIVATIONS_KEY: fingerprint})
    measured.notes |= {"tokens": sum(scores.tokens), "examples": sum(scores.examples)}
    return []


def _select(run: Run) -> None:
    chosen = record.load(run.paths)
    if chosen and record.state(run.paths, chosen, "select", partial(run.fingerprint, "select"))[0] is record.State.DONE:
        return  # made together with those of other keep-k
    with record.measured() as measured:
        keep_set = _choose(run, measured)
    _store_selection(run, keep_set, measured)
    discard(run.paths.selection_work)


def _choose(run: Run, measured: Measurement) -> KeepSet:
    from emo_select.experts import Scores, select_from_scores, select_random

    spec, config = run.spec, run.source.config
    if run.keeps_all:
        everything = select_random(config, spec.keep_k, about=_about(run))
        return everything.model_copy(update={"method": spec.method})
    if spec.method == "layerwise":
        return _layerwise(run, [spec.keep_k], measured)[spec.keep_k]
    if spec.method == "random":
        return select_random(config, spec.keep_k, spec.calibration.seed, num_shared=spec.num_shared, about=_about(run))
    scores = Scores.load(run.tree.activations(spec))
    return select_from_scores(scores, spec.method, spec.keep_k, config, num_shared=spec.num_shared, about=_about(run))


def _layerwise(run: Run, keep_ks: Sequence[int], measured: Measurement) -> dict[int, KeepSet]:
    from emo_select.experts import select_layerwise

    texts = calibration(run)
    measured.notes["tokens"] = sum(map(len, texts.token_ids))  # for each keep-k
    found = select_layerwise(
        run.source, texts.token_ids, keep_ks, groups=texts.groups, num_shared=run.spec.num_shared, score=run.spec.score,
        options=stream_options(run), work_dir=run.paths.selection_work, about=_about(run),
    )
    return {keep_k: found[keep_k] for keep_k in keep_ks}


def _store_selection(run: Run, keep_set: KeepSet, measured: Measurement) -> None:
    done = _opened(run)
    fingerprint, written = run.fingerprint("select"), run.paths.selection
    done = record.forget(run.paths, done, _outdated(done, "select", fingerprint))
    write_bytes(written, keep_set.as_bytes())
    record.finish(run.paths, done, "select", fingerprint, [written], measured, run.execution.device)


def _prune(run: Run) -> None:
    from emo_select.experts import KeepSet, prune_checkpoint

    def work(run: Run, measured: Measurement) -> list[Path]:
        keep_set = KeepSet.load(run.paths.selection)
        prune_checkpoint(run.source.directory, keep_set, run.paths.selected_model,
                         prediction=run.prediction_layers)
        return [run.paths.selected_model]

    _perform(run, "prune", run.fingerprint("prune"), work)


def _finetune(run: Run) -> None:
    from emo_select.finetune import finetune

    def work(run: Run, measured: Measurement) -> list[Path]:
        texts = run.spec.calibration
        examples = [] if run.spec.training.file else run.task.examples("train", texts.num_shots,
                                                                       leave_out_shots=texts.leave_out_shots)
        machine = run.execution
        if run.source.total_bytes < TINY_MODEL:  # memory is no concern, so nothing is computed twice to save it
            machine = machine.model_copy(update={"gradient_checkpointing": False})
        report = finetune(run.start_model, examples, run.task.delimiter, run.paths.finetuned_model, run.spec.training,
                          machine, replace=True)
        _drop_old_results(run)
        measured.notes |= asdict(report)
        return [run.paths.finetuned_model]

    _perform(run, "finetune", run.fingerprint("finetune"), work)


def _drop_old_results(run: Run) -> None:
    """Results of checkpoints that no longer exist would be read as those of the new training."""
    steps = run.paths.checkpoint_steps()
    for old in set(run.paths.result_steps()) - {0, *steps}:
        discard(run.paths.result(old))


def _evaluate(run: Run) -> None:
    done = record.load(run.paths)
    for step in evaluated_steps(run):
        fingerprint, name = partial(checkpoint_fingerprint, run, step), f"eval/checkpoint-{step}"
        if record.state(run.paths, done, name, fingerprint)[0] is not record.State.DONE:
            _perform(run, name, fingerprint(), partial(_evaluate_checkpoint, step))


def _evaluate_checkpoint(step: int, run: Run, measured: Measurement) -> list[Path]:
    from emo_select.evaluate import evaluate_checkpoint

    model = run.start_model if step == 0 else run.paths.checkpoint(step)
    scores = evaluate_checkpoint(model, [run.task], run.paths.result(step), evaluation_options(run))
    measured.notes |= {"metrics": scores}
    for folder in (run.paths.selected_model, run.paths.checkpoint(0)) if step == 0 else (model,):
        add_scores(folder, run.paths.result(step))
    return [run.paths.result(step)]


def calibration(run: Run) -> CalibrationTexts:
    """The texts that selection sees, as tokens of the run's model."""
    from emo_select.experts import calibration_tokens
    from emo_select.models import load_tokenizer

    return calibration_tokens(run.task, load_tokenizer(str(run.source.directory)), run.spec.calibration)


def stream_options(run: Run) -> StreamOptions:
    """How selection streams the model on this machine."""
    from emo_select.experts import StreamOptions

    machine = run.execution
    return StreamOptions(device=machine.device, dtype=machine.dtype, memory_budget=machine.memory_budget)


def evaluation_options(run: Run) -> EvalOptions:
    """How checkpoints are scored on this machine."""
    from emo_select.evaluate import EvalOptions

    wanted, machine = run.spec.evaluation, run.execution
    return EvalOptions(num_shots=wanted.num_shots, limit=wanted.limit, max_length=wanted.max_length,
                       dtype=machine.dtype, device=machine.device, trust_remote_code=machine.trust_remote_code)


def _about(run: Run) -> dict[str, Any]:
    """What a keep set says of its origin."""
    spec, chosen = run.spec, run.spec.calibration
    origin = {"model": spec.model, "seed": chosen.seed}
    if spec.method == "random" or run.keeps_all:  # others know the fingerprint from the weights or statistics they read
        return {**origin, "fingerprint": run.source.forward_fingerprint}
    return {**origin, "task": spec.task, "split": "validation", "num_shots": chosen.num_shots,
            "num_examples": chosen.num_examples}


_WORK: dict[str, Callable[[Run], None]] = {
    "activations": _activations,
    "select": _select,
    "prune": _prune,
    "finetune": _finetune,
    "eval": _evaluate,
}
