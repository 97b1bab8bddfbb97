"""`run --config FILE`: what a file says, as defaults of the command's options, so that an option given wins."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from emo_select.cli.common import RUN

PARAMETERS = {  # keys of a run file that `run` has options for → the option's parameter, where it is another name
    "calibration": {"num_examples": "num_examples", "seed": "seed", "num_shots": "num_shots", "file": "calibration"},
    "training": {name: name for name in ("file", "epochs", "batch_size", "learning_rate", "warmup", "weight_decay",
                                         "clip", "freeze", "checkpoints", "packing", "loss_limit")},
    "lora": {"rank": "lora_rank", "alpha": "lora_alpha", "dropout": "lora_dropout", "targets": "lora_target",
             "router": "lora_router", "shared": "lora_shared", "merge": "merge"},
    "evaluation": {"num_shots": "eval_shots", "limit": "limit"},
    "execution": {name: name for name in ("device", "dtype", "num_gpus", "micro_batch_size", "memory_budget",
                                          "data_dir", "trust_remote_code", "report_to", "gradient_checkpointing",
                                          "plots", "master_weights")} | {"prediction_layers": "prediction"},
}
PARTS = ("calibration", "training", "evaluation", "execution")


def take_defaults(context: typer.Context, file: Path | None) -> Path | None:
    """Read the file before the other options are looked at."""
    if file is not None and not context.resilient_parsing:
        from emo_select.pipeline.runfile import read_run_file

        context.default_map = as_defaults(read_run_file(file).given())
    return file


def as_defaults(given: dict[str, Any]) -> dict[str, Any]:
    """Values by parameter of `run`, of those keys that it has options for."""
    found = {key: value for key, value in given.items() if key not in (*PARTS, "num_shared")}
    training = dict(given.get("training", {}))
    lora = training.pop("lora", None)
    for part, values in {**given, "training": training, "lora": lora or {}}.items():
        found |= {name: values[key] for key, name in PARAMETERS.get(part, {}).items() if values.get(key) is not None
                  } if isinstance(values, dict) else {}
    return found | ({"lora": True} if lora is not None else {})


def without_option(file: Path | None) -> dict[str, Any]:
    """What the file says and `run` has no option for, by part."""
    if file is None:
        return {}
    from emo_select.pipeline.runfile import read_run_file

    given = read_run_file(file).given()
    left: dict[str, Any] = {part: {key: value for key, value in given.get(part, {}).items()
                                   if key not in PARAMETERS[part] and key != "lora"} for part in PARTS}
    return left | {key: given[key] for key in ("num_shared",) if key in given}


Config = Annotated[Path | None, typer.Option(
    "--config", "-c", is_eager=True, callback=take_defaults, rich_help_panel=RUN,
    help="A run as a YAML file (docs/finetuning.md); options given beside it win.")]
