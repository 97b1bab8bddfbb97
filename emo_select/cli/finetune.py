"""`finetune`: train a run's pruned model, or any model; `merge-back`: put its experts into the full model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from emo_select.cli import common
from emo_select.cli.common import MACHINE, OUTPUT, RUN, TRAIN

if TYPE_CHECKING:
    from emo_select.finetune import TrainReport
    from emo_select.spec import Execution

ADAPTERS = "LoRA"
RunDirectory = Annotated[Path | None, typer.Argument(help="A run directory: trains its pruned model by its own spec.")]
Model = Annotated[str | None, typer.Option("--model", "-m", help="Hub id, folder or demo/NAME.", rich_help_panel=RUN)]
Task = Annotated[str | None, typer.Option("--task", "-t", help="Task whose training split to use.",
                                          rich_help_panel=RUN)]
TrainFile = Annotated[str | None, typer.Option(
    "--train-file", help="Own examples: JSONL with prompt and completion, or chat messages.", rich_help_panel=RUN)]
NumShots = Annotated[int | None, typer.Option("--num-shots", min=0, show_default="the task's", rich_help_panel=RUN,
                                              help="Few-shot examples before each example.")]
Out = Annotated[Path | None, typer.Option("--out", help="Folder of the checkpoints.", rich_help_panel=OUTPUT)]
Force = Annotated[bool, typer.Option("--force", help="Replace another model's checkpoints.", rich_help_panel=OUTPUT)]
Epochs = Annotated[float, typer.Option("--epochs", help="Passes over the examples.", rich_help_panel=TRAIN)]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, help="Examples per step.", rich_help_panel=TRAIN)]
Rate = Annotated[str, typer.Option("--lr", help="Highest learning rate; decays linearly.", rich_help_panel=TRAIN)]
Warmup = Annotated[float, typer.Option("--warmup", help="Share of the steps.", rich_help_panel=TRAIN)]
Decay = Annotated[float, typer.Option("--weight-decay", help="Of AdamW.", rich_help_panel=TRAIN)]
Clip = Annotated[float, typer.Option("--clip", help="Largest gradient norm.", rich_help_panel=TRAIN)]
MaxLength = Annotated[int, typer.Option("--max-length", min=2, help="Tokens of an example; the rest is cut off.",
                                        rich_help_panel=TRAIN)]
Freeze = Annotated[str, typer.Option("--freeze", help="none, or what trains: routed, routed_shared, "
                                     "routed_shared_router.", rich_help_panel=TRAIN)]
Checkpoints = Annotated[int, typer.Option("--checkpoints", min=1, help="Evenly spaced.", rich_help_panel=TRAIN)]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Of the order of the examples.", rich_help_panel=TRAIN)]
Packing = Annotated[bool, typer.Option("--packing", help="Join the examples of a micro-batch in one row, without "
                                       "padding; they do not see each other.", rich_help_panel=TRAIN)]
LossLimit = Annotated[float, typer.Option("--loss-limit", help="Stop above it.", rich_help_panel=TRAIN)]
UseLora = Annotated[bool, typer.Option("--lora", help="Train adapters, not weights.", rich_help_panel=ADAPTERS)]
Rank = Annotated[int, typer.Option("--lora-rank", min=1, help="Rank of the adapters.", rich_help_panel=ADAPTERS)]
Alpha = Annotated[float, typer.Option("--lora-alpha", help="Scaling: alpha / rank.", rich_help_panel=ADAPTERS)]
Dropout = Annotated[float, typer.Option("--lora-dropout", help="Not with experts.", rich_help_panel=ADAPTERS)]
Targets = Annotated[list[str], typer.Option("--lora-target", help="attention, dense, experts, or a module's name.",
                                            rich_help_panel=ADAPTERS)]
Router = Annotated[bool, typer.Option("--lora-router", help="Also routers.", rich_help_panel=ADAPTERS)]
Shared = Annotated[bool, typer.Option("--lora-shared", help="Also shared experts.", rich_help_panel=ADAPTERS)]
Merge = Annotated[bool, typer.Option("--merge", help="Checkpoints are merged models, with the adapter in adapter/.",
                                     rich_help_panel=ADAPTERS)]
MicroBatch = Annotated[int | None, typer.Option("--micro-batch-size", min=1, show_default="by length, at most 8",
                                                help="Examples per forward pass.", rich_help_panel=MACHINE)]
Gpus = Annotated[int | None, typer.Option("--gpus", min=1, show_default="1", rich_help_panel=MACHINE,
                                          help="Processes to shard over (FSDP2); with --device cpu, CPU processes.")]
Masters = Annotated[bool, typer.Option("--master-weights/--no-master-weights", rich_help_panel=MACHINE,
                                       help="Keep float32 weights when computing in bfloat16.")]
Recompute = Annotated[bool, typer.Option("--gradient-checkpointing/--no-gradient-checkpointing",
                                         help="Less memory, a third more time.", rich_help_panel=MACHINE)]
ReportTo = Annotated[str, typer.Option("--report-to", help="none, tensorboard, wandb or trackio.",
                                       rich_help_panel=OUTPUT)]


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command(rich_help_panel="Single stages")(finetune)
    app.command("merge-back", rich_help_panel="Single stages")(merge_back)


def finetune(
    run: RunDirectory = None,
    model: Model = None,
    task: Task = None,
    train_file: TrainFile = None,
    num_shots: NumShots = None,
    epochs: Epochs = 1,
    batch_size: BatchSize = 32,
    learning_rate: Rate = "5e-5",
    warmup: Warmup = 0.1,
    weight_decay: Decay = 0.0,
    clip: Clip = 1.0,
    max_length: MaxLength = 4095,
    freeze: Freeze = "none",
    checkpoints: Checkpoints = 1,
    seed: Seed = 0,
    packing: Packing = False,
    loss_limit: LossLimit = 100.0,
    lora: UseLora = False,
    lora_rank: Rank = 16,
    lora_alpha: Alpha = 32.0,
    lora_dropout: Dropout = 0.0,
    lora_target: Targets = ["attention", "dense", "experts"],  # noqa: B006 - typer copies it
    lora_router: Router = False,
    lora_shared: Shared = False,
    merge: Merge = False,
    micro_batch_size: MicroBatch = None,
    gpus: Gpus = None,
    device: common.Device = "auto",
    dtype: common.Dtype = "auto",
    master_weights: Masters = True,
    gradient_checkpointing: Recompute = True,
    report_to: ReportTo = "none",
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

    processes = gpus if run is None else common.only_process(gpus)
    machine = {"device": device, "dtype": dtype, "num_gpus": processes, "micro_batch_size": micro_batch_size,
               "master_weights": master_weights, "gradient_checkpointing": gradient_checkpointing,
               "report_to": report_to, "data_dir": data_dir, "trust_remote_code": trust_remote_code, "plots": True}
    execution = checked(Execution, machine)
    if run is not None:
        _finetune_run(run, execution, bool(model or task or train_file), force=force, as_json=as_json)
        return
    adapters = {"rank": lora_rank, "alpha": lora_alpha, "dropout": lora_dropout, "targets": common.listed(lora_target),
                "router": lora_router, "shared": lora_shared, "merge": merge}
    settings = {"epochs": epochs, "batch_size": batch_size, "learning_rate": learning_rate, "warmup": warmup,
                "weight_decay": weight_decay, "clip": clip, "max_length": max_length, "freeze": freeze,
                "checkpoints": checkpoints, "seed": seed, "packing": packing, "loss_limit": loss_limit,
                "file": train_file, "lora": adapters if lora else None}
    _show(_finetune_model(model, task, num_shots, out, settings, execution, force=force), str(out), as_json=as_json)


def _finetune_model(model: str | None, task: str | None, num_shots: int | None, out: Path | None,
                    settings: dict[str, Any], execution: Execution, *, force: bool) -> TrainReport:
    from emo_select.checkpoint import resolve
    from emo_select.errors import SpecError
    from emo_select.finetune import finetune
    from emo_select.spec import Training, checked
    from emo_select.tasks import get_tasks

    training = checked(Training, settings)
    if model is None or out is None or (task is None) == (training.file is None):
        raise SpecError("Name what to train: a run directory, or --model, --out and one of --task and --train-file.")
    examples, delimiter = [], None
    if task is not None:
        found = get_tasks([task], data_dir=execution.data_dir)
        if len(found) != 1:
            raise SpecError(f"{task} is a group of {len(found)} tasks; train on one of them: "
                            f"{', '.join(each.name for each in found[:4])}, ….")
        examples, delimiter = found[0].examples("train", num_shots), found[0].delimiter
    return finetune(resolve(model), examples, delimiter, out, training, execution, replace=force)


def _finetune_run(directory: Path, execution: Execution, named: bool, *, force: bool, as_json: bool) -> None:
    """The finetune stage of one run, as `emo-select run` would do it, with its completion record."""
    from emo_select.errors import SpecError
    from emo_select.finetune import TrainReport
    from emo_select.pipeline import execute, plan, reopen
    from emo_select.tree import read_json

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
    into: Annotated[str, typer.Option("--into", help="The model that was pruned: Hub id, folder or demo/NAME.",
                                      rich_help_panel=RUN)],
    out: Annotated[Path, typer.Option("--out", help="Folder of the merged model.", rich_help_panel=OUTPUT)],
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

    if out.exists() and not force:
        raise SpecError(f"{out} is already there; pass --force to replace it, or choose another with --out.")
    options = MergeOptions(router=router, shared=shared, rest=rest, average=average, dtype=dtype)
    record = merge(child, into, out, options)
    if as_json:
        common.emit({"directory": str(out), **record})
    else:
        typer.echo(out)
