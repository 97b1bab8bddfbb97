"""`serve`: an OpenAI-compatible server of a pruned or finetuned model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from emo_select.cli import common, completion
from emo_select.cli.common import MACHINE, OUTPUT, RUN

if TYPE_CHECKING:
    from emo_select.serving.engines import Engine, Server


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command(rich_help_panel="Single stages")(serve)


def serve(
    model: Annotated[str, typer.Argument(metavar="RUN|MODEL", help="A run directory (its last checkpoint), a folder, a "
                                         "Hub id or demo/NAME.", autocompletion=completion.runs)],
    options: Annotated[list[str] | None, typer.Argument(
        metavar="-- OPTIONS", help="Options for the engine, after --.")] = None,
    keep_set: Annotated[Path | None, typer.Option(
        "--keep-set", help="A selection: the model is pruned to it first.", rich_help_panel=RUN)] = None,
    checkpoint: Annotated[int | None, typer.Option("--checkpoint", min=0, show_default="the last", rich_help_panel=RUN,
                                                   help="Which of a run's checkpoints; 0 is the pruned model.")] = None,
    revision: common.Revision = None,
    data_dir: common.DataDir = None,
    engine: Annotated[str, typer.Option("--engine", help="auto (what is installed), vllm or transformers.",
                                        rich_help_panel=MACHINE)] = "auto",
    host: Annotated[str, typer.Option("--host", help="Address to listen on.", rich_help_panel=MACHINE)] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="Port to listen on.",
                                      rich_help_panel=MACHINE)] = 8000,
    name: Annotated[str | None, typer.Option("--name", show_default="of the folder", rich_help_panel=RUN,
                                             help="What requests call the model (vllm).")] = None,
    out: Annotated[Path | None, typer.Option("--out", callback=common.writable, rich_help_panel=OUTPUT,
                                             show_default="selected_model beside the keep set",
                                             help="Folder of the model pruned to --keep-set.")] = None,
    print_only: Annotated[bool, typer.Option("--print", help="Print the engine's command, and stop.",
                                             rich_help_panel=OUTPUT)] = False,
    check: Annotated[bool, typer.Option("--check", help="Start, complete one prompt, print it, and stop.",
                                        rich_help_panel=OUTPUT)] = False,
) -> None:
    """Serve a model by an OpenAI-compatible server, vLLM's or transformers' own, with EMO known to it.

    Runs until it is stopped (Ctrl-C or SIGTERM) and says when the server answers.
    """
    from emo_select.progress import say
    from emo_select.serving.engines import Server, engine_for, shown
    from emo_select.serving.source import folder_to_serve

    [given] = common.models([model], revision)
    folder = folder_to_serve(given, keep_set, out, step=checkpoint)
    server = Server(folder, name or _name_of(folder), host, port, tuple(options or ()))
    chosen = engine_for(engine, folder, installed=not print_only)
    if print_only:
        typer.echo(shown(chosen.command(server)))
        return
    say(f"Starting: {shown(chosen.command(server))}")
    _serve(chosen, server, check=check)


def _name_of(folder: Path) -> str:
    """The run's name for a part of a run, else the folder's."""
    if folder.name == "selected_model":
        return folder.parent.name
    return folder.parent.parent.name if folder.parent.name == "finetuned_model" else folder.name


def _serve(engine: Engine, server: Server, *, check: bool) -> None:
    from emo_select.errors import EmoSelectError
    from emo_select.progress import say
    from emo_select.serving.process import complete, running, wait_until_healthy

    with running(engine, server) as process:
        wait_until_healthy(process, engine, server)
        name = engine.model_in_requests(server)
        say(f"Ready: {server.address}/v1 serves {name}.")
        if check:
            typer.echo(complete(engine, server, "The"))
        elif code := process.wait():
            raise EmoSelectError(f"{engine.name} ended with exit code {code}.")
