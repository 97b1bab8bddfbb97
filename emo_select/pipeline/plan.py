"""What will happen to each stage of a run, and why; reads records and file sizes, never a weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import partial

from emo_select import record
from emo_select.errors import SpecError, UnknownNameError
from emo_select.evaluate.room import require_room
from emo_select.pipeline.runs import ONE_PASS, STAGES, Run, checkpoint_fingerprint
from emo_select.record import RunRecord, State

CONSUMERS: dict[str, tuple[str, ...]] = {
    "activations": ("select",),
    "select": ("prune",),
    "prune": ("finetune", "eval"),
    "finetune": ("eval",),
    "eval": (),
}


class Action(StrEnum):
    """What happens to a stage."""

    RUN = "run"
    DONE = "done"
    SKIP = "skip"


@dataclass(frozen=True)
class Step:
    """What will happen to one stage of one run, and why."""

    stage: str
    action: Action
    reason: str


def plan(run: Run, stages: Sequence[str] = STAGES, force: Sequence[str] = ()) -> list[Step]:
    """Decide for each stage whether it runs.

    Raises `SpecError` where a stage is asked for whose input is neither there nor asked for, and where the task's
    answers leave no room for a prompt.
    """
    for name in (*stages, *force):
        if name not in STAGES:
            raise UnknownNameError("stage", name, STAGES)
    states = _states(run, stages, force)
    decided: dict[str, Step] = {}
    for stage in reversed(STAGES):
        decided[stage] = _decide(run, stage, states[stage], decided, stages)
    if decided["finetune"].action is Action.RUN and "eval" in stages:
        decided["eval"] = Step("eval", Action.RUN, "new checkpoints")
    if decided["eval"].action is Action.RUN:
        require_room(run.source.config, [run.task], run.spec.evaluation.max_length)
    return [decided[stage] for stage in STAGES]


def evaluated_steps(run: Run) -> list[int]:
    """Checkpoints that evaluation covers now: the start model and the finetuned ones that exist."""
    return sorted({0, *run.paths.checkpoint_steps()})


def downstream(stage: str) -> set[str]:
    """Every stage that reads, directly or not, what `stage` writes."""
    return {later for direct in CONSUMERS[stage] for later in (direct, *downstream(direct))}


def _states(run: Run, stages: Sequence[str], force: Sequence[str]) -> dict[str, tuple[State, str]]:
    """What each stage's record is worth. Behind a stage that will be done anew nothing is."""
    done = record.load(run.paths)
    states = {stage: _state(run, done, stage) for stage in STAGES}
    states |= dict.fromkeys(force, (State.STALE, "forced"))
    for stage in stages:
        if states[stage][0] in (State.STALE, State.MISSING) and not _not_applicable(run, stage):
            states |= {later: (State.STALE, f"{stage} is done anew") for later in downstream(stage)
                       if states[later][0] in (State.DONE, State.GONE)}
    return states


def _state(run: Run, done: RunRecord | None, stage: str) -> tuple[State, str]:
    if stage == "activations":
        return _activations_state(run)
    if stage == "eval":
        return _evaluation_state(run, done)
    return record.state(run.paths, done, stage, partial(run.fingerprint, stage))


def _activations_state(run: Run) -> tuple[State, str]:
    """Statistics are means to an end: where they are missing, they are made only if a selection needs them."""
    found = record.activations_fingerprint(run.tree.activations_record(run.spec))
    current = found is not None and found == run.fingerprint("activations")
    return (State.DONE, "done") if current else (State.GONE, "missing or stale")


def _evaluation_state(run: Run, done: RunRecord | None) -> tuple[State, str]:
    for step in evaluated_steps(run):
        name = f"eval/checkpoint-{step}"
        found, reason = record.state(run.paths, done, name, partial(checkpoint_fingerprint, run, step))
        if found is not State.DONE:
            return State.STALE, f"checkpoint-{step}: {reason}"
    return State.DONE, "done"


def _decide(
    run: Run, stage: str, state: tuple[State, str], later: dict[str, Step], stages: Sequence[str]
) -> Step:
    unneeded = _not_applicable(run, stage)
    if unneeded:
        return Step(stage, Action.SKIP, unneeded)
    if state[0] is State.DONE:
        return Step(stage, Action.DONE, state[1])
    users = [later[name] for name in CONSUMERS[stage] if later[name].action is Action.RUN]
    if stage not in stages:
        return _not_asked(run, stage, users)
    if state[0] is State.GONE and not users and downstream(stage) & set(stages):
        return Step(stage, Action.SKIP, f"{state[1]}; nothing needs it")
    return Step(stage, Action.RUN, state[1])


def _not_asked(run: Run, stage: str, users: list[Step]) -> Step:
    if users and stage != "finetune":  # evaluation takes whichever checkpoints exist
        raise SpecError(
            f"{users[0].stage} needs {stage}, which is not done for {run.paths.directory.name}; add it to --stages."
        )
    return Step(stage, Action.SKIP, "not asked for")


def _not_applicable(run: Run, stage: str) -> str | None:
    if stage in ("activations", "select", "prune") and not run.spec.selects:
        return "this model skips selection"
    if stage == "activations" and run.spec.method not in ONE_PASS:
        return f"{run.spec.method} does not use them"
    if stage == "activations" and run.keeps_all:
        return "all experts are kept"
    return None
