"""`prune`: write the checkpoint that a selection describes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from emo_select.cli import common, completion
from emo_select.cli.common import OUTPUT, RUN

if TYPE_CHECKING:
    from emo_select.experts.keepset import KeepSet


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command(rich_help_panel="Single stages")(prune)


def prune(
    selection: Annotated[Path, typer.Argument(help="A run directory, or a selection.json.",
                                               autocompletion=completion.runs)],
    model: Annotated[str | None, typer.Option("--model", "-m", show_default="the one selected on", rich_help_panel=RUN,
                                              help=common.MODEL_HELP)] = None,
    revision: common.Revision = None,
    data_dir: common.DataDir = None,
    out: Annotated[Path | None, typer.Option("--out", callback=common.writable,
                                             show_default="selected_model beside the selection",
                                             help="Folder of the pruned checkpoint.", rich_help_panel=OUTPUT)] = None,
    dtype: Annotated[str | None, typer.Option("--dtype", show_default="as stored", rich_help_panel=OUTPUT,
                                              help="Cast to bfloat16, float16 or float32.")] = None,
    max_shard_size: Annotated[str | None, typer.Option("--max-shard-size", show_default="5GB", rich_help_panel=OUTPUT,
                                                       help="Largest file, such as 500MB.")] = None,
    dequantize: Annotated[bool, typer.Option(
        "--dequantize", help="Write quantised weights as plain numbers.", rich_help_panel=OUTPUT)] = False,
    prediction: common.Prediction = None,
    allow_nonuniform: Annotated[bool, typer.Option(
        "--allow-nonuniform", help="Let layers keep different numbers of experts.", rich_help_panel=RUN)] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace what is there.", rich_help_panel=OUTPUT)] = False,
    dry_run: common.DryRun = False,
    as_json: common.AsJson = False,
) -> None:
    """Write the pruned checkpoint of a selection, without ever loading the model.

    The result has the source's own layout and loads wherever that loads. An interrupted call goes on where it was.
    """
    changed = (model or revision or out or dtype or max_shard_size or allow_nonuniform or dequantize
               or prediction)
    if (selection / "run.json").exists() and not (changed or dry_run):
        _prune_run(selection, force=force, as_json=as_json)
        return
    from emo_select.errors import SpecError
    from emo_select.experts.keepset import KeepSet
    from emo_select.experts.prune import prune_checkpoint
    from emo_select.storage import is_unfinished

    path = selection / "selection.json" if selection.is_dir() else selection
    keep_set = KeepSet.load(path)
    given = model or _model_of(path, keep_set)
    if not given:
        raise SpecError(f"{path} does not say which model it is for; name it with --model.")
    [source] = common.models([given], revision)
    target = out or path.parent / "selected_model"
    if target.exists() and not (force or dry_run or is_unfinished(target)):
        raise SpecError(f"{target} is already there; pass --force to replace it, or choose another with --out.")
    layers: Any = prediction.value if prediction else "drop"
    summary = _planned(source, keep_set, dtype, allow_nonuniform, named=model is not None, dequantize=dequantize,
                       prediction=layers)
    if not dry_run:
        prune_checkpoint(source, keep_set, target, dtype=dtype, max_shard_size=max_shard_size,
                         allow_nonuniform=allow_nonuniform, dequantize=dequantize, prediction=layers)
    _report(summary, target, written=not dry_run, as_json=as_json)


def _model_of(path: Path, keep_set: KeepSet) -> str | None:
    """The model that a selection is of: where its run's record says it lies, else by the name it was given by."""
    from emo_select import record
    from emo_select.tree import RunPaths

    run = record.load(RunPaths(path.parent))
    return run.spec.source if run is not None else keep_set.model


def _planned(source: str, keep_set: KeepSet, dtype: str | None, allow_nonuniform: bool, *, named: bool,
             dequantize: bool, prediction: Any) -> dict[str, Any]:
    from emo_select.checkpoint import open_checkpoint
    from emo_select.errors import ModelError
    from emo_select.experts.prune import describe_plan, plan_prune, stored_dtype

    with open_checkpoint(source) as opened:
        checkpoint = opened.plain(stored_dtype(dtype)) if dequantize else opened
        if not named and keep_set.fingerprint not in (None, checkpoint.forward_fingerprint):
            raise ModelError(f"The selection was made on other weights than {source} has now; if you mean that model "
                             "all the same, name it with --model.")
        plan = plan_prune(checkpoint, keep_set, dtype=stored_dtype(dtype), allow_nonuniform=allow_nonuniform,
                          prediction=prediction)
        return {**describe_plan(checkpoint, plan), "bytes_before": opened.total_bytes}


def _report(summary: dict[str, Any], target: Path, *, written: bool, as_json: bool) -> None:
    from emo_select.progress import say

    if as_json:
        common.emit({**summary, "directory": str(target), "written": written})
        return
    say(f"{'Wrote' if written else 'Would write'} {target}: {summary['experts']} experts per layer of "
        f"{summary['experts_before']}, {summary['bytes'] / 1e9:.2f} GB of {summary['bytes_before'] / 1e9:.2f} GB.")


def _prune_run(directory: Path, *, force: bool, as_json: bool) -> None:
    """The prune stage of one run, as `emo-select run` would do it, with its completion record."""
    from emo_select import record
    from emo_select.pipeline import execute, plan, reopen
    from emo_select.spec import Execution

    run = reopen(directory, Execution())
    execute(run, plan(run, ["prune"], ["prune"] if force else []))
    done = record.load(run.paths)
    written = done.stages["prune"].outputs if done else {}
    if as_json:
        common.emit({"directory": str(run.paths.selected_model), "files": written})
    else:
        typer.echo(run.paths.selected_model)
