"""Runs that agree up to a stage share its files by hard links instead of doing it twice."""

from __future__ import annotations

import shutil
from pathlib import Path

from emo_select import record
from emo_select.pipeline.plan import downstream
from emo_select.pipeline.runs import Run
from emo_select.record import State
from emo_select.tree import RunPaths, exclusive, link_or_copy, link_tree, partial_directory, publish

SHAREABLE = ("select", "prune", "finetune")


def adopt(run: Run, other: Run) -> None:
    """Give `run` every finished stage of `other` that would come out the same and that `run` has not finished."""
    with exclusive(run.paths.lock):
        for stage in SHAREABLE:
            fingerprint = run.fingerprint(stage)
            theirs, ours = (record.state(paths, record.load(paths), stage, fingerprint)[0]
                            for paths in (other.paths, run.paths))
            if theirs is State.DONE and ours is not State.DONE:
                _take(run, other, stage)


def _take(run: Run, other: Run, stage: str) -> None:
    source = record.load(other.paths)
    assert source is not None  # its stage is done
    done = record.load(run.paths) or source.model_copy(update={"spec": run.spec, "stages": {}})
    finished = {name for name in done.stages if name.split("/")[0] in {stage, *downstream(stage)}}
    done = record.forget(run.paths, done, finished)
    _link(_output(other.paths, stage), _output(run.paths, stage))
    notes = {**source.stages[stage].notes, "shared_with": other.paths.directory.name}
    taken = source.stages[stage].model_copy(update={"seconds": 0.0, "notes": notes})
    record.save(run.paths, done.model_copy(update={"stages": {**done.stages, stage: taken}}))


def _output(paths: RunPaths, stage: str) -> Path:
    return {"select": paths.selection, "prune": paths.selected_model, "finetune": paths.finetuned_model}[stage]


def _link(source: Path, final: Path) -> None:
    if source.is_file():
        partial = final.with_name(f".{final.name}.partial")
        link_or_copy(source, partial)
        partial.replace(final)
        return
    partial = partial_directory(final)
    shutil.rmtree(partial, ignore_errors=True)
    link_tree(source, partial)
    publish(partial, final)
