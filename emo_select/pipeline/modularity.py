"""Modularity as it grows: saved steps of a pretraining are converted, pruned for tasks and evaluated."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from emo_select.convert import to_hf
from emo_select.errors import SpecError
from emo_select.pipeline.expand import Wanted, expand
from emo_select.pipeline.plan import plan
from emo_select.pipeline.stages import execute
from emo_select.pretrain.engine.starting import saved_steps
from emo_select.progress import say
from emo_select.spec import Execution
from emo_select.storage import read_json, write_json
from emo_select.tree import Tree

STAGES = ("activations", "select", "prune", "eval")
REPORT = "modularity.json"


def evaluate_steps(out: Path, keep_ks: Sequence[str], tasks: Sequence[str], count: int, *, limit: int | None = None,
                   execution: Execution | None = None) -> list[dict[str, Any]]:
    """Select, prune and evaluate `count` saved steps of a run, spread evenly; a stopped call goes on where it was.

    Writes <out>/modularity.json and a plot, beside the converted checkpoints (hf/) and the run tree (modularity/).
    `limit` caps the test documents of a task. Returns per step, task and keep-k the task's primary score. Raises
    `SpecError` without tasks or checkpoints.
    """
    if not tasks:
        raise SpecError("--evaluate-modularity needs --modularity-task TASK: what the experts are selected for.")
    steps = spread(saved_steps(out), count)
    if not steps:
        raise SpecError(f"{out} has no complete checkpoint to evaluate.")
    settings = {"evaluation": {"limit": limit}} if limit else {}
    told: list[dict[str, Any]] = []
    for step in steps:
        model = out / "hf" / f"step{step}"
        to_hf(out / f"step{step}", model)
        wanted = Wanted([str(model)], tasks, [*keep_ks, "full"], settings=settings)
        told += [{"step": step, **point} for point in _points(wanted, out, execution or Execution())]
        write_json(out / REPORT, told)
    _draw(told, out / "watch" / "modularity.png")
    return told


def spread(steps: Sequence[int], count: int) -> list[int]:
    """At most `count` of the steps, as even as they allow, the last one always; the untrained step 0 never."""
    trained = [step for step in steps if step]
    if len(trained) <= count:
        return trained
    wanted = [trained[-1] * (number + 1) / count for number in range(count)]
    return sorted({min(trained, key=lambda step: abs(step - at)) for at in wanted})


def _points(wanted: Wanted, out: Path, execution: Execution) -> Iterator[dict[str, Any]]:
    """Run one step's product of tasks and keep-k and give the score of each."""
    for run in expand(wanted, Tree.at(out / "modularity"), execution):
        execute(run, plan(run, STAGES, ()))
        [metrics] = run.paths.result(0).glob("task-*-metrics.json")
        score = float(read_json(metrics)["metrics"]["primary_score"])
        say(f"{Path(run.spec.model).name}, {run.spec.task}, {run.spec.keep_k} experts: {score:.3f}")
        yield {"task": run.spec.task, "keep_k": run.spec.keep_k, "score": score}


def _draw(told: Sequence[dict[str, Any]], path: Path) -> None:
    """Score over steps, one line per keep-k, averaged over tasks; nothing without matplotlib."""
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        return
    from emo_select.pretrain.plots import lines

    scores: dict[int, dict[int, list[float]]] = {}
    for point in told:
        scores.setdefault(point["keep_k"], {}).setdefault(point["step"], []).append(point["score"])
    lines({f"{keep_k} experts": [(step, sum(found) / len(found)) for step, found in by_step.items()]
           for keep_k, by_step in sorted(scores.items())}, "step", "score", path)
