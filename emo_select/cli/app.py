"""The `emo-select` program: options before the command, the commands, and how errors reach a person."""

from __future__ import annotations

import gc
import importlib
import inspect
import logging
import os
import signal
import sys
import traceback
from types import FrameType
from typing import Annotated

import typer

from emo_select import progress
from emo_select.cli import common
from emo_select.cli.help import Command, Group
from emo_select.errors import EmoSelectError
from emo_select.faults import translated

# Order of the groups in --help; each module has `register(app)`.
GROUPS = ("run", "select", "prune", "finetune", "compose", "evaluate", "serve", "table", "sweep", "tasks", "clusters",
          "coverage", "pretrain", "pretrain_demo", "data", "convert", "export", "info")

app = typer.Typer(
    name="emo-select",
    help="Keep only the experts of a Mixture-of-Experts model that a task uses, and measure what remains.",
    cls=Group,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)


class _Shown:
    traceback = False


class _Interrupted(BaseException):
    """Ctrl-C or SIGTERM: no error, and nothing that a library's `except Exception` may swallow."""

    def __init__(self, signum: int) -> None:
        self.signum = signum


def _show_version(wanted: bool) -> None:
    if wanted:
        from emo_select import __version__

        typer.echo(f"emo-select {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", help="Show the version, and stop.", is_eager=True,
                                          callback=_show_version)] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no notices.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log what libraries say.")] = False,
    show_traceback: Annotated[bool, typer.Option("--traceback", help="Show where an error arose.")] = False,
) -> None:
    """Options that go before the command."""
    progress.configure(quiet=quiet or not common.is_first())
    _Shown.traceback = show_traceback
    logging.basicConfig(level=logging.INFO if verbose else logging.ERROR, stream=sys.stderr, format="%(message)s")


def main() -> None:
    """Run the program; errors of ours become one sentence on stderr and an exit code."""
    # Idle OpenMP threads spin for some ten microseconds, which bridges the gap to the next operation, and then sleep:
    # if they spun on, processes that share a machine would starve each other; asleep at once, small models are slow.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    gc.set_threshold(50_000)  # imports make objects that stay; looking through them again and again takes a second
    signal.signal(signal.SIGTERM, _interrupt)
    signal.signal(signal.SIGINT, _interrupt)
    _ask_nothing()
    try:
        with translated():
            _run_app()
    except EmoSelectError as error:
        if _Shown.traceback:
            traceback.print_exc()
        progress.complain(f"Error: {error}")
        raise SystemExit(error.exit_code) from None
    except MemoryError:
        progress.complain("Error: The memory of this machine does not suffice; lower --token-budget or "
                          "--micro-batch-size, or take a larger machine.")
        raise SystemExit(1) from None
    except _Interrupted as interrupted:
        progress.say("Stopped. What was finished is kept; run the same command again to go on.")
        raise SystemExit(128 + interrupted.signum) from None
    except BrokenPipeError:
        raise SystemExit(141) from None
    finally:
        gc.freeze()  # the process ends: a last look through all that was imported would take a second


def _run_app() -> None:
    """The command, with its output written out before the program may call itself successful."""
    try:
        app()
    except SystemExit as done:
        if not done.code:
            sys.stdout.flush()
        raise


def _ask_nothing() -> None:
    """Nobody is asked anything: a library that wanted to (whether to run code, say) finds no answer on stdin."""
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="surrogateescape")  # names of files may hold any byte


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise _Interrupted(signum)  # unwinds the stack, so that files and locks are left in order


def _flow(commands: typer.Typer) -> None:
    """Let help texts break where the terminal ends, not where the docstring's lines do, and show them our way."""
    for command in commands.registered_commands:
        command.cls = Command
        paragraphs = inspect.cleandoc(command.help or getattr(command.callback, "__doc__", None) or "").split("\n\n")
        command.help = "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)
    for group in commands.registered_groups:
        if group.typer_instance is not None:
            group.typer_instance.info.cls = Group
            _flow(group.typer_instance)


for _group in GROUPS:
    importlib.import_module(f"emo_select.cli.{_group}").register(app)
_flow(app)
