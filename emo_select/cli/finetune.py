"""`finetune`: train a run's pruned model, or any model; `merge-back`: put its experts into the full model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from emo_select.cli import common, completion, training
from emo_select.cli.common import OUTPUT, RUN, TRAIN
from emo_select.cli.training import Settings

if TYPE_CHECKING:
    from emo_select.finetune import TrainReport
    from emo_select.spec import Execution

RunDirectory = Annotated[Path | None, typer.Argument(help="A run directory: trains its pruned model by its own spec.",
                                                     autocompletion=completion.runs)]
Model = Annotated[str | None, typer.Option("--model", "-m", help=common.MODEL_HELP, rich_help_panel=RUN,
                                             autocompletion=completion.models)]
Task = Annotated[str | None, typer.Option("--task", "-t", help="Task whose training split to use.",
                                          rich_help_panel=RUN, autocompletion=completion.tasks)]
NumShots = Annotated[int | None, typer.Option("--num-shots", min=0, show_default="the task's", rich_help_panel=RUN,
                                              help="Few-shot examples before each example.")]
Out = Annotated[Path | None, typer.Option("--out", callback=common.writable,
                                          help="Folder of the checkpoints.", rich_help_panel=OUTPUT)]
Force = Annotated[bool, typer.Option("--force", help="Replace another model's checkpoints.", rich_help_panel=OUTPUT)]
MaxLength = Annotated[int, typer.Option("--max-length", min=2, rich_help_panel=TRAIN,
                                        help="Tokens of an example, within the model's context; the rest is cut off.")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Of the order of the examples.", rich_help_panel=TRAIN)]


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command(rich_help_panel="Single stages")(finetune)
    app.command("merge-back", rich_help_panel="Single stages")(merge_back)


@training.spread
def finetune(
    *,
    run: RunDirectory = None,
    model: Model = None,
    revision: common.Revision = None,
    task: Task = None,
    num_shots: NumShots = None,
    leave_out_shots: common.LeaveOutShots = False,
    recipe: Settings,
    max_length: MaxLength = 4095,
    seed: Seed = 0,
    adapters: Settings | None,
    machine: Settings,
    device: common.Device = "auto",
    dtype: common.Dtype = "auto",
    data_dir: common.DataDir = None,
    trust_remote_code: common.TrustRemoteCode = False,
    out: Out = None,
    force: Force = False,
    as_json: common.AsJson = False,
) -> None:
    """Train a run's pruned model, or any model, by the published recipe.

    A stopped training goes on where it was when the same command is given again.
    """
    from emo_select.spec import Execution, checked

    if run is not None:
        machine["num_gpus"] = common.only_process(machine["num_gpus"])
    execution = checked(Execution, {**machine, "device": device, "dtype": dtype, "data_dir": data_dir,
                                    "trust_remote_code": trust_remote_code, "plots": True})
    if run is not None:
        _finetune_run(run, execution, bool(model or task or recipe["file"]), force=force, as_json=as_json)
        return
    if model is not None:
        [model] = common.models([model], revision)
    settings = {**recipe, "max_length": max_length, "seed": seed, "lora": adapters}
    shots = {"num_shots": num_shots, "leave_out_shots": leave_out_shots}
    _show(_finetune_model(model, task, shots, out, settings, execution, force=force), str(out), as_json=as_json)


def _finetune_model(model: str | None, task: str | None, shots: dict[str, Any], out: Path | None,
                    settings: Settings, execution: Execution, *, force: bool) -> TrainReport:
    from emo_select.checkpoint import resolve
    from emo_select.errors import SpecError
    from emo_select.finetune import finetune
    from emo_select.spec import Training, checked
    from emo_select.tasks import get_tasks

    recipe = checked(Training, settings)
    if model is None or out is None or (task is None) == (recipe.file is None):
        raise SpecError("Name what to train: a run directory, or --model, --out and one of --task and --train-file.")
    examples, delimiter = [], None
    if task is not None:
        found = get_tasks([task], data_dir=execution.data_dir)
        if len(found) != 1:
            raise SpecError(f"{task} is a group of {len(found)} tasks; train on one of them: "
                            f"{', '.join(each.name for each in found[:4])}, ….")
        examples, delimiter = found[0].examples("train", **shots), found[0].delimiter
    return finetune(resolve(model), examples, delimiter, out, recipe, execution, replace=force)


def _finetune_run(directory: Path, execution: Execution, named: bool, *, force: bool, as_json: bool) -> None:
    """The finetune stage of one run, as `emo-select run` would do it, with its completion record."""
    from emo_select.errors import SpecError
    from emo_select.finetune import TrainReport
    from emo_select.pipeline import execute, plan, reopen
    from emo_select.storage import read_json

    if named:
        raise SpecError("A run directory has its own model and task; leave out --model, --task and --train-file, "
                        "or the directory.")
    run = reopen(directory, execution)
    execute(run, plan(run, ["finetune"], ["finetune"] if force else []))
    where = run.paths.finetuned_model
    _show(TrainReport(**read_json(where / "training.json")), str(where), as_json=as_json)


def _show(report: TrainReport, where: str, *, as_json: bool) -> None:
    from dataclasses import asdict

    if not common.is_first():
        return
    if as_json:
        common.emit({"directory": where, **asdict(report)})
        return
    for step in report.checkpoints:
        typer.echo(f"{where}/checkpoint-{step}")


def merge_back(
    child: Annotated[Path, typer.Argument(help="A run directory (its last checkpoint) or a finetuned checkpoint.")],
    into: Annotated[str, typer.Option("--into", help=f"The model that was pruned: {common.MODEL_HELP}",
                                      rich_help_panel=RUN)],
    out: Annotated[Path, typer.Option("--out", callback=common.writable,
                                      help="Folder of the merged model.", rich_help_panel=OUTPUT)],
    revision: common.Revision = None,
    data_dir: common.DataDir = None,
    router: Annotated[bool, typer.Option("--router", help="Also the kept experts' router rows.",
                                         rich_help_panel=RUN)] = False,
    shared: Annotated[bool, typer.Option("--shared", help="Also shared experts.", rich_help_panel=RUN)] = False,
    rest: Annotated[bool, typer.Option("--rest", help="Also attention, norms, embeddings, head and dense layers.",
                                       rich_help_panel=RUN)] = False,
    average: Annotated[float | None, typer.Option("--average", show_default="replace", rich_help_panel=RUN,
                                                  help="Weight of the finetuned values, 0 to 1.")] = None,
    dtype: Annotated[str | None, typer.Option("--dtype", show_default="as stored", rich_help_panel=OUTPUT,
                                              help="Cast to bfloat16, float16 or float32.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace what is there.", rich_help_panel=OUTPUT)] = False,
    as_json: common.AsJson = False,
) -> None:
    """Put finetuned experts back into the full model at their original indices, one tensor at a time."""
    from emo_select.errors import SpecError
    from emo_select.finetune.merge import MergeOptions
    from emo_select.finetune.merge import merge_back as merge
    from emo_select.storage import is_unfinished

    if out.exists() and not (force or is_unfinished(out)):
        raise SpecError(f"{out} is already there; pass --force to replace it, or choose another with --out.")
    options = MergeOptions(router=router, shared=shared, rest=rest, average=average, dtype=dtype)
    record = merge(child, common.models([into], revision)[0], out, options)
    if as_json:
        common.emit({"directory": str(out), **record})
    else:
        typer.echo(out)
