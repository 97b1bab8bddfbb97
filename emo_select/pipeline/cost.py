"""What a plan will cost: tokens forward, bytes written, and time where this machine has done the like before."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

from emo_select import record
from emo_select.pipeline.adopt import twin_key
from emo_select.pipeline.expand import pruned_bytes
from emo_select.pipeline.plan import Action, Step
from emo_select.pipeline.runs import Run
from emo_select.tree import Tree

if TYPE_CHECKING:
    from emo_select.tasks import Task

CHARACTERS_PER_TOKEN = 4.0  # of English text under the usual vocabularies; the plan must not need the tokenizer
SAMPLE = 64
TRAINING_PASSES = 3  # a training step is a forward pass and a backward pass that costs two


@dataclass(frozen=True)
class Cost:
    """Estimated cost of the steps that will run. `seconds` is None where nothing alike was measured here."""

    tokens: int = 0
    bytes: int = 0
    seconds: float | None = None


def of(run: Run, steps: Sequence[Step]) -> Cost:
    """Estimate one run."""
    todo = [step.stage for step in steps if step.action is Action.RUN]
    size = pruned_bytes(run) if run.spec.selects else run.source.total_bytes
    written = size * (("prune" in todo) + ("finetune" in todo) * run.spec.training.checkpoints)
    return Cost(sum(_tokens(run, stage) for stage in todo), written, _seconds(run, todo))


def of_all(planned: Iterable[tuple[Run, Sequence[Step]]]) -> list[Cost]:
    """Estimate each run of a plan; one that takes everything over from a run before it costs nothing."""
    before: set[str] = set()
    costs = []
    for run, steps in planned:
        key = twin_key(run.spec, keeps_all=run.keeps_all)
        costs.append(Cost(seconds=0.0) if key in before else of(run, steps))
        before.add(key)
    return costs


def total(planned: Iterable[tuple[Run, Sequence[Step]]]) -> Cost:
    """Add up the costs of a plan; the time is known only if every run's is."""
    costs = of_all(planned)
    known = [cost.seconds for cost in costs if cost.seconds is not None]
    seconds = sum(known) if len(known) == len(costs) else None
    return Cost(sum(cost.tokens for cost in costs), sum(cost.bytes for cost in costs), seconds)


def duration(seconds: float) -> str:
    """Seconds in the largest unit that reads well."""
    for size, name in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.1f} {name}"
    return f"{seconds:.0f} s"


def _tokens(run: Run, stage: str) -> int:
    spec, task = run.spec, run.task
    if stage in ("activations", "select"):
        if stage == "select" and spec.method != "layerwise":
            return 0
        drawn = spec.calibration.num_examples or len(task.docs("validation"))
        return int(min(drawn, len(task.docs("validation"))) * _per_text(task, "validation", spec.calibration.num_shots))
    if stage == "finetune":
        return int(len(task.docs("train")) * spec.training.epochs * _per_text(task, "train", None) * TRAINING_PASSES)
    if stage == "eval":
        docs = min(spec.evaluation.limit or len(task.docs("test")), len(task.docs("test")))
        return int(docs * _per_text(task, "test", spec.evaluation.num_shots)) * 2  # before and after finetuning
    return 0


def _per_text(task: Task, split: str, num_shots: int | None) -> float:
    """Mean tokens of the first texts of a split."""
    texts = task.examples(split, num_shots, limit=SAMPLE)
    return sum(len(example.text) for example in texts) / max(len(texts), 1) / CHARACTERS_PER_TOKEN


def _seconds(run: Run, stages: Sequence[str]) -> float | None:
    """Sum of the median times that these stages took for other runs of this model and task in the tree."""
    times = _measured(run.tree, run.spec.model_directory, run.spec.task)
    if any(stage not in times for stage in stages if stage != "activations"):
        return None
    return sum(median(times[stage]) for stage in stages if stage in times)


def _measured(tree: Tree, model: str, task: str) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {}
    for paths in tree.runs(model):
        done = record.load(paths) if paths.directory.name.startswith(f"{task}_keepk_") else None
        for name, stage in (done.stages if done else {}).items():
            times.setdefault(name.split("/")[0], []).append(stage.seconds)
    return times
