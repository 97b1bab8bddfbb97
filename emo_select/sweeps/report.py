"""What a sweep has cost: every attempt counts, also those that failed. Of killed ones the time is not known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from emo_select.sweeps import store
from emo_select.sweeps.graph import KINDS, Unit
from emo_select.sweeps.store import Attempt
from emo_select.tree import SweepPaths


def summary(paths: SweepPaths, units: Sequence[Unit], slowest: int) -> dict[str, Any]:
    """Totals per kind of unit, over all, by host and by GPU, and the slowest attempts.

    Seconds are wall-clock seconds of attempts, GPU-seconds those times the number of GPUs; bytes are the peaks of one
    process.
    """
    known = {unit.name: unit for unit in units}
    tries = [attempt for name, attempts in store.attempts(paths).items() if name in known
             for attempt in store.settled(paths, attempts)]
    ended = [attempt for attempt in tries if attempt.outcome != "running"]
    timed = [attempt for attempt in ended if attempt.outcome != "killed"]
    ranked = sorted(timed, key=lambda attempt: attempt.seconds, reverse=True)[:slowest]
    return {
        "kinds": {kind: _totals([attempt for attempt in ended if attempt.kind == kind])
                  for kind in KINDS if any(attempt.kind == kind for attempt in ended)},
        "total": _totals(ended),
        "running": len(tries) - len(ended),
        "killed": sum(attempt.outcome == "killed" for attempt in ended),
        "hosts": _counted([attempt.host for attempt in ended]),
        "gpus": _counted([gpu for attempt in ended for gpu in attempt.gpus]),
        "commits": _counted([attempt.commit for attempt in ended if attempt.commit]),
        "out_of_memory": [known[attempt.unit].label for attempt in ended if "out_of_memory" in attempt.notes],
        "slowest": [_line(known[attempt.unit], attempt) for attempt in ranked],
    }


def _totals(attempts: Sequence[Attempt]) -> dict[str, Any]:
    return {
        "units": len({attempt.unit for attempt in attempts}),
        "attempts": len(attempts),
        "not_done": sum(attempt.outcome != "done" for attempt in attempts),
        "seconds": round(sum(attempt.seconds for attempt in attempts), 1),
        "gpu_seconds": round(sum(attempt.seconds * len(attempt.gpus) for attempt in attempts), 1),
        "tokens": sum(attempt.tokens for attempt in attempts),
        "peak_memory": max((attempt.peak_memory or 0 for attempt in attempts), default=0),
        "peak_gpu_memory": max((attempt.peak_gpu_memory or 0 for attempt in attempts), default=0),
    }


def _line(unit: Unit, attempt: Attempt) -> dict[str, Any]:
    return {"unit": unit.name, "kind": unit.kind, "label": unit.label, "seconds": round(attempt.seconds, 1),
            "tokens": attempt.tokens, "host": attempt.host, "outcome": attempt.outcome}


def _counted(values: Sequence[str]) -> dict[str, int]:
    return {value: values.count(value) for value in dict.fromkeys(values)}
