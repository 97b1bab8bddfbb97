"""`run`: from a model and a task to a row in the table, doing only what is not done yet."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from emo_select.cli import common, completion, runconfig, training
from emo_select.cli.common import MACHINE, RUN, SCORE
from emo_select.cli.training import Settings

if TYPE_CHECKING:
    from emo_select.pipeline import Run

LENGTHS = ("calibration", "training", "evaluation")
Stages = Annotated[str, typer.Option("--stages", help="Only these, comma-separated.", rich_help_panel=RUN,
                                         autocompletion=completion.stages)]
Force = Annotated[str, typer.Option("--force", help="Stages to do again, comma-separated.", rich_help_panel=RUN,
                                        autocompletion=completion.stages)]


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command(rich_help_panel="The whole path")(run)


@training.spread
def run(
    *,
    config: runconfig.Config = None,
    model: common.Models,
    revision: common.Revision = None,
    task: common.Tasks,
    keep_k: common.KeepKs,
    method: common.Methods = ["layerwise"],  # noqa: B006 - typer copies it
    stages: Stages = "activations,select,prune,finetune,eval",
    force: Force = "",
    num_examples: common.NumExamples = None,
    seed: common.Seed = 0,
    num_shots: common.NumShots = None,
    leave_out_shots: common.LeaveOutShots = False,
    calibration: common.CalibrationFile = None,
    score: Annotated[str, typer.Option(
        help="What layerwise ranks by.", rich_help_panel=common.CALIBRATE, autocompletion=completion.scores)] = (
        "router_probability"
    ),
    recipe: Settings,
    adapters: Settings | None,
    max_length: Annotated[int | None, typer.Option(
        min=2, show_default="4096, 4095 and 2048", rich_help_panel=RUN,
        help="Longest text in tokens, in calibration, training and evaluation.")] = None,
    eval_shots: Annotated[int | None, typer.Option(min=0, show_default="the task's", help="Few-shot examples.",
                                                   rich_help_panel=SCORE)] = None,
    limit: Annotated[int | None, typer.Option(min=1, show_default="all", help="First N test documents.",
                                              rich_help_panel=SCORE)] = None,
    machine: Settings,
    memory_budget: Annotated[str | None, typer.Option(help="For cached hidden states, such as 8GB.",
                                                      rich_help_panel=MACHINE)] = None,
    device: common.Device = "auto",
    dtype: common.Dtype = "auto",
    data_dir: common.DataDir = None,
    trust_remote_code: common.TrustRemoteCode = False,
    prediction: common.Prediction = None,
    plots: Annotated[bool, typer.Option("--plots", help="Draw routing during finetuning.",
                                        rich_help_panel=common.OUTPUT)] = False,
    output_dir: common.OutputDir = None,
    dry_run: common.DryRun = False,
    tokens_per_second: Annotated[float | None, typer.Option(
        min=1e-9, show_default="as measured in this tree", rich_help_panel=common.OUTPUT,
        help="Speed of this machine, for the time in the plan.")] = None,
    as_json: common.AsJson = False,
) -> None:
    """Select, prune, finetune and evaluate; skip what is done; end with the table.

    Every list option takes several values, repeated or comma-separated, and the command runs their product:

    emo-select run --model demo/emo --task demo --keep-k 25%,12.5% --method layerwise,random
    """
    left = runconfig.without_option(config)
    machine |= left.pop("execution", {})
    from emo_select.spec import merge

    settings: dict[str, Any] = {
        "score": score,
        "calibration": {"num_examples": num_examples, "seed": seed, "num_shots": num_shots,
                        "leave_out_shots": leave_out_shots, "file": calibration},
        "training": {**recipe, "lora": adapters},
        "evaluation": {"num_shots": eval_shots, "limit": limit},
    }
    settings = merge(settings, left)
    if max_length is not None:
        settings = merge(settings, {part: {"max_length": max_length} for part in LENGTHS})
    machine |= {"num_gpus": common.only_process(machine["num_gpus"]), "device": device, "dtype": dtype,
                "memory_budget": memory_budget, "data_dir": data_dir, "trust_remote_code": trust_remote_code,
                "plots": plots, "prediction_layers": prediction}
    models = common.models(model, revision)
    runs = _expand(models, task, keep_k, method, settings, machine, output_dir, download=not dry_run)
    if recipe["file"]:
        _require_own_examples(runs)
    _run_all(runs, stages, force, output_dir, tokens_per_second, dry_run=dry_run, as_json=as_json)


def _expand(model: list[str], task: list[str], keep_k: list[str], method: list[str], settings: dict[str, Any],
            machine: dict[str, Any], output_dir: str | None, *, download: bool) -> list[Run]:
    from emo_select.pipeline import Wanted, expand
    from emo_select.spec import Execution, checked
    from emo_select.tree import Tree

    tree = Tree.at(output_dir)
    wanted = Wanted(model, common.listed(task), common.keep_ks(keep_k), common.listed(method), settings)
    return expand(wanted, tree, checked(Execution, machine), download=download)


def _require_own_examples(runs: list[Run]) -> None:
    """Find out before selection, which may take hours, that own examples cannot be trained on."""
    from emo_select.finetune import require_own_examples

    for directory, wanted in {run.source.directory: run.spec.training for run in runs}.items():
        require_own_examples(directory, wanted)


def _run_all(runs: list[Run], stages: str, force: str, output_dir: str | None, tokens_per_second: float | None, *,
             dry_run: bool, as_json: bool) -> None:
    from emo_select.cli import plans
    from emo_select.pipeline import check_space, execute_all, plan

    names, forced = common.listed([stages]), common.listed([force])
    planned = [(run, plan(run, names, forced)) for run in runs]
    plans.show(planned, as_json=as_json and dry_run, tokens_per_second=tokens_per_second)
    if dry_run:
        return
    runs[0].tree.require_writable()
    check_space(runs, runs[0].tree)
    failed = execute_all(planned)
    if len(failed) < len(runs):
        _show_table(output_dir, runs, as_json=as_json)
    plans.show_failures(failed)
    if failed:
        raise typer.Exit(1)


def _show_table(output_dir: str | None, runs: list[Run], *, as_json: bool) -> None:
    """The methods side by side for these runs' models and tasks, other keep-k of theirs included."""
    from emo_select import progress, tables
    from emo_select.cli.columns import show_results

    layout, records = tables.load_layout(None), tables.load_tree(output_dir)
    models, tasks = ({getattr(run.spec, name) for run in runs} for name in ("model_directory", "task"))
    known = {run.task for run in records.runs}
    filters = tables.Filters(tuple(sorted(models)), tuple(sorted(tasks & known)))
    made, _ = tables.make("summary" if as_json else "methods", records, layout, filters=filters)
    if as_json:
        common.emit({table.name: table.records() for table in made})
    else:
        show_results(made)
    progress.say(f"Files: {runs[0].tree.root.resolve()}")
