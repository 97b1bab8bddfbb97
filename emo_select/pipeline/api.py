"""`run`: one run from Python, as the command line does it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from emo_select import record
from emo_select.errors import EmoSelectError, keywords_checked
from emo_select.faults import translated
from emo_select.pipeline.expand import Wanted, check_space, expand
from emo_select.pipeline.plan import plan
from emo_select.pipeline.runs import STAGES, Run
from emo_select.pipeline.stages import execute
from emo_select.record import RunRecord
from emo_select.spec import Execution, Frozen, RunSpec
from emo_select.storage import read_json
from emo_select.tree import Tree


class Score(Frozen):
    """How one checkpoint scored: the task's headline metric, its standard error, and over how many documents."""

    task: str
    checkpoint: int
    """0 is the pruned model before finetuning."""
    metric: str
    value: float | None
    error: float | None = None
    documents: int
    metrics: dict[str, Any]
    """Every metric by name, averaged over documents."""

    def __str__(self) -> str:
        error = "" if self.error is None else f" ± {self.error:.4f}"
        value = "–" if self.value is None else f"{self.value:.4f}{error}"
        return f"{self.task}, checkpoint-{self.checkpoint}: {self.metric} {value} (n = {self.documents})"


class RunResult(RunRecord):
    """The record of a run (spec, stages, timings), where it lies, and its scores from the first checkpoint on."""

    directory: Path
    scores: tuple[Score, ...]


@keywords_checked
@translated()
def run(spec: RunSpec, output_dir: str | Path | None = None, *, execution: Execution | None = None,
        stages: Sequence[str] = STAGES, force: Sequence[str] = ()) -> RunResult:
    """Do what is missing or stale of one run and return its record, with the scores of every checkpoint.

    Args:
        spec: what to run. `model`, `task` and `keep_k` are checked before any work.
        output_dir: root of the run tree; None takes EMO_SELECT_OUTPUT_DIR or ./selective_evals_final.
        execution: device, precision, batch sizes; None chooses by machine.
        stages, force: stages to consider, and those to repeat.

    Raises:
        UsageError: before any work. Other `EmoSelectError`s: during work, with everything finished kept.
    """
    tree, machine = Tree.at(output_dir), execution or Execution()
    settings = spec.model_dump(exclude={"model", "task", "keep_k", "method", "selects", "model_path", "model_folder"})
    wanted = Wanted([spec.model], [spec.task], [str(spec.keep_k)], [spec.method], settings)
    [bound] = expand(wanted, tree, machine)
    tree.require_writable()
    steps = plan(bound, stages, force)
    check_space([bound], tree)
    execute(bound, steps)
    done = record.load(bound.paths)
    if done is None:
        raise EmoSelectError(f"Nothing was run for {bound.paths.directory.name}; all its stages were skipped.")
    return RunResult(**dict(done), directory=bound.paths.directory, scores=tuple(_scores(bound)))


def _scores(bound: Run) -> Iterator[Score]:
    for step in bound.paths.result_steps():
        for file in sorted(bound.paths.result(step).glob("task-*-metrics.json")):
            content = read_json(file)
            metrics = content["metrics"]
            yield Score(task=bound.spec.task, checkpoint=step, metric=content["task_config"]["primary_metric"],
                        value=metrics.get("primary_score"), documents=content["num_instances"], metrics=metrics,
                        error=content.get("standard_errors", {}).get("primary_score"))
