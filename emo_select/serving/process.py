"""A server in a process of its own: started, watched until it answers, asked, and stopped with everything it began."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any
from urllib.error import URLError
from urllib.request import Request, urlopen

from emo_select.errors import EmoSelectError, UsageError
from emo_select.serving.engines import Engine, Server, runnable

GRACE = 20  # seconds between asking and killing


@contextmanager
def running(engine: Engine, server: Server) -> Iterator[subprocess.Popen[bytes]]:
    """Start it in a process group of its own and stop the group in the end; what it prints goes to stderr."""
    _require_free(server)
    process = subprocess.Popen(runnable(engine.command(server)), stdout=2, start_new_session=True)
    try:
        yield process
    finally:
        _stop(process)


def wait_until_healthy(process: subprocess.Popen[bytes], engine: Engine, server: Server) -> None:
    """Return once GET /health succeeds; raises `EmoSelectError` where the server ends before."""
    while not _is_healthy(server):
        if (code := process.poll()) is not None:
            raise EmoSelectError(f"{engine.name} ended with exit code {code} before it was ready; what it printed "
                                 "above says why.")
        time.sleep(0.5)


def complete(engine: Engine, server: Server, prompt: str, tokens: int = 8) -> str:
    """A greedy completion by POST /v1/completions; raises `EmoSelectError` where that fails."""
    body = {"model": engine.model_in_requests(server), "prompt": prompt, "max_tokens": tokens, "temperature": 0}
    request = Request(f"{server.address}/v1/completions", json.dumps(body).encode(),
                      {"Content-Type": "application/json"})
    try:
        with urlopen(request, timeout=600) as answer:
            found: Any = json.load(answer)
        return str(found["choices"][0]["text"])
    except (OSError, ValueError, LookupError) as error:
        raise EmoSelectError(f"The server at {server.address} is up, but a completion failed: {error}.") from error


def _is_healthy(server: Server) -> bool:
    try:
        with urlopen(f"{server.address}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except (URLError, OSError):
        return False


def _require_free(server: Server) -> None:
    family = socket.AF_INET6 if ":" in server.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((server.host, server.port))
        except (OSError, OverflowError) as error:
            raise UsageError(f"Cannot listen on {server.host} port {server.port} ({error}); choose another with "
                             "--port.") from None


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ask the server to end; whatever it started is killed once it has, takes too long, or we are interrupted again."""
    try:
        _signal(process, signal.SIGTERM)
        process.wait(GRACE)
    except subprocess.TimeoutExpired:
        pass
    finally:
        _signal(process, signal.SIGKILL)
        process.wait()


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)
