"""Runs that agree up to a stage share its files by hard links instead of doing it twice.

Such are runs that differ only in how they are evaluated, and those of several methods that all keep every expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from emo_select import record
from emo_select.ownership import FINETUNED, PRUNED, RESULTS, require_own_run
from emo_select.pipeline.plan import downstream, evaluated_steps
from emo_select.pipeline.runs import Run, checkpoint_fingerprint
from emo_select.record import State
from emo_select.spec import Calibration, Evaluation, RunSpec
from emo_select.storage import discard, exclusive, link_or_copy, link_tree, partial_directory, publish
from emo_select.tree import RunPaths

SHAREABLE = ("select", "prune", "finetune")
_WHAT = {"prune": PRUNED, "finetune": FINETUNED}


def twin_key(spec: RunSpec, *, keeps_all: bool) -> str:
    """Equal for runs that share everything up to finetuning."""
    same: dict[str, Any] = {"evaluation": Evaluation()}
    if keeps_all:  # how experts are chosen does not matter, but the shots of the examples do
        same |= {"method": "layerwise", "score": RunSpec.model_fields["score"].default,
                 "calibration": Calibration(num_shots=spec.calibration.num_shots,
                                            leave_out_shots=spec.calibration.leave_out_shots)}
    return spec.model_copy(update=same).model_dump_json()


def adopt(run: Run, other: Run) -> None:
    """Give `run` every finished stage of `other` that would come out the same and that `run` has not finished."""
    run.claim()
    with exclusive(run.paths.lock):
        require_own_run(run.paths.directory)
        for stage, fingerprint in _shareable(run):
            theirs, ours = (record.state(paths, record.load(paths), stage, fingerprint)[0]
                            for paths in (other.paths, run.paths))
            if theirs is State.DONE and ours is not State.DONE:
                _take(run, other, stage)


def _shareable(run: Run) -> Iterator[tuple[str, Callable[[], str]]]:
    """Stages and their fingerprints; those of evaluation by checkpoint, once the checkpoints have been taken over."""
    for stage in SHAREABLE:
        yield stage, partial(run.fingerprint, stage)
    for step in evaluated_steps(run):
        yield f"eval/checkpoint-{step}", partial(checkpoint_fingerprint, run, step)


def _take(run: Run, other: Run, stage: str) -> None:
    source = record.load(other.paths)
    assert source is not None  # its stage is done
    done = record.load(run.paths) or source.model_copy(update={"spec": run.spec, "stages": {}})
    later = downstream(stage) if stage in SHAREABLE else ()
    finished = {name for name in done.stages if name == stage or name.split("/")[0] in later}
    done = record.forget(run.paths, done, finished)
    _link(_output(other.paths, stage), _output(run.paths, stage), _WHAT.get(stage, RESULTS))
    notes = {**source.stages[stage].notes, "shared_with": other.paths.directory.name}
    taken = source.stages[stage].model_copy(update={"seconds": 0.0, "notes": notes})
    record.save(run.paths, done.model_copy(update={"stages": {**done.stages, stage: taken}}))


def _output(paths: RunPaths, stage: str) -> Path:
    if stage not in SHAREABLE:
        return paths.result(int(stage.rpartition("-")[2]))
    return {"select": paths.selection, "prune": paths.selected_model, "finetune": paths.finetuned_model}[stage]


def _link(source: Path, final: Path, what: str) -> None:
    if source.is_file():
        partial = final.with_name(f".{final.name}.partial")
        link_or_copy(source, partial)
        partial.replace(final)
        return
    partial = partial_directory(final)
    discard(partial)
    link_tree(source, partial)
    publish(partial, final, what)
