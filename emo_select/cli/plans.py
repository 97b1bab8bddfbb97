"""How a plan and its failures are shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.text import Text

from emo_select import progress
from emo_select.cli.common import emit

if TYPE_CHECKING:
    from emo_select.pipeline import Planned, Run, Step
    from emo_select.pipeline.cost import Cost

HEADS = ("model", "task", "keep-k", "method")
SHOWN = 30
_LOOK = {"run": ("run", "bold yellow"), "done": ("done", "green"), "skip": ("–", "dim")}
_LINK = {**_LOOK, "run": ("link", "cyan")}  # the same as in a run above it


def show(planned: Sequence[Planned], *, as_json: bool, tokens_per_second: float | None = None) -> None:
    """Print what will happen to each run: as a table on stderr, or everything as JSON on stdout."""
    from emo_select.pipeline import cost

    costs = cost.of_all(planned, tokens_per_second)
    if as_json:
        emit([as_data(run, steps) | {"cost": asdict(each)} for (run, steps), each in zip(planned, costs, strict=True)])
        return
    _show_table(planned)
    for line in summary(planned, cost.total(costs)):
        progress.say(line)


def as_data(run: Run, steps: Sequence[Step]) -> dict[str, Any]:
    """One run of a plan as plain data."""
    return {
        "directory": str(run.paths.directory),
        "spec": run.spec.model_dump(mode="json"),
        "steps": [asdict(step) for step in steps],
    }


def summary(planned: Sequence[Planned], total: Cost) -> list[str]:
    """What the whole plan needs, in words."""
    from emo_select.pipeline import cost

    working = sum(any(step.action == "run" for step in steps) for _, steps in planned)
    lines = [f"{len(planned)} run{'s' * (len(planned) != 1)}, {working} with work to do."]
    if working:
        known = total.seconds is not None
        time = (f"about {cost.duration(total.seconds or 0)}" if known
                else "time not measured on this machine yet (--tokens-per-second gives a speed)")
        lines.append(f"To do: about {total.tokens:,} tokens forward, {total.bytes / 1e9:.2f} GB to write, at most "
                     f"{total.memory / 1e9:.2f} GB of memory, {time}.")
    return lines


def show_failures(failures: Sequence[tuple[Run, Exception]]) -> None:
    """Name every run that failed and why."""
    for run, error in failures:
        progress.complain(f"Failed: {run.spec.model} {run.paths.directory.name}: {error}")


def _show_table(planned: Sequence[Planned]) -> None:
    """One line per run; what all runs share, and stages that none has, take no column."""
    from emo_select.cli.columns import Column, show
    from emo_select.pipeline.adopt import twin_key

    names = {run: (run.spec.model, run.spec.task, str(run.spec.keep_k), run.spec.method) for run, _ in planned}
    apart = [n for n in range(4) if n == 1 or len({each[n] for each in names.values()}) > 1]
    shared = [next(iter(names.values()))[n] for n in range(4) if n not in apart]
    stages = [n for n, _ in enumerate(planned[0][1]) if any(steps[n].action != "skip" for _, steps in planned)]
    rows: list[list[Text]] = []
    seen: set[str] = set()
    for run, steps in planned[:SHOWN]:
        key = twin_key(run.spec, keeps_all=run.keeps_all)
        look = _LINK if key in seen else _LOOK
        seen.add(key)
        rows.append([Text(names[run][n]) for n in apart] + [Text(*look[steps[n].action.value]) for n in stages])
    columns = [*(HEADS[n] for n in apart), *(planned[0][1][n].stage for n in stages)]
    show([Column(name, right=name == "keep-k") for name in columns], rows, talk=True,
         title="Plan" + (f" for {', '.join(_said(shared, apart))}" if shared else ""))
    if len(planned) > SHOWN:
        progress.say(f"… {len(planned) - SHOWN} more")


def _said(shared: Sequence[str], apart: Sequence[int]) -> list[str]:
    return [f"keep-k {text}" if n == 2 else text
            for n, text in zip((n for n in range(4) if n not in apart), shared, strict=True)]
