"""`emo-select pretrain-demo`: train a demo model from its configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from emo_select.cli.common import MACHINE, OUTPUT, AsJson, emit, writable
from emo_select.progress import say

Config = Annotated[str, typer.Option("--config", "-c", help="YAML file, or demo/NAME for a shipped one.")]
OutDir = Annotated[Path | None, typer.Option("--output-dir", "-o", callback=writable, show_default="pretrained/<name>",
                                             help="Folder of the checkpoint.", rich_help_panel=OUTPUT)]
Threads = Annotated[int, typer.Option("--threads", min=1, help="CPU threads; weights repeat to the last bit only "
                                      "with the same number.", rich_help_panel=MACHINE)]


def pretrain_demo(
    config: Config,
    output_dir: OutDir = None,
    threads: Threads = 1,
    as_json: AsJson = False,
) -> None:
    """Train a demo model on its synthetic documents; needs no data and no engine."""
    from emo_select.demo import demo_config
    from emo_select.pretrain.demo.config import read_config

    resolved = read_config(demo_config(config) if config.startswith("demo/") else Path(config))
    folder = output_dir or Path("pretrained") / resolved.name

    import torch

    from emo_select.pretrain.demo.trainer import pretrain as train

    torch.set_num_threads(threads)
    report = train(resolved, folder)
    if as_json:
        emit({"checkpoint": str(folder), **report})
    else:
        say(f"{report['parameters']:,} parameters trained in {report['cpu_seconds']:.0f} CPU seconds: {folder}")


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command(rich_help_panel="Pretraining")(pretrain_demo)
