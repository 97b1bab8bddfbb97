"""Two runs, models or trees document by document: differences with paired bootstrap intervals, flips, keep sets.

Intervals are percentile intervals of the mean difference when the documents of a task are drawn anew, the same ones
for both sides (paired bootstrap; Efron and Tibshirani 1993, chapter 13). They cover the choice of documents, not that
of calibration examples or training seeds.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emo_select.errors import CheckpointError, UsageError
from emo_select.tables.layout import PRIMARY, Layout, load_layout
from emo_select.tables.predictions import Prediction, paired, read_predictions
from emo_select.tables.read import Problem, Records, Result, Run, load_tree
from emo_select.tables.selection import keep_set_of
from emo_select.tables.write import Cell, Table
from emo_select.tree import RunPaths

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

COLUMNS = ["model", "setting", "task", "metric", "n", "A", "± A", "B", "± B", "B - A", "low", "high", "gained",
           "lost", "changed", "keep-set overlap"]


@dataclass(frozen=True)
class Options:
    """How to compare."""

    checkpoint: str = "last"
    metric: str | None = None
    """None takes each task's headline metric."""
    resamples: int = 2000
    confidence: float = 0.95
    seed: int = 0


@dataclass(frozen=True)
class Side:
    """Runs of one side, by what must be equal on both sides."""

    root: Path
    runs: dict[tuple[Any, ...], Run]
    models: dict[str, str] = field(default_factory=dict)
    """Ids by folder."""


    def called(self, run: Run, layout: Layout) -> str:
        """A run's model as tables show it, or its folder where a label has that."""
        folder = run.setting.model
        return folder if folder in layout.models else self.models.get(folder, folder)


@dataclass(frozen=True)
class Flip:
    """A document on which the two sides score differently."""

    task: str
    before: Prediction
    after: Prediction


@dataclass
class Comparison:
    """One pair of runs."""

    run: Run
    """The run of side B."""
    metric: str
    a: float
    a_error: float | None
    b: float
    b_error: float | None
    low: float
    high: float
    docs: int
    gained: int
    lost: int
    changed: int
    """Documents with another answer, whether it scores differently or not."""
    overlap: float | None
    """Mean over MoE layers of |A ∩ B| / |A ∪ B| of the kept experts; None for two models, whose experts differ."""
    flips: list[Flip] = field(default_factory=list)
    draws: NDArray[np.float64] | None = None
    models: tuple[str, str] = ("", "")
    """What the two models are called."""

    def cells(self, layout: Layout) -> list[Cell]:
        """The row of the table."""
        setting = self.run.setting
        method = layout.method(setting.method).label
        name = ", ".join(filter(None, [f"keep-k {setting.keep_k}", method, setting.note()]))
        models = " → ".join(dict.fromkeys(map(layout.model, self.models)))
        return [models, name, self.run.task, self.metric, self.docs, self.a, self.a_error, self.b,
                self.b_error, self.b - self.a, self.low, self.high, self.gained, self.lost, self.changed, self.overlap]


def compare(
    a: str, b: str, root: str | None = None, options: Options = Options(), layout: Layout | None = None
) -> tuple[list[Comparison], list[Problem]]:
    """Compare two run directories, two models of the tree at `root`, or two trees.

    Pairs share task, keep-k, method and setting (for trees also the model, for single runs only the task). Raises
    `UsageError` where nothing can be paired, runs or documents; a pair without predictions, or documents that only one
    side has, become a `Problem`. The metric is each task's headline by `layout`.
    """
    layout = layout or load_layout()
    one, other = side(a, root), side(b, root)
    shared = [key for key in one.runs if key in other.runs]
    if not shared:
        raise UsageError(f"{a} and {b} have no run in common: the same task, keep-k, method and setting on both sides.")
    found: list[Comparison] = []
    problems: list[Problem] = []
    for key in shared:
        try:
            comparison, noted = _pair((one.root, one.runs[key]), (other.root, other.runs[key]), options, layout)
            comparison.models = (one.called(one.runs[key], layout), other.called(other.runs[key], layout))
            found.append(comparison)
            problems += noted
        except CheckpointError as error:
            problems.append(Problem("no comparison", other.runs[key].directory, str(error)))
    if not found:
        raise UsageError(problems[0].message)
    return found, problems


def comparison_tables(found: Sequence[Comparison], layout: Layout, options: Options) -> list[Table]:
    """A row per task, then a row per group and setting: the unweighted mean over tasks with its interval."""
    rows = [one.cells(layout) for one in found]
    groups: dict[tuple[Any, ...], list[Comparison]] = {}
    for one in found:
        if layout.averaged(one.run.task):
            groups.setdefault((one.run.setting, layout.group_of(one.run.task)), []).append(one)
    means = [_mean(group, members, layout, options) for (_, group), members in groups.items() if len(members) > 1]
    return [Table("comparison", COLUMNS, rows + means)]


def flips_table(found: Sequence[Comparison]) -> Table:
    """Every document on which the two sides score differently."""
    columns = ["run", "task", "doc", "id", "label", "A answered", "B answered", "A", "B"]
    rows: list[list[Cell]] = [
        [one.run.directory, flip.task, flip.before.doc, str(flip.before.native_id), _text(flip.before.label),
         _text(flip.before.answer), _text(flip.after.answer), flip.before.score, flip.after.score]
        for one in found for flip in one.flips
    ]
    return Table("flips", columns, rows)


def side(name: str, root: str | None) -> Side:
    """The runs that `name` stands for: a run directory, a tree, or a model of the tree at `root`."""
    path = Path(name)
    if RunPaths(path).results.is_dir():
        records = load_tree(path.parent.parent)
        run = _only(records, path)
        return Side(path.parent.parent, {("run", run.task): run}, records.models)
    is_tree = path.is_dir() and not (path / "config.json").exists()
    records = load_tree(name) if is_tree else load_tree(root)
    if is_tree:
        return _side(records, lambda run: (run.setting, run.task, run.seed))
    folder = _model_folder(name, records)
    records = replace(records, runs=[run for run in records.runs if run.setting.model == folder])
    return _side(records, lambda run: (replace(run.setting, model=""), run.task, run.seed))


def keep_set_overlap(a: Path, b: Path) -> float | None:
    """Mean Jaccard index over MoE layers of two runs' keep sets; None where one has none or the layers differ."""
    one, other = keep_set_of(a), keep_set_of(b)
    if one is None or other is None or len(one.kept) != len(other.kept):
        return None
    pairs = [(set(x), set(y)) for x, y in zip(one.kept, other.kept, strict=True) if x and y]
    return sum(len(x & y) / len(x | y) for x, y in pairs) / len(pairs) if pairs else None


def _side(records: Records, key: Callable[[Run], tuple[Any, ...]]) -> Side:
    return Side(records.root, {key(run): run for run in records.runs}, records.models)


def _only(records: Records, path: Path) -> Run:
    directory = f"{path.parent.name}/{path.name}"
    found = next((run for run in records.runs if run.directory == directory), None)
    if found is None:
        raise UsageError(f"{path} is not a run directory: its name does not say task, keep-k and method.")
    return found


def _model_folder(name: str, records: Records) -> str:
    models = {run.setting.model for run in records.runs}
    folder = records.folder_of(name)
    if folder is None:
        raise UsageError(
            f"{name} is neither a run directory, nor a tree, nor a model of {records.root}"
            f" (it has {', '.join(sorted(records.models.get(model, model) for model in models)) or 'none'})."
        )
    return folder


def _pair(a: tuple[Path, Run], b: tuple[Path, Run], options: Options, layout: Layout
          ) -> tuple[Comparison, list[Problem]]:
    """Compare one pair on the documents that both have; what to know about the pairing."""
    import numpy as np

    (root_a, run_a), (root_b, run_b) = a, b
    metric = options.metric or _headline(run_a, options.checkpoint, layout)
    one, other = (_documents(root, run, metric, options.checkpoint) for root, run in (a, b))
    pairs, how = paired(one, other)
    if not pairs:
        raise CheckpointError(f"{run_a.directory} and {run_b.directory} share no document: none of {len(one)} and "
                              f"{len(other)} questions is the same.")
    scores = np.array([[x.score, y.score] for x, y in pairs])
    difference = scores[:, 1] - scores[:, 0]
    seeds = [options.seed, zlib.crc32(run_b.task.encode())]  # independent draws for each task
    draws = paired_bootstrap(difference, options.resamples, seeds)
    low, high = _interval(draws, options.confidence)
    same_model = run_a.setting.model == run_b.setting.model
    comparison = Comparison(
        run_b, metric, *_mean_and_error(scores[:, 0]), *_mean_and_error(scores[:, 1]), low, high, len(pairs),
        int((difference > 0).sum()), int((difference < 0).sum()), sum(x.answer != y.answer for x, y in pairs),
        keep_set_overlap(root_a / run_a.directory, root_b / run_b.directory) if same_model else None,
        [Flip(run_b.task, x, y) for x, y in pairs if x.score != y.score], draws,
    )
    return comparison, list(_pairing(run_b.directory, len(pairs), len(one), len(other), how))


def _mean_and_error(scores: NDArray[np.float64]) -> tuple[float, float | None]:
    error = float(scores.std(ddof=1) / len(scores) ** 0.5) if len(scores) > 1 else None
    return float(scores.mean()), error


def _pairing(where: str, matched: int, a: int, b: int, how: str) -> Iterable[Problem]:
    """What the numbers of a pair do not show: documents left out, and pairs that nothing but their place confirms."""
    if matched < max(a, b):
        text = f"{matched} documents are on both sides, of {a} in A and {b} in B; the others are left out."
        yield Problem("unmatched", where, text)
    if how == "position":
        yield Problem("pairing", where, "Documents are paired by position and label: the files do not say which is "
                                        "which.")


def paired_bootstrap(difference: NDArray[np.float64], resamples: int, seed: int | Sequence[int]) -> NDArray[np.float64]:
    """Means of `resamples` samples of the differences [docs], drawn with replacement.

    Only the distinct values matter: how often each is drawn is multinomial, which is the same distribution at a
    fraction of the work, since scores are mostly 0 or 1.
    """
    import numpy as np

    values, counts = np.unique(difference, return_counts=True)
    drawn = np.random.default_rng(seed).multinomial(len(difference), counts / len(difference), size=resamples)
    means: NDArray[np.float64] = drawn @ values / len(difference)
    return means


def _interval(draws: NDArray[np.float64], confidence: float) -> tuple[float, float]:
    import numpy as np

    low, high = np.quantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _documents(root: Path, run: Run, metric: str, checkpoint: str) -> list[Prediction]:
    step = _step(run, checkpoint)
    path = run.predictions(root, step)
    if path is None:
        raise CheckpointError(f"checkpoint-{step} of {root / run.directory} has no predictions; evaluate this run "
                              "again to have them written.")
    return list(read_predictions(path, metric))


def _step(run: Run, checkpoint: str) -> int:
    if not run.results:
        raise CheckpointError(f"{run.directory} has no evaluated checkpoint.")
    return min(run.results) if checkpoint == "first" else max(run.results)


def _headline(run: Run, checkpoint: str, layout: Layout) -> str:
    result: Result | None = run.first if checkpoint == "first" else run.last
    metric = layout.headline(layout.group_of(run.task), [result]) if result else PRIMARY
    if metric == PRIMARY:
        raise CheckpointError(f"{run.directory} does not say which metric is the primary one; choose with --metric.")
    return metric


def _mean(group: str, members: Sequence[Comparison], layout: Layout, options: Options) -> list[Cell]:
    draws = sum(one.draws for one in members if one.draws is not None) / len(members)
    low, high = _interval(draws, options.confidence)  # type: ignore[arg-type]
    mean = replace(
        members[0], run=replace(members[0].run, task=f"mean of {layout.group(group)} ({len(members)})"),
        a=sum(one.a for one in members) / len(members), b=sum(one.b for one in members) / len(members),
        a_error=_over([one.a_error for one in members]), b_error=_over([one.b_error for one in members]),
        low=low, high=high, overlap=None, metric="",
        **{name: sum(getattr(one, name) for one in members) for name in ("docs", "gained", "lost", "changed")},
    )
    return mean.cells(layout)


def _over(errors: Sequence[float | None]) -> float | None:
    """Standard error of a mean over tasks, whose documents are independent."""
    known = [error for error in errors if error is not None]
    return sum(error**2 for error in known) ** 0.5 / len(errors) if len(known) == len(errors) else None


def _text(value: Any) -> Cell:
    return value if isinstance(value, str | int | float | None) else str(value)
