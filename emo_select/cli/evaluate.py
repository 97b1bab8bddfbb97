"""`eval`: score a run's checkpoints, any model, or one model under many keep sets."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from emo_select.cli import common, completion
from emo_select.cli.common import CALIBRATE, MACHINE, OUTPUT, RUN, SCORE

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from emo_select.evaluate import EvalOptions
    from emo_select.experts import KeepSet
    from emo_select.tasks import Task

Models = Annotated[list[str] | None, typer.Option("--model", "-m", help=common.MODEL_HELP,
                                                  rich_help_panel=RUN, autocompletion=completion.models)]
Tasks = Annotated[list[str] | None, typer.Option("--task", "-t", help="Task or group; see `emo-select tasks`.",
                                                 rich_help_panel=RUN, autocompletion=completion.tasks)]
RunDirectory = Annotated[Path | None, typer.Argument(help="A run directory: scores each of its checkpoints.",
                                                     autocompletion=completion.runs)]
Shots = Annotated[int | None, typer.Option("--num-shots", min=0, show_default="the task's", help="Few-shot examples.",
                                           rich_help_panel=SCORE)]
Limit = Annotated[int | None, typer.Option("--limit", min=1, show_default="all", help="First N test documents.",
                                           rich_help_panel=SCORE)]
Samples = Annotated[list[str] | None, typer.Option(
    "--samples", help="Documents by number: TASK=0,3,5, or a JSON file of lists by task.", rich_help_panel=SCORE)]
MaxLength = Annotated[int, typer.Option("--max-length", min=2, help="Longest model input in tokens.",
                                        rich_help_panel=SCORE)]
AddBos = Annotated[bool, typer.Option("--add-bos", help="Begin every input with the tokenizer's BOS.",
                                      rich_help_panel=SCORE)]
KeepSetFile = Annotated[Path | None, typer.Option(
    "--keep-set", help="selection.json: route the full model to these experts only.", rich_help_panel=RUN)]
Sweep = Annotated[str | None, typer.Option(
    "--sweep-keep-k", help="Several keep-k (16, 12.5%, full) on one loaded model, and the curve.",
    rich_help_panel=RUN)]
Method = Annotated[str, typer.Option("--method", help="How --sweep-keep-k selects.", rich_help_panel=CALIBRATE)]
Backend = Annotated[str, typer.Option("--backend", help="hf, or vllm where it is installed.", rich_help_panel=MACHINE)]
DeviceMap = Annotated[str | None, typer.Option("--device-map", help="auto or balanced: spread the model over devices.",
                                               rich_help_panel=MACHINE)]
Precision = Annotated[str, typer.Option("--dtype", help="float32, as published, or bfloat16.",
                                        rich_help_panel=MACHINE)]
TokenBudget = Annotated[int | None, typer.Option("--token-budget", min=1, show_default="from free memory",
                                                 help="New tokens per forward pass.", rich_help_panel=MACHINE)]
Out = Annotated[Path | None, typer.Option("--out", callback=common.writable,
                                          show_default="<output dir>/<model>/evaluations",
                                          help="Folder of the result files.", rich_help_panel=OUTPUT)]
Force = Annotated[bool, typer.Option("--force", help="Evaluate again what is done.", rich_help_panel=OUTPUT)]


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command("eval", rich_help_panel="Single stages")(evaluate)


def evaluate(
    run: RunDirectory = None,
    model: Models = None,
    revision: common.Revision = None,
    task: Tasks = None,
    num_shots: Shots = None,
    limit: Limit = None,
    samples: Samples = None,
    max_length: MaxLength = 2048,
    add_bos: AddBos = False,
    keep_set: KeepSetFile = None,
    sweep_keep_k: Sweep = None,
    method: Method = "layerwise",
    num_examples: common.NumExamples = None,
    seed: common.Seed = 0,
    calibration: common.CalibrationFile = None,
    backend: Backend = "hf",
    device: common.Device = "auto",
    device_map: DeviceMap = None,
    dtype: Precision = "float32",
    token_budget: TokenBudget = None,
    data_dir: common.DataDir = None,
    trust_remote_code: common.TrustRemoteCode = False,
    out: Out = None,
    output_dir: common.OutputDir = None,
    force: Force = False,
    as_json: common.AsJson = False,
) -> None:
    """Score models on tasks and write the published result files.

    A stopped evaluation goes on where it was when the same command is given again. Under torchrun the documents are
    shared out over the processes.
    """
    machine = {"device": device, "data_dir": data_dir, "trust_remote_code": trust_remote_code}
    if run is not None:
        _evaluate_run(run, machine, bool(model or task), as_json=as_json)
        return
    from emo_select.evaluate import EvalOptions
    from emo_select.tasks import get_tasks

    models, tasks = _asked(model, revision, task)
    options = EvalOptions(
        num_shots=num_shots, limit=limit, samples=_samples(samples, data_dir), max_length=max_length, dtype=dtype,
        add_bos_token=add_bos, backend=backend, device=device, device_map=device_map, token_budget=token_budget,
        trust_remote_code=trust_remote_code, force=force,
    )
    found = get_tasks(tasks, data_dir=data_dir)
    folders = _folders(models, out, output_dir)
    if sweep_keep_k:
        texts = {"num_examples": num_examples, "seed": seed, "num_shots": num_shots, "file": calibration}
        with _claimed(folders, out):
            _sweep(models, found, common.keep_ks([sweep_keep_k]), method, options, folders[models[0]], texts,
                   as_json=as_json)
        return
    places = {name: _places(name, folder, found, options, keep_set) for name, folder in folders.items()}
    with _claimed(folders, out):
        for name, where in places.items():
            _score(name, found, where, options, keep_set)
    _show(places, found, as_json=as_json)


def _asked(model: list[str] | None, revision: str | None, task: list[str] | None) -> tuple[list[str], list[str]]:
    from emo_select.errors import SpecError

    if not (model and task):
        raise SpecError("Name what to evaluate: a run directory, or --model and --task.")
    return common.models(model, revision), common.listed(task)


def _evaluate_run(directory: Path, machine: dict[str, Any], named: bool, *, as_json: bool) -> None:
    """The eval stage of one run, as `emo-select run` would do it."""
    from emo_select.errors import SpecError
    from emo_select.evaluate.results import metrics_path
    from emo_select.pipeline import execute, plan, reopen
    from emo_select.spec import Execution, checked

    if named:
        raise SpecError("A run directory has its own model and task; leave out --model and --task, or the directory.")
    run = reopen(directory, checked(Execution, machine))
    execute(run, plan(run, ["eval"]))
    folders = sorted(run.paths.results.glob("checkpoint-*"), key=lambda folder: int(folder.name.rpartition("-")[2]))
    folders = [folder for folder in folders if metrics_path(folder, run.task).is_file()]
    if as_json:
        common.emit({folder.name: {run.task.name: _as_data(folder, run.task)} for folder in folders})
    else:
        for folder in folders:
            _print_scores(f"{folder.name:16} {run.task.name}", folder, run.task)


def _print_scores(name: str, folder: Path, task: Task) -> None:
    """`name  metric value ± error (n = documents)`, and what the task shows beside its headline."""
    from emo_select.evaluate.results import read_scores

    typer.echo(f"{name}  {'; '.join(map(str, read_scores(folder, task)))}")


def _as_data(folder: Path, task: Task) -> dict[str, Any]:
    """The headline with error and count, and all metrics."""
    from emo_select.evaluate.results import metrics_path, read_scores
    from emo_select.storage import read_json

    content, score = read_json(metrics_path(folder, task)), read_scores(folder, task)[0]
    return {"metric": score.metric, "value": score.value, "standard_error": score.error, "documents": score.documents,
            "metrics": content["metrics"], "standard_errors": content["standard_errors"]}


def _places(model: str, folder: Path, tasks: Sequence[Task], options: EvalOptions, keep_set: Path | None
            ) -> dict[str, Path]:
    """The folder of each task's results, in which no other evaluation's are."""
    from emo_select.errors import SpecError
    from emo_select.evaluate.curve import name_of
    from emo_select.evaluate.places import place

    if len({task.name for task in tasks}) < len(tasks):
        raise SpecError("Two of the task files have the same name; give one of them another, or evaluate them apart.")
    name = name_of(_keep_set(keep_set)) if keep_set is not None else None
    return {task.name: place(folder, model, task, options, name) for task in tasks}


def _keep_set(given: Path) -> KeepSet:
    from emo_select.experts import KeepSet

    return KeepSet.load(given / "selection.json" if given.is_dir() else given)


def _score(model: str, tasks: Sequence[Task], places: Mapping[str, Path], options: EvalOptions, keep_set: Path | None
           ) -> None:
    from emo_select.evaluate import evaluate_checkpoint, evaluate_keep_set

    if keep_set is None:
        evaluate_checkpoint(model, tasks, places, options)
    else:
        evaluate_keep_set(model, tasks, _keep_set(keep_set), places, options)


def _sweep(models: Sequence[str], tasks: Sequence[Task], keep_ks: Sequence[str], method: str, options: EvalOptions,
           folder: Path, calibration: dict[str, Any], *, as_json: bool) -> None:
    from dataclasses import asdict

    from emo_select.checkpoint import open_checkpoint
    from emo_select.errors import SpecError
    from emo_select.evaluate import curve, parallel
    from emo_select.experts import StreamOptions
    from emo_select.models.families import experts_per_layer
    from emo_select.spec import Calibration, checked, parse_keep_k

    if len(models) > 1:
        raise SpecError("--sweep-keep-k loads one model; give one --model.")
    for task in tasks:
        task.require_data()
    with open_checkpoint(models[0]) as checkpoint:
        largest = max(experts_per_layer(checkpoint.config))
    wanted, texts = sorted({parse_keep_k(text, largest) for text in keep_ks}), checked(Calibration, calibration)
    stream = StreamOptions(device=options.device)
    curve.require_own_curve(folder / f"sweep-{method}")
    chosen = {task.name: curve.choose(models[0], task, method, wanted, texts, stream) for task in tasks}
    points = curve.sweep_keep_k(models[0], tasks, chosen, folder / f"sweep-{method}", options)
    if not parallel.is_first():
        return
    if as_json:
        common.emit([asdict(point) for point in points])
    else:
        typer.echo(curve.as_text(points))


def _samples(given: list[str] | None, data_dir: str | None) -> Mapping[str, Sequence[int]] | None:
    """Document numbers by run name, from TASK=0,3,5 or from a JSON file."""
    from emo_select.errors import SpecError
    from emo_select.storage import read_json
    from emo_select.tasks import get_tasks

    chosen: dict[str, list[int]] = {}
    for text in given or []:
        name, equals, numbers = text.rpartition("=")
        try:
            lists = {name: numbers.split(",")} if equals else read_json(Path(text))
            chosen |= {get_tasks([key], data_dir)[0].name: [int(n) for n in value] for key, value in lists.items()}
        except (ValueError, TypeError, AttributeError):
            raise SpecError(f"--samples {text!r} is neither TASK=0,3,5 nor a JSON file of lists by task.") from None
    return chosen or None


def _folders(models: Sequence[str], out: Path | None, output_dir: str | None) -> dict[str, Path]:
    """Where the results of each model go: into folders of their own, also where their names would be the same."""
    from emo_select.names import Names
    from emo_select.ownership import EVALUATIONS
    from emo_select.tree import Tree

    if out is not None and len(models) == 1:
        return {models[0]: out}
    tree = Tree.at(output_dir) if out is None else Tree(out)
    tree.require_writable()
    names = Names(tree)
    return {model: tree.root / names.folder(model) / ("" if out is not None else EVALUATIONS) for model in models}


def _claimed(folders: Mapping[str, Path], out: Path | None) -> AbstractContextManager[None]:
    """The names of the models' folders are theirs from now on, unless nothing comes of it."""
    from emo_select.names import claimed
    from emo_select.ownership import MODEL_NOTE

    if (out is not None and len(folders) == 1) or not common.is_first():
        return nullcontext()
    return claimed({model: (folder if out is not None else folder.parent) / MODEL_NOTE
                    for model, folder in folders.items()})


def _show(folders: Mapping[str, Mapping[str, Path]], tasks: Sequence[Task], *, as_json: bool) -> None:
    from emo_select.evaluate import parallel
    from emo_select.progress import say

    if not parallel.is_first():
        return
    if as_json:
        common.emit({model: {task.name: _as_data(places[task.name], task) for task in tasks}
                     for model, places in folders.items()})
        return
    width = max(len(task.name) for task in tasks)
    for model, places in folders.items():
        typer.echo(model)
        for task in tasks:
            _print_scores(f"  {task.name:{width}}", places[task.name], task)
        for folder in dict.fromkeys(places.values()):
            say(f"Files: {folder.resolve()}")
