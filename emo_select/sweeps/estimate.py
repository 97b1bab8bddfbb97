"""What a sweep will cost: tokens forward, weight bytes read and written, disk, hours; with and without sharing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING

from emo_select import record
from emo_select.pipeline import cost
from emo_select.pipeline.expand import pruned_bytes
from emo_select.pipeline.plan import Action
from emo_select.pipeline.runs import ONE_PASS
from emo_select.sweeps.bench import Bench
from emo_select.sweeps.graph import Unit, parent_key
from emo_select.sweeps.spec import SweepRun
from emo_select.sweeps.store import Keep

if TYPE_CHECKING:
    from emo_select.checkpoint import Checkpoint

USUAL_AT_ONCE = 32  # units at work at a time where nothing limits them
WORKING_COPIES = 3  # of the weights that training keeps for a resume, beside the checkpoints


@dataclass(frozen=True)
class Cost:
    """Totals over units or runs."""

    selection_tokens: int = 0
    """Tokens through all layers in `activations` and `select`."""
    training_tokens: int = 0
    """Tokens of training; a backward pass counts as two forward passes."""
    evaluation_tokens: int = 0
    bytes_read: int = 0
    """Weights read from the full models to select and to prune."""
    bytes_written: int = 0
    """Pruned and finetuned checkpoints."""
    unknown: int = 0
    """Runs whose model or data is not on this machine, so that nothing is known of them."""

    @property
    def tokens(self) -> int:
        """All tokens forward."""
        return self.selection_tokens + self.training_tokens + self.evaluation_tokens

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(getattr(self, part.name) + getattr(other, part.name) for part in fields(Cost)))

    def as_data(self) -> dict[str, int]:
        """As plain data."""
        return {**asdict(self), "tokens": self.tokens}


class Estimator:
    """Costs of runs, from checkpoint headers, sizes of splits and the lengths of their first texts."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self._pruned: dict[tuple[str, int], int] = {}
        self._stages: dict[SweepRun, set[str]] = {}

    def shared(self, units: Iterable[Unit]) -> Cost:
        """What is left of the units, each doing its work once."""
        return sum((self._unit(unit) for unit in units), Cost())

    def alone(self, runs: Iterable[SweepRun]) -> Cost:
        """What is left of the runs if each selected, pruned and trained for itself."""
        return sum((self._alone(run) for run in runs), Cost())

    def pruned_bytes(self, item: SweepRun) -> int:
        """Bytes of the checkpoint that is finetuned."""
        source = self._source(item)
        if not item.spec.selects:
            return source.total_bytes
        key = (item.spec.source, item.spec.keep_k)
        if key not in self._pruned:
            self._pruned[key] = pruned_bytes(self.bench.bind(item))
        return self._pruned[key]

    def calibration_tokens(self, item: SweepRun) -> int:
        """Tokens of the calibration texts."""
        return cost.calibration_tokens(self.bench.bind(item).task, item.spec)

    def training_tokens(self, item: SweepRun) -> int:
        """Tokens of training, forward and backward."""
        return cost.training_tokens(self.bench.bind(item).task, item.spec)

    def evaluation_tokens(self, item: SweepRun) -> int:
        """Tokens of scoring the start model and every checkpoint."""
        one = cost.evaluation_tokens(self.bench.bind(item).task, item.spec)
        return one * (1 + item.spec.training.checkpoints)

    def seconds(self, cost: Cost, rates: Rates) -> float | None:
        """Time of one GPU (or machine) for `cost`; None where a rate that it needs is not known."""
        parts = [(cost.selection_tokens, rates.selection), (cost.training_tokens, rates.training),
                 (cost.evaluation_tokens, rates.evaluation)]
        if any(tokens and rate is None for tokens, rate in parts):
            return None
        return sum(tokens / rate for tokens, rate in parts if rate)

    def memory(self, runs: Iterable[SweepRun]) -> int:
        """Bytes that the most demanding stage of these runs holds, activations of a training step aside."""
        known = (item for item in runs if self.bench.missing(item) is None)
        return max((cost.memory(self._source(item), item.spec, stage, self.pruned_bytes(item))
                    for item in known for stage in self._todo(item)), default=0)

    def rates(self, runs: Iterable[SweepRun]) -> Rates:
        """Tokens per second of each part, from what finished stages of these runs took."""
        known = [run for run in runs if self.bench.missing(run) is None]
        pairs = [pair for run in known for pair in self._measured(run)]
        return Rates(*(_rate([(tokens, seconds) for name, tokens, seconds in pairs if name == part.name])
                       for part in fields(Rates)))

    def _unit(self, unit: Unit) -> Cost:
        left = self.bench.left(unit) if unit.kind != "fetch" else []
        if not left:
            return Cost()
        if any(self.bench.missing(item) for item in left):
            return Cost(unknown=len(left) if unit.kind == "run" else 0)
        if unit.kind == "run":
            apart = {item.spec.evaluation: item for item in reversed(left)}  # the first of equal ones; others are links
            first, *twins = (apart.pop(left[0].spec.evaluation), *apart.values())
            return sum((self._evaluation(item) for item in twins), self._run(first, selects=not _has_parent(unit)))
        tokens = self.calibration_tokens(left[0])
        passes = len({item.spec.keep_k for item in left}) if unit.kind == "select" else 1
        return Cost(selection_tokens=tokens * passes, bytes_read=self._source(left[0]).total_bytes)

    def _alone(self, item: SweepRun) -> Cost:
        if self.bench.missing(item):
            return Cost(unknown=1)
        return self._run(item, selects=True)

    def _run(self, item: SweepRun, *, selects: bool) -> Cost:
        todo = self._todo(item)
        size = self.pruned_bytes(item)
        cost = self._evaluation(item)
        if selects and "select" in todo and parent_key(item) is not None:
            cost += Cost(selection_tokens=self.calibration_tokens(item), bytes_read=self._source(item).total_bytes)
        if "prune" in todo:
            cost += Cost(bytes_read=size, bytes_written=size)
        if "finetune" in todo:
            written = size * item.spec.training.checkpoints
            cost += Cost(training_tokens=self.training_tokens(item), bytes_written=written)
        return cost

    def _evaluation(self, item: SweepRun) -> Cost:
        return Cost(evaluation_tokens=self.evaluation_tokens(item) if "eval" in self._todo(item) else 0)

    def _todo(self, item: SweepRun) -> set[str]:
        if item not in self._stages:
            steps = self.bench.steps(item) or ()
            self._stages[item] = {step.stage for step in steps if step.action is Action.RUN}
        return self._stages[item]

    def _measured(self, item: SweepRun) -> Iterator[tuple[str, int, float]]:
        done = record.load(self.bench.tree.run(item.spec))
        stages = done.stages if done else {}
        seconds = {name: stage.seconds for name, stage in stages.items() if "shared_with" not in stage.notes}
        selecting = "activations" if item.spec.method in ONE_PASS else "select"
        if parent_key(item) is not None and selecting in seconds:
            yield "selection", self.calibration_tokens(item), seconds[selecting]
        if "finetune" in seconds:
            yield "training", self.training_tokens(item), seconds["finetune"]
        scored = [value for name, value in seconds.items() if name.startswith("eval/")]
        if scored:
            per_checkpoint = self.evaluation_tokens(item) // (1 + item.spec.training.checkpoints)
            yield "evaluation", per_checkpoint * len(scored), sum(scored)

    def _source(self, item: SweepRun) -> Checkpoint:
        return self.bench.bind(item).source


@dataclass(frozen=True)
class Rates:
    """Tokens per second of one GPU (or of this machine), where known. Training counts forward and backward."""

    selection: float | None = None
    training: float | None = None
    evaluation: float | None = None


def disk_need(bench: Bench, units: Iterable[Unit], keep: Keep, at_once: int | None) -> int:
    """Bytes that the run units need at the worst moment: what they leave, and what those at work have beside that.

    `at_once` is how many are at work at a time; None assumes `USUAL_AT_ONCE`. What is not on this machine counts 0.
    """
    estimator = Estimator(bench)
    known = [unit for unit in units if unit.kind == "run" and bench.missing(unit.runs[0]) is None]
    needs = [_needs(estimator.pruned_bytes(unit.runs[0]), unit, keep) for unit in known]
    extra = sorted((at_work - left for left, at_work in needs), reverse=True)
    return sum(left for left, _ in needs) + sum(extra[:at_once or USUAL_AT_ONCE])


def _needs(size: int, unit: Unit, keep: Keep) -> tuple[int, int]:
    """Bytes that a run unit leaves, and at most has while it works. Twins and checkpoint-0 are hard links."""
    spec = unit.runs[0].spec
    pruned, trained = size * spec.selects, size * spec.training.checkpoints
    left = {"all": pruned + trained, "last": size, "none": 0}[keep]
    return left, pruned + trained + WORKING_COPIES * size


def _has_parent(unit: Unit) -> bool:
    return any(not name.startswith("fetch-") for name in unit.needs)


def _rate(pairs: Sequence[tuple[int, float]]) -> float | None:
    seconds = sum(seconds for _, seconds in pairs)
    return sum(tokens for tokens, _ in pairs) / seconds if seconds > 0 else None
