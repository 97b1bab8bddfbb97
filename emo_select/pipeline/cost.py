"""What a plan will cost: tokens forward, bytes written, memory, and time by speeds measured here or given."""

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
from emo_select.tasks import lengths
from emo_select.tree import Tree

if TYPE_CHECKING:
    from emo_select.checkpoint import Checkpoint
    from emo_select.spec import RunSpec
    from emo_select.tasks import Task

FLOAT32_BYTES = 4
FULL_TRAINING_BYTES = 16  # per parameter: weight, gradient, two moments of AdamW
TRAINING_PASSES = 3  # a training step is a forward pass and a backward pass that costs two


@dataclass(frozen=True)
class Cost:
    """Estimated cost of the steps that will run. `seconds` is None where nothing alike was measured here."""

    tokens: int = 0
    bytes: int = 0
    seconds: float | None = None
    memory: int = 0
    """Bytes at the stage that needs most, activations of a training step aside."""


def of(run: Run, steps: Sequence[Step], tokens_per_second: float | None = None) -> Cost:
    """Estimate one run, its time by the given speed or by what was measured in its tree."""
    todo = [step.stage for step in steps if step.action is Action.RUN]
    size = pruned_bytes(run)
    tokens = sum(_tokens(run, stage) for stage in todo)
    seconds = tokens / tokens_per_second if tokens_per_second else _seconds(run, todo)
    held = (memory(run.source, run.spec, stage, size) for stage in todo)
    return Cost(tokens, sum(written(run, stage) or 0 for stage in todo), seconds, max(held, default=0))


def written(run: Run, stage: str) -> int | None:
    """Bytes of weights that a stage writes; None where it writes none."""
    times = {"prune": 1, "finetune": run.spec.training.checkpoints}.get(stage)
    return None if times is None else times * pruned_bytes(run)


def of_all(planned: Iterable[tuple[Run, Sequence[Step]]], tokens_per_second: float | None = None) -> list[Cost]:
    """Estimate each run of a plan; one that takes everything over from a run before it costs nothing."""
    before: set[str] = set()
    costs = []
    for run, steps in planned:
        key = twin_key(run.spec, keeps_all=run.keeps_all)
        costs.append(Cost(seconds=0.0) if key in before else of(run, steps, tokens_per_second))
        before.add(key)
    return costs


def total(costs: Sequence[Cost]) -> Cost:
    """Add up the costs of a plan, runs one after another; the time is known only if every run's is."""
    known = [cost.seconds for cost in costs if cost.seconds is not None]
    seconds = sum(known) if len(known) == len(costs) else None
    return Cost(sum(cost.tokens for cost in costs), sum(cost.bytes for cost in costs), seconds,
                max((cost.memory for cost in costs), default=0))


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
        return calibration_tokens(task, spec)
    if stage == "finetune":
        return training_tokens(task, spec)
    return evaluation_tokens(task, spec) * (1 + spec.training.checkpoints) if stage == "eval" else 0


def calibration_tokens(task: Task, spec: RunSpec) -> int:
    """Tokens of the calibration texts."""
    chosen, count = spec.calibration, lengths.count(task, "validation")
    drawn = min(chosen.num_examples or count, count)
    return int(drawn * lengths.mean_tokens(task, "validation", chosen.num_shots))


def training_tokens(task: Task, spec: RunSpec) -> int:
    """Tokens of training, forward and backward."""
    per_epoch = lengths.count(task, "train") * lengths.mean_tokens(task, "train", spec.calibration.num_shots)
    return int(per_epoch * spec.training.epochs * TRAINING_PASSES)


def evaluation_tokens(task: Task, spec: RunSpec) -> int:
    """Tokens of scoring one checkpoint."""
    count = lengths.count(task, "test")
    drawn = min(spec.evaluation.limit or count, count)
    return int(drawn * lengths.mean_tokens(task, "test", spec.evaluation.num_shots))


def memory(checkpoint: Checkpoint, spec: RunSpec, stage: str, pruned: int) -> int:
    """Bytes that a stage cannot do without, by the bytes of the checkpoint that it works on.

    Selection holds the largest layer (hidden states take --memory-budget, and beyond that a scratch file); finetuning
    float32 weights, gradients and two moments, activations aside; evaluation the model in float32.
    """
    if stage in ("activations", "select"):
        return checkpoint.largest_layer_bytes
    if stage == "prune":
        return 0
    parameters = pruned * checkpoint.parameters // max(1, checkpoint.total_bytes)
    trained = stage == "finetune" and spec.training.lora is None
    return parameters * (FULL_TRAINING_BYTES if trained else FLOAT32_BYTES)


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
