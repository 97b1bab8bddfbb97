"""Options that several commands share, defined once."""

from __future__ import annotations

import json
import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from emo_select.cli import completion
from emo_select.faults import require_writable
from emo_select.ownership import require_own_files

DATA_DIR_VARIABLE = "EMO_SELECT_DATA_DIR"


def writable(param: typer.CallbackParam, value: Path | None) -> Path | None:
    """Refuse a folder that could not be written, before any work; the option's callback."""
    if value is not None:
        require_writable(value, param.opts[0])
    return value


RUN, CALIBRATE, TRAIN, SCORE, MACHINE, OUTPUT = "Run", "Calibration", "Finetuning", "Evaluation", "Machine", "Output"


def writable_file(param: typer.CallbackParam, value: Path | None) -> Path | None:
    """Refuse a file that could not be written, or another's, before any work; the argument's callback."""
    if value is not None:
        require_writable(value.parent, hint="name a file somewhere else")
        require_own_files(value)
    return value


class PredictionLayers(StrEnum):
    """What becomes of prediction layers."""

    DROP = "drop"
    PRUNE = "prune"
    KEEP = "keep"


MODEL_HELP = "Hub id (or ID@REVISION), folder or demo/NAME."
Models = Annotated[list[str], typer.Option("--model", "-m", help=MODEL_HELP, rich_help_panel=RUN,
                                               autocompletion=completion.models)]
Tasks = Annotated[list[str], typer.Option("--task", "-t", help="Task or group; see `emo-select tasks`.",
                                          rich_help_panel=RUN, autocompletion=completion.tasks)]
KeepKs = Annotated[list[str], typer.Option(
    "--keep-k", "-k", help="Experts kept per layer, shared ones included: 16, 12.5% or full.", rich_help_panel=RUN)]
Methods = Annotated[list[str], typer.Option(
    "--method", help="layerwise, easy_ep, random, global, frequency, gate_mass, ean, reap or reap_renormalised.",
    rich_help_panel=RUN, autocompletion=completion.methods)]
OutputDir = Annotated[str | None, typer.Option(
    "--output-dir", "-o", envvar="EMO_SELECT_OUTPUT_DIR", show_default="selective_evals_final",
    help="Root of the run tree.", rich_help_panel=OUTPUT)]
Revision = Annotated[str | None, typer.Option(
    "--revision", help="Branch, tag or commit of the Hub models; the same as --model ID@REVISION.",
    rich_help_panel=RUN)]


def _for_everything(folder: str | None) -> str | None:
    """What the folder holds is found in this process and those that it starts, also models by their Hub ids."""
    if folder is not None:
        os.environ[DATA_DIR_VARIABLE] = folder
    return folder


DataDir = Annotated[str | None, typer.Option(
    "--data-dir", envvar=DATA_DIR_VARIABLE, help="Folder that `emo-select fetch` filled, for machines without network.",
    rich_help_panel=MACHINE, callback=_for_everything)]
NumExamples = Annotated[int | None, typer.Option("--num-examples", "-n", min=1, show_default="all",
                                                 help="Calibration texts to draw.", rich_help_panel=CALIBRATE)]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Seed of that draw, and of random selection.",
                                   rich_help_panel=CALIBRATE)]
NumShots = Annotated[int | None, typer.Option("--num-shots", min=0, show_default="the task's",
                                              help="Few-shot examples in calibration texts.",
                                              rich_help_panel=CALIBRATE)]
LeaveOutShots = Annotated[bool, typer.Option(
    "--leave-out-shots", help="Without rows that are few-shot examples in their own prompt, in calibration and "
    "training; published tasks keep them.", rich_help_panel=CALIBRATE)]
CalibrationFile = Annotated[str | None, typer.Option(
    "--calibration", help="Own texts: .jsonl, .txt or .parquet.", rich_help_panel=CALIBRATE)]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.", rich_help_panel=MACHINE)]
Dtype = Annotated[str, typer.Option("--dtype", help="auto (bfloat16 on a GPU, else float32), float32, bfloat16.",
                                    rich_help_panel=MACHINE)]
TrustRemoteCode = Annotated[bool, typer.Option(
    "--trust-remote-code", help="Run code that a checkpoint brings along.", rich_help_panel=MACHINE)]
Prediction = Annotated[PredictionLayers | None, typer.Option(
    "--prediction-layers", show_default="drop", rich_help_panel=OUTPUT,
    help="Layers for speculative decoding: drop; prune, with the last layer's experts; keep whole.")]
AsJson = Annotated[bool, typer.Option("--json", help="Machine-readable result on stdout.", rich_help_panel=OUTPUT)]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what would be done, and stop.", rich_help_panel=OUTPUT)]


def emit(value: Any) -> None:
    """Write a result as JSON to stdout."""
    json.dump(value, sys.stdout, indent=1, ensure_ascii=False, default=str)
    sys.stdout.write("\n")


def size(number: float) -> str:
    """Bytes as people read them: 12.3 MB."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if number >= scale:
            return f"{number / scale:,.1f} {unit}"
    return f"{number / 1e3:,.1f} kB"


def listed(values: list[str]) -> list[str]:
    """Flatten repeated and comma-separated values."""
    from emo_select.spec import listed

    return listed(values)


def keep_ks(values: list[str]) -> list[str]:
    """Flatten repeated and comma-separated keep-k; a decimal comma is refused."""
    from emo_select.spec import keep_ks_in

    return keep_ks_in(values)


def models(values: list[str], revision: str | None) -> list[str]:
    """Flatten repeated and comma-separated models, each with its revision."""
    from emo_select.checkpoint import at_revision

    return [at_revision(model, revision) for model in listed(values)]


def is_first() -> bool:
    """Whether this process prints results: the only one, or the first that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


def only_process(gpus: int | None) -> int | None:
    """Under torchrun the first process goes on alone and the others end; returns over how many to finetune.

    Only one process may write a run's directory; finetuning starts processes of its own there.
    """
    from emo_select.errors import SpecError

    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        return gpus
    if not is_first():
        raise typer.Exit
    if os.environ.get("LOCAL_WORLD_SIZE", str(world)) != str(world):
        raise SpecError("A run takes place on one machine; to finetune on several, give --model and --out.")
    for name in list(os.environ):  # or this process would wait for the others
        if name.endswith(("RANK", "WORLD_SIZE")) or name.startswith(("MASTER_", "TORCHELASTIC_")):
            del os.environ[name]
    return gpus or world
