"""The options of finetuning, which `finetune` and `run` share: declared once, and put into a command by `spread`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Annotated, Any

import typer

from emo_select.cli.common import MACHINE, OUTPUT, RUN, TRAIN, listed

ADAPTERS = "LoRA"
TrainFile = Annotated[str | None, typer.Option(
    "--train-file", help="Own examples: JSONL with prompt and completion, or chat messages.", rich_help_panel=RUN)]
Epochs = Annotated[float, typer.Option("--epochs", min=0, help="Passes over the examples.", rich_help_panel=TRAIN)]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, help="Examples per step.", rich_help_panel=TRAIN)]
Rate = Annotated[str, typer.Option("--lr", help="Highest learning rate, as a run's directory shows it; decays "
                                   "linearly.", rich_help_panel=TRAIN)]
Warmup = Annotated[float, typer.Option("--warmup", help="Share of the steps.", rich_help_panel=TRAIN)]
Decay = Annotated[float, typer.Option("--weight-decay", help="Of AdamW.", rich_help_panel=TRAIN)]
Clip = Annotated[float, typer.Option("--clip", help="Largest gradient norm.", rich_help_panel=TRAIN)]
Freeze = Annotated[str, typer.Option("--freeze", help="none, or what trains: routed, routed_shared, "
                                     "routed_shared_router.", rich_help_panel=TRAIN)]
Checkpoints = Annotated[int, typer.Option("--checkpoints", min=1, help="Evenly spaced.", rich_help_panel=TRAIN)]
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
                                                help="Training examples per forward pass.", rich_help_panel=MACHINE)]
Gpus = Annotated[int | None, typer.Option("--gpus", min=1, show_default="1", rich_help_panel=MACHINE,
                                          help="Processes to shard over (FSDP2); with --device cpu, CPU processes.")]
Masters = Annotated[bool, typer.Option("--master-weights/--no-master-weights", rich_help_panel=MACHINE,
                                       help="Keep float32 weights when computing in bfloat16.")]
Recompute = Annotated[bool, typer.Option("--gradient-checkpointing/--no-gradient-checkpointing",
                                         help="Less memory, a third more time.", rich_help_panel=MACHINE)]
ReportTo = Annotated[str, typer.Option("--report-to", help="none, tensorboard, wandb or trackio.",
                                       rich_help_panel=OUTPUT)]

Settings = dict[str, Any]


def recipe(
    *,
    file: TrainFile = None,
    epochs: Epochs = 1,
    batch_size: BatchSize = 32,
    learning_rate: Rate = "5e-5",
    warmup: Warmup = 0.1,
    weight_decay: Decay = 0.0,
    clip: Clip = 1.0,
    freeze: Freeze = "none",
    checkpoints: Checkpoints = 1,
    packing: Packing = False,
    loss_limit: LossLimit = 100.0,
) -> Settings:
    """Fields of `Training`: part of what a run is."""
    return locals()


def adapters(
    *,
    lora: UseLora = False,
    lora_rank: Rank = 16,
    lora_alpha: Alpha = 32.0,
    lora_dropout: Dropout = 0.0,
    lora_target: Targets = ["attention", "dense", "experts"],  # noqa: B006 - typer copies it
    lora_router: Router = False,
    lora_shared: Shared = False,
    merge: Merge = False,
) -> Settings | None:
    """Fields of `Lora`, part of what a run is; None without --lora."""
    from emo_select.errors import SpecError
    from emo_select.spec import Lora, checked

    chosen = {"rank": lora_rank, "alpha": lora_alpha, "dropout": lora_dropout, "targets": listed(lora_target),
              "router": lora_router, "shared": lora_shared, "merge": merge}
    if lora:
        return chosen
    if checked(Lora, chosen) != Lora():
        raise SpecError("--merge and the --lora-… options say how adapters are trained; add --lora, or leave them out.")
    return None


def machine(
    *,
    micro_batch_size: MicroBatch = None,
    num_gpus: Gpus = None,
    master_weights: Masters = True,
    gradient_checkpointing: Recompute = True,
    report_to: ReportTo = "none",
) -> Settings:
    """Fields of `Execution`: how it is done, and no part of what a run is."""
    return locals()


def spread(command: Callable[..., None]) -> Callable[..., None]:
    """Replace the parameters `recipe`, `adapters` and `machine` of a command by those of the functions above.

    The command receives what the functions return. All its parameters are keywords.
    """
    own = inspect.signature(command, eval_str=True)
    parts = {group.__name__: (group, inspect.signature(group, eval_str=True).parameters)
             for group in (recipe, adapters, machine)}

    @wraps(command)
    def spread_out(**given: Any) -> None:
        for name, (group, parameters) in parts.items():
            given[name] = group(**{parameter: given.pop(parameter) for parameter in parameters})
        command(**given)

    listed_out = [each for name, parameter in own.parameters.items()
                  for each in (parts[name][1].values() if name in parts else [parameter])]
    spread_out.__signature__ = own.replace(parameters=listed_out)  # type: ignore[attr-defined]
    spread_out.__annotations__ = {each.name: each.annotation for each in listed_out}
    return spread_out
