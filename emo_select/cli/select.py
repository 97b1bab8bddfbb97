"""`activations`, `select` and `inspect`: which experts a task uses, and a look at them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from emo_select.cli import common, completion
from emo_select.cli.common import CALIBRATE, MACHINE, OUTPUT, RUN

if TYPE_CHECKING:
    from emo_select.experts import KeepSet, StreamOptions
    from emo_select.experts.calibration_curve import Curve
    from emo_select.experts.rules import KeepK
    from emo_select.pipeline import Run

PANEL = "Single stages"
CURVE = "Calibration curve"
TaskNames = Annotated[list[str] | None, typer.Option(
    "--task", "-t", help="Task or group; see `emo-select tasks`. With weights, such as a:2 and b:1, they are mixed.",
    rich_help_panel=RUN, autocompletion=completion.tasks)]
Score = Annotated[str, typer.Option("--score", rich_help_panel=RUN, autocompletion=completion.scores, help=(
    "What layerwise ranks by: router_probability, frequency, gate_mass, easy_ep, ean, reap or reap_renormalised."))]
NumShared = Annotated[int | None, typer.Option("--num-shared", min=0, show_default="all", rich_help_panel=RUN,
                                               help="Shared experts kept per layer.")]
Schedule = Annotated[list[str] | None, typer.Option(
    "--schedule", rich_help_panel=RUN, help="Experts kept in each layer, such as 32-16-16-8. Needs --out.")]
Thinking = Annotated[bool | None, typer.Option(
    "--thinking/--no-thinking", help="Whether the model thinks in the chats of --calibration.", show_default=False,
    rich_help_panel=CALIBRATE)]
MaxLength = Annotated[int, typer.Option("--max-length", min=1, help="Tokens per text; longer ones lose their ends.",
                                        rich_help_panel=CALIBRATE)]
MemoryBudget = Annotated[str | None, typer.Option(
    "--memory-budget", show_default="half of the free memory", rich_help_panel=MACHINE,
    help="Memory for hidden states, such as 8GB; the rest goes to a scratch file.")]
TokenBudget = Annotated[int | None, typer.Option("--token-budget", min=1, show_default="suits the device",
                                                 help="Tokens per batch.", rich_help_panel=MACHINE)]
Scratch = Annotated[Path | None, typer.Option("--scratch", show_default="the system's", rich_help_panel=MACHINE,
                                              help="Folder of the scratch file.")]
Out = Annotated[Path | None, typer.Option("--out", callback=common.writable,
                                          show_default="the run tree", rich_help_panel=OUTPUT,
                                          help="Folder for the result, outside any run tree.")]
Plot = Annotated[bool, typer.Option("--plot", help="Draw a heat map beside each result (extra `plots`).",
                                    rich_help_panel=OUTPUT)]


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    for command in (activations, select, inspect):
        app.command(rich_help_panel=PANEL)(command)


def activations(
    model: Annotated[str, typer.Option("--model", "-m", help=common.MODEL_HELP, rich_help_panel=RUN,
                                        autocompletion=completion.models)],
    revision: common.Revision = None,
    task: TaskNames = None,
    num_examples: common.NumExamples = None,
    seed: common.Seed = 0,
    num_shots: common.NumShots = None,
    leave_out_shots: common.LeaveOutShots = False,
    calibration: common.CalibrationFile = None,
    thinking: Thinking = None,
    max_length: MaxLength = 4096,
    device: common.Device = "auto",
    dtype: common.Dtype = "auto",
    memory_budget: MemoryBudget = None,
    token_budget: TokenBudget = None,
    scratch: Scratch = None,
    data_dir: common.DataDir = None,
    output_dir: common.OutputDir = None,
    out: Out = None,
    as_json: common.AsJson = False,
) -> None:
    """Collect how every expert is used, in one pass through the unpruned model.

    The statistics serve every method but layerwise and random at any keep-k. Several tasks go into one
    pass with --out, else into one folder each.
    """
    texts = _calibration(num_examples, seed, num_shots, leave_out_shots, calibration, thinking, max_length)
    options = _options(device, dtype, memory_budget, token_budget, scratch)
    names, [model] = common.listed(task or []), common.models([model], revision)
    if out is not None or calibration is not None:
        folders = [_collect(model, names, texts, options, data_dir, _need_out(out, "own texts"))]
    else:
        machine = {"device": device, "dtype": dtype, "memory_budget": memory_budget, "data_dir": data_dir}
        runs = _runs([model], names, ["full"], ["easy_ep"], {"calibration": texts}, machine, output_dir)
        _collect_all(runs)
        folders = [run.tree.activations(run.spec) for run in runs]
    if as_json:
        common.emit([_activations_data(folder) for folder in folders])
    else:
        for folder in folders:
            typer.echo(folder)


def select(
    model: common.Models,
    revision: common.Revision = None,
    keep_k: Annotated[list[str] | None, typer.Option(
        "--keep-k", "-k", help="Experts kept per layer, shared ones included: 16, 12.5% or full.",
        rich_help_panel=RUN)] = None,
    task: TaskNames = None,
    method: common.Methods = ["layerwise"],  # noqa: B006 - typer copies it
    score: Score = "router_probability",
    num_shared: NumShared = None,
    schedule: Schedule = None,
    num_examples: common.NumExamples = None,
    seed: common.Seed = 0,
    num_shots: common.NumShots = None,
    leave_out_shots: common.LeaveOutShots = False,
    calibration: common.CalibrationFile = None,
    thinking: Thinking = None,
    max_length: MaxLength = 4096,
    device: common.Device = "auto",
    dtype: common.Dtype = "auto",
    memory_budget: MemoryBudget = None,
    token_budget: TokenBudget = None,
    scratch: Scratch = None,
    data_dir: common.DataDir = None,
    output_dir: common.OutputDir = None,
    out: Out = None,
    plot: Plot = False,
    as_json: common.AsJson = False,
) -> None:
    """Choose the experts to keep. All keep-k of a model and task share one pass over its weights.

    Results go into the run tree. Mixed tasks, own texts without a task, and schedules have no place there: give --out.
    """
    from emo_select.experts.calibration import parse_weights

    names, models = common.listed(task or []), common.models(model, revision)
    weights = parse_weights(names) if any(":" in name for name in names) else None
    texts = _calibration(num_examples, seed, num_shots, leave_out_shots, calibration, thinking, max_length)
    keep_ks, schedules = common.keep_ks(keep_k or []), common.listed(schedule or [])
    if out is not None or weights is not None or schedules or (calibration is not None and not names):
        wanted = {"task": list(weights or names), "weights": weights, "score": score, "num_shared": num_shared,
                  "calibration": texts}
        folder = _need_out(out, "mixed tasks, schedules and own texts without a task")
        results = _standalone(models, keep_ks, schedules, common.listed(method), wanted, folder,
                              _options(device, dtype, memory_budget, token_budget, scratch), data_dir)
    else:
        machine = {"device": device, "dtype": dtype, "memory_budget": memory_budget, "data_dir": data_dir}
        settings = {"calibration": texts, "score": score, "num_shared": num_shared}
        runs = _runs(models, names, keep_ks, common.listed(method), settings, machine, output_dir)
        _execute(runs, ["activations", "select"])
        results = [run.paths.selection for run in runs]
    _report(results, plot=plot, as_json=as_json)


def inspect(
    paths: Annotated[list[Path] | None, typer.Argument(
        help="Run directories, selection.json files, or folders above them.", show_default=False)] = None,
    calibration_curve: Annotated[bool, typer.Option(
        "--calibration-curve", help="Compare selections that differ in the number of examples with the largest one; "
                                    "with --model they are made.", rich_help_panel=CURVE)] = False,
    model: Annotated[str | None, typer.Option("--model", "-m", help="Hub id, folder or demo/NAME.",
                                              rich_help_panel=CURVE)] = None,
    task: Annotated[list[str] | None, typer.Option("--task", "-t", help="Task or group.",
                                                   rich_help_panel=CURVE)] = None,
    keep_k: Annotated[list[str] | None, typer.Option("--keep-k", "-k", help="Such as 8,16,32.",
                                                     rich_help_panel=CURVE)] = None,
    sizes: Annotated[list[str] | None, typer.Option("--num-examples", "-n", show_default="1,5,10,100,all",
                                                    help="Sample sizes, nested.", rich_help_panel=CURVE)] = None,
    method: Annotated[str, typer.Option("--method", help="Any but random.", rich_help_panel=CURVE)] = "layerwise",
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the draw.", rich_help_panel=CURVE)] = 0,
    num_shots: Annotated[int | None, typer.Option("--num-shots", min=0, help="Few-shot examples; 0 for the variant "
                                                  "without.", show_default="the task's", rich_help_panel=CURVE)] = None,
    published_layout: Annotated[bool, typer.Option("--published-layout", help="summary.md exactly as published.",
                                                   rich_help_panel=CURVE)] = False,
    device: common.Device = "auto",
    dtype: common.Dtype = "auto",
    data_dir: common.DataDir = None,
    plot: Annotated[bool, typer.Option("--plot/--no-plot", help="Draw pictures (extra `plots`).",
                                       rich_help_panel=OUTPUT)] = True,
    out: Annotated[Path | None, typer.Option("--out", callback=common.writable,
                                             show_default="beside each selection", rich_help_panel=OUTPUT,
                                             help="Folder for pictures and curves.")] = None,
    as_json: common.AsJson = False,
) -> None:
    """Look at selections: coverage per layer, and what they have in common across tasks, methods and sample sizes."""
    from emo_select.experts.inspect import as_data, find_selections
    from emo_select.ownership import require_own_files

    if calibration_curve or model:
        target = out or Path("calibration_curve")
        pictures = [target / f"calibration_curve.{suffix}" for suffix in ("png", "pdf")] if plot else []
        require_own_files(*pictures)
        wanted = {"method": method, "seed": seed, "num_shots": num_shots}
        options = _options(device, dtype, None, None, None)
        curves = (_made_curves(model, task, keep_k, sizes, wanted, out, data_dir, options) if model
                  else _found_curves(paths or []))
        _show_curves(curves, target, pictures, published_layout, as_json)
        return
    found = find_selections(paths or [Path()])
    drawn = _draw(found, out) if plot else []
    if as_json:
        common.emit({**as_data(found), "pictures": [str(path) for path in drawn]})
    else:
        _show(found)
        for path in drawn:
            typer.echo(path)


def _found_curves(paths: Sequence[Path]) -> list[Curve]:
    from emo_select.experts.calibration_curve import curves_of
    from emo_select.experts.inspect import find_selections

    return curves_of(find_selections(paths or [Path()]).values())


def _made_curves(model: str, tasks: list[str] | None, keep_ks: list[str] | None, sizes: list[str] | None,
                 wanted: dict[str, Any], out: Path | None, data_dir: str | None, options: StreamOptions) -> list[Curve]:
    from emo_select.errors import SpecError
    from emo_select.experts.calibration_curve import CurveRequest, collect_curves, parse_sizes
    from emo_select.experts.methods import ONE_PASS
    from emo_select.spec import Calibration, checked
    from emo_select.tasks import get_tasks

    method = wanted.pop("method")
    if method not in ("layerwise", *ONE_PASS):
        raise SpecError(f"A curve needs a method that sees examples, not {method!r}: layerwise, {', '.join(ONE_PASS)}.")
    names = [task.name for task in get_tasks(common.listed(tasks or []), data_dir=data_dir)]
    if not names or not keep_ks:
        raise SpecError("Say what to compare with --task and --keep-k.")
    whole = [keep_k for keep_k in _keep_ks(model, common.listed(keep_ks), []) if isinstance(keep_k, int)]
    request = CurveRequest(model, list(dict.fromkeys(whole)), parse_sizes(common.listed(sizes or ["1,5,10,100,all"])),
                           method, checked(Calibration, wanted))
    return collect_curves(request, names, out or Path("calibration_curve"), data_dir=data_dir, options=options)


def _show_curves(curves: Sequence[Curve], out: Path, pictures: Sequence[Path], published: bool, as_json: bool) -> None:
    from emo_select.experts.calibration_curve import write_summary
    from emo_select.experts.plots import plot_curves

    files = [*write_summary(curves, out, published=published), *pictures]
    for picture in pictures:
        plot_curves(curves, picture)
    if as_json:
        common.emit({"curves": [curve.as_data() for curve in curves], "files": [str(file) for file in files]})
        return
    typer.echo("Jaccard index of the routed experts kept with those of the largest sample (in parentheses with shared\n"
               "experts, as published): mean over layers, smallest layer.")
    rows = [[curve.task + (f" ({curve.note})" if curve.note else ""), str(curve.keep_k), tag, _pair(curve.mean, tag),
             _pair(curve.smallest, tag)] for curve in curves for tag in curve.keep_sets if tag != curve.reference]
    _table(["task", "keep-k", "examples", "mean", "smallest"], rows)
    for file in files:
        typer.echo(file)


def _pair(value: Callable[..., float], tag: str) -> str:
    return f"{value(tag):.3f} ({value(tag, shared=True):.3f})"


def _calibration(num_examples: int | None, seed: int, num_shots: int | None, leave_out_shots: bool, file: str | None,
                 thinking: bool | None, max_length: int) -> dict[str, Any]:
    return {"num_examples": num_examples, "seed": seed, "num_shots": num_shots, "leave_out_shots": leave_out_shots,
            "file": file, "thinking": thinking, "max_length": max_length}


def _options(device: str, dtype: str, memory_budget: str | None, token_budget: int | None, scratch: Path | None
             ) -> StreamOptions:
    from emo_select.experts import StreamOptions

    return StreamOptions(device, dtype, memory_budget, token_budget, scratch)


def _need_out(out: Path | None, what: str) -> Path:
    from emo_select.errors import SpecError

    if out is None:
        raise SpecError(f"There is no place in the run tree for {what}; give a folder with --out.")
    return out


def _runs(models: list[str], tasks: list[str], keep_ks: list[str], methods: list[str], settings: dict[str, Any],
          machine: dict[str, Any], output_dir: str | None) -> list[Run]:
    from emo_select.errors import ModelError
    from emo_select.pipeline import Wanted, expand
    from emo_select.spec import Execution, checked
    from emo_select.tree import Tree

    runs = expand(Wanted(models, tasks, keep_ks, methods, settings), Tree.at(output_dir), checked(Execution, machine))
    dense = next((run.spec.model for run in runs if not run.spec.selects), None)
    if dense is not None:
        raise ModelError(f"{dense} has no experts to select; `emo-select run` finetunes and evaluates it as it is.")
    return runs


def _process() -> tuple[int, int]:
    """This process's number among those that torchrun started, and how many there are."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def _refuse_several_processes() -> None:
    from emo_select.errors import SpecError

    if _process()[1] > 1:
        raise SpecError("Several processes cannot work on one run tree; under torchrun, give a folder with --out.")


def _execute(runs: Sequence[Run], stages: Sequence[str]) -> None:
    from emo_select.cli import plans
    from emo_select.pipeline import execute_all, plan

    _refuse_several_processes()
    if not runs:
        return
    planned = [(run, plan(run, stages)) for run in runs]
    plans.show(planned, as_json=False)
    runs[0].tree.require_writable()
    failed = execute_all(planned)
    plans.show_failures(failed)
    if failed:
        raise typer.Exit(1)


def _collect_all(runs: Sequence[Run]) -> None:
    from emo_select import progress
    from emo_select.pipeline import collect

    _refuse_several_processes()
    runs[0].tree.require_writable()
    with progress.track("Tasks", total=len(runs)) as bar:
        for run in runs:
            bar.update(run.spec.task)
            collect(run)
            bar.advance()


def _collect(model: str, tasks: list[str], texts: dict[str, Any], options: StreamOptions, data_dir: str | None,
             out: Path) -> Path:
    from emo_select.checkpoint import open_checkpoint
    from emo_select.experts import collect_activations
    from emo_select.experts.select import texts_of
    from emo_select.models import load_tokenizer
    from emo_select.spec import Calibration, checked

    with open_checkpoint(model, data_dir=data_dir) as checkpoint:
        tokenizer = load_tokenizer(str(checkpoint.directory))
        ids, groups = texts_of(tokenizer, tasks, checked(Calibration, texts), data_dir)
        collect_activations(checkpoint, ids, groups, out, options, {"model": model})
    return out


def _standalone(models: list[str], keep_ks: list[str], schedules: list[str], methods: list[str],
                wanted: dict[str, Any], out: Path, options: StreamOptions, data_dir: str | None) -> list[Path]:
    from emo_select.experts.inspect import SELECTION
    from emo_select.experts.select import Selection, select_experts
    from emo_select.names import Names
    from emo_select.ownership import require_own_files
    from emo_select.spec import Calibration, checked
    from emo_select.tree import Tree

    wanted = {**wanted, "calibration": checked(Calibration, wanted["calibration"])}
    names, asked = Names(Tree(out)), {model: _keep_ks(model, keep_ks, schedules) for model in models}
    several = len(methods) * sum(map(len, asked.values())) > 1
    places = {(model, method, keep_k):
              (out / _folder(names.folder(model), method, keep_k) if several else out) / SELECTION
              for model in models for method in methods for keep_k in asked[model]}
    require_own_files(*places.values())
    results = []
    for model, method in product(models, methods):
        found = select_experts(model, Selection(keep_k=asked[model], method=method, **wanted), out_dir=out,
                               options=options, data_dir=data_dir)
        results += [_store(keep_set, places[model, method, keep_k]) for keep_k, keep_set in found.items()]
    return results


def _store(keep_set: KeepSet, path: Path) -> Path:
    from emo_select.storage import write_output

    if _process()[0] == 0:
        write_output(path, keep_set.as_bytes())
    return path


def _folder(model: str, method: str, keep_k: KeepK) -> str:
    name = str(keep_k) if isinstance(keep_k, int) else "-".join(map(str, keep_k))
    return f"{model}_{method}_keepk_{name}"


def _keep_ks(model: str, keep_ks: list[str], schedules: list[str]) -> list[KeepK]:
    from emo_select.checkpoint import open_checkpoint
    from emo_select.errors import KeepKError
    from emo_select.models.families import experts_per_layer
    from emo_select.spec import parse_keep_k

    with open_checkpoint(model) as checkpoint:
        most = max(experts_per_layer(checkpoint.config))
    try:
        listed = [tuple(int(entry) for entry in schedule.split("-")) for schedule in schedules]
    except ValueError:
        raise KeepKError(f"A schedule is one number per layer, such as 32-16-16-8, not {schedules}.") from None
    return [*(parse_keep_k(text, most) for text in keep_ks), *listed]


def _report(results: Sequence[Path], *, plot: bool, as_json: bool) -> None:
    from emo_select.experts.inspect import as_data, find_selections

    if not results or _process()[0] != 0:
        return
    found = find_selections(results)
    pictures = _draw(found, None, results) if plot else []
    if as_json:
        common.emit({**as_data(found), "files": [str(path) for path in (*results, *pictures)]})
        return
    _show(found)
    for path in (*results, *pictures):
        typer.echo(path)


def _draw(found: dict[str, KeepSet], out: Path | None, files: Sequence[Path] = ()) -> list[Path]:
    """A heat map per selection with scores, and one matrix of overlaps if there are several."""
    from emo_select.experts.plots import plot_overlaps, plot_scores
    from emo_select.ownership import require_own_files

    folder = out or Path()
    places = [file.parent / "selection.png" for file in files] or [folder / f"{_file_name(name)}.png" for name in found]
    pairs = zip(found.items(), places, strict=True)
    drawable = {place: (keep_set, name) for (name, keep_set), place in pairs if keep_set.scores is not None}
    drawn = [*drawable, *([folder / "overlaps.png"] if len(found) > 1 else [])]
    require_own_files(*drawn)
    for place, (keep_set, name) in drawable.items():
        plot_scores(keep_set, place, name)
    if len(found) > 1:
        plot_overlaps(found, drawn[-1])
    return drawn


def _file_name(label: str) -> str:
    return label.replace("/", "--")


def _show(found: dict[str, KeepSet]) -> None:
    """Tables on stdout: coverage, and overlap of every pair."""
    from emo_select.experts.inspect import layer_views, mean_coverage, overlaps

    for name, keep_set in found.items():
        mean = mean_coverage(keep_set)
        typer.echo(f"{name}: {keep_set.method}, keep-k {keep_set.keep_k}, "
                   + ("no scores" if mean is None else f"coverage {mean:.3f} of {keep_set.score}"))
        rows = [[str(view.layer), str(view.kept), _number(view.coverage)] for view in layer_views(keep_set)]
        _table(["layer", "kept", "coverage"], rows)
    pairs = overlaps(found)
    if pairs:
        typer.echo("Jaccard index of routed experts, mean over layers:")
        _table(["first", "second", "mean", "smallest"],
               [[pair.first, pair.second, _number(pair.mean), _number(min(x for x in pair.layers if x is not None))]
                for pair in pairs])


def _table(header: list[str], rows: list[list[str]]) -> None:
    from emo_select.cli.columns import Column, show

    show([Column(name) for name in header], rows)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _activations_data(folder: Path) -> dict[str, Any]:
    from emo_select.storage import read_json

    return {"directory": str(folder), **read_json(folder / "scores.json")}
