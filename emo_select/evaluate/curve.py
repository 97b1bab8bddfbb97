"""Accuracy against memory: one loaded model, masked to one keep set after the other.

Keep sets are chosen from the checkpoint on disk, all keep-k in one pass, before the model is loaded for scoring.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emo_select import progress
from emo_select.checkpoint import Checkpoint, open_checkpoint
from emo_select.errors import SpecError, UnknownNameError
from emo_select.evaluate import parallel
from emo_select.evaluate.options import EvalOptions
from emo_select.evaluate.places import place
from emo_select.evaluate.results import read_scores
from emo_select.evaluate.room import require_room
from emo_select.evaluate.run import Evaluator, load_engine
from emo_select.faults import translated
from emo_select.ownership import require_own_files
from emo_select.spec import METHODS, Calibration, digest
from emo_select.storage import json_bytes, write_output
from emo_select.tasks.base import Task

if TYPE_CHECKING:
    from emo_select.evaluate.engine import SharedPrefixLM
    from emo_select.experts import KeepSet, StreamOptions

KeepSets = dict[int, "KeepSet"]


@dataclass(frozen=True)
class Point:
    """One keep-k of one task. `size` is the bytes of the pruned checkpoint, `value` the task's headline metric."""

    task: str
    keep_k: int
    size: int
    metric: str
    value: float
    error: float | None = None
    documents: int | None = None


def sweep_keep_k(
    model: str, tasks: Sequence[Task], keep_sets: Mapping[str, KeepSets], out_dir: Path, options: EvalOptions
) -> list[Point]:
    """Score `model` masked to `keep_sets[task name][keep-k]`; result files in `out_dir/keepk-<K>/`, and the curve."""
    _require_own_model(options)
    require_own_curve(out_dir)
    require_own_files(*(_selection_file(place(out_dir / f"keepk-{keep_k}", model, task, options, name_of(chosen)), task)
                        for task in tasks for keep_k, chosen in keep_sets[task.name].items()))
    with open_checkpoint(model) as checkpoint, parallel.process_group():
        require_room(checkpoint.config, tasks, options.max_length)
        engine = load_engine(model, options)
        points = [_point(checkpoint, engine, model, task, keep_set, out_dir / f"keepk-{keep_k}", options)
                  for task in tasks for keep_k, keep_set in sorted(keep_sets[task.name].items())]
    if parallel.rank() == 0:
        write_output(out_dir / "curve.json", json_bytes([asdict(point) for point in points]))
        if not draw(points, out_dir / "curve.png"):
            progress.say("Install emo-select[plots] to get the curve as a picture.")
    return points


def require_own_curve(out_dir: Path) -> None:
    """Raise `OwnershipError` where the curve's files are there and are not ours."""
    require_own_files(out_dir / "curve.json", out_dir / "curve.png")


def _selection_file(folder: Path, task: Task) -> Path:
    return folder / f"selection-{task.name}.json"


def evaluate_masked(
    engine: SharedPrefixLM, config: Mapping[str, Any], model: str, tasks: Sequence[Task], keep_set: KeepSet,
    out_dir: Path | Mapping[str, Path], options: EvalOptions,
) -> dict[str, dict[str, Any]]:
    """Metrics by task of a loaded full model that routes to the experts of `keep_set` only; writes result files."""
    from emo_select.evaluate.masking import masked

    with masked(engine.model, config, keep_set), Evaluator(model, out_dir, options, engine=engine,
                                                           keep_set=name_of(keep_set)) as evaluator:
        return {task.name: evaluator.evaluate(task, index) for index, task in enumerate(tasks)}


def name_of(keep_set: KeepSet) -> str:
    """What tells a keep set from others in result files."""
    return digest([None if kept is None else list(kept) for kept in keep_set.experts])


@translated()
def evaluate_keep_set(
    model: str, tasks: Sequence[Task], keep_set: KeepSet, out_dir: Path | Mapping[str, Path],
    options: EvalOptions | None = None,
) -> dict[str, dict[str, Any]]:
    """Evaluate a full model as if it were pruned to `keep_set`: the numbers of the pruned checkpoint."""
    options = options or EvalOptions()
    for task in tasks:
        task.require_data()
    _require_own_model(options)
    with open_checkpoint(model) as checkpoint, parallel.process_group():
        require_room(checkpoint.config, tasks, options.max_length)
        places = Evaluator(model, out_dir, options, keep_set=name_of(keep_set))
        places.require_own_places(tasks)
        engine = load_engine(model, options)
        return evaluate_masked(engine, checkpoint.config, model, tasks, keep_set, out_dir, options)


def _require_own_model(options: EvalOptions) -> None:
    if options.backend != "hf":
        raise SpecError("Only --backend hf can route a loaded model to a keep set; prune it for vLLM.")


def _point(checkpoint: Checkpoint, engine: SharedPrefixLM, model: str, task: Task, keep_set: KeepSet, out_dir: Path,
           options: EvalOptions) -> Point:
    from emo_select.experts.prune import plan_prune

    size = plan_prune(checkpoint, keep_set, allow_nonuniform=True).total_bytes
    out_dir = place(out_dir, model, task, options, name_of(keep_set))
    write_output(_selection_file(out_dir, task), keep_set.as_bytes())
    progress.say(f"{task.name}, keep-k {keep_set.keep_k}")
    metrics = evaluate_masked(engine, checkpoint.config, model, [task], keep_set, out_dir, options)[task.name]
    if parallel.rank():  # the first process writes files, and reads them below
        return Point(task.name, keep_set.keep_k, size, task.headline_metric, float(metrics[task.headline_metric]))
    score = read_scores(out_dir, task)[0]
    return Point(task.name, keep_set.keep_k, size, score.metric, score.value or 0.0, score.error, score.documents)


def choose(model: str, task: Task, method: str, keep_ks: Sequence[int], calibration: Calibration,
           options: StreamOptions) -> KeepSets:
    """The keep sets of one method for several keep-k, from one pass over the checkpoint."""
    from emo_select import experts
    from emo_select.models import load_tokenizer

    if method not in METHODS:
        raise UnknownNameError("method", method, METHODS)
    about: dict[str, Any] = {"model": model, "seed": calibration.seed}
    with open_checkpoint(model) as checkpoint:
        if method == "random":
            return {k: experts.select_random(checkpoint.config, k, calibration.seed, about=about) for k in keep_ks}
        texts = experts.calibration_tokens(task, load_tokenizer(model), calibration)
        about |= {"task": task.name, "split": "validation", "num_shots": calibration.num_shots,
                  "num_examples": calibration.num_examples}
        if method == "layerwise":
            found = experts.select_layerwise(checkpoint, texts.token_ids, keep_ks, options=options, about=about)
            return {keep_set.keep_k: keep_set for keep_set in found.values()}
        scores = experts.collect_activations(checkpoint, texts.token_ids, options=options)
        return {k: experts.select_from_scores(scores, method, k, checkpoint.config, about=about) for k in keep_ks}


def as_text(points: Sequence[Point], width: int = 40) -> str:
    """The curve for a terminal: one line per point, with a bar from 0 to 1 (or to the largest value above)."""
    top = max(1.0, *(point.value for point in points))
    lines = []
    for task in dict.fromkeys(point.task for point in points):
        own = [point for point in points if point.task == task]
        counted = "" if own[0].documents is None else f", n = {own[0].documents:,}"
        lines.append(f"{task} ({own[0].metric}{counted})")
        lines += [f"  keep-k {point.keep_k:>4}  {point.size / 1e6:10,.1f} MB  {point.value:6.3f}{_error(point)}  "
                  f"{'█' * round(width * max(point.value, 0) / top)}" for point in own]
    return "\n".join(lines)


def _error(point: Point) -> str:
    return "" if point.error is None else f" ± {point.error:.3f}"


def draw(points: Sequence[Point], path: Path) -> bool:
    """Draw accuracy over memory into a PNG; False where matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for task in dict.fromkeys(point.task for point in points):
        own = [point for point in points if point.task == task]
        axes.errorbar([point.size / 1e9 for point in own], [point.value for point in own], marker="o", capsize=2,
                      yerr=[point.error or 0 for point in own], label=f"{task} ({own[0].metric} ± standard error)")
        for point in own:
            axes.annotate(str(point.keep_k), (point.size / 1e9, point.value), xytext=(0, 6),
                          textcoords="offset points", ha="center", fontsize=8)
    axes.set(xlabel="weights in GB (labels: experts kept per layer)", ylabel="score", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    picture = io.BytesIO()
    FigureCanvasAgg(figure).print_png(picture)
    write_output(path, picture.getvalue())
    return True
