"""Runs whose records say that they are finished, and waiting for other processes."""

from __future__ import annotations

import time
from collections.abc import Callable

from emo_select import record
from emo_select.pipeline.plan import Action
from emo_select.pipeline.runs import Run, checkpoint_fingerprint
from emo_select.record import Measurement, RunRecord
from emo_select.sweeps.control import Control

LONG_AGO = "2026-01-01T00:00:00+00:00"


def finish(run: Run, steps: tuple[int, ...] = ()) -> None:
    """Records that say of every stage of a run that skips selection that it is done, with these checkpoints."""
    assert not run.spec.selects
    done = RunRecord(spec=run.spec)
    evaluated = {f"eval/checkpoint-{step}": checkpoint_fingerprint(run, step) for step in (0, *steps)}
    for step in steps:
        run.paths.checkpoint(step).mkdir(parents=True)
    for stage, fingerprint in {"finetune": run.fingerprint("finetune"), **evaluated}.items():
        done = record.finish(run.paths, done, stage, fingerprint, [], Measurement(started=LONG_AGO), "cpu")


def finished_sweep(make: Callable[..., Control], count: int, **keys: object) -> Control:
    """A sweep of `count` runs that are done already, for tests of what surrounds the work."""
    control = make(models=[{"id": "demo/emo", "selects": False}],
                   variants=[{"training": {"seed": seed}} for seed in range(count)], **keys)
    for item in control.runs:
        finish(control.bench.bind(item))
    assert all(step.action is not Action.RUN for item in control.runs for step in control.bench.steps(item))
    return control


def wait_until(condition: Callable[[], object], seconds: float = 540) -> None:
    """Wait for something that other processes do. Fails when it takes far longer than it ever should."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.2)
