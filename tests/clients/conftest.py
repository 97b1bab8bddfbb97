"""Checkpoints of ours and the clients that are asked about them."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import environments
import pytest

HERE = Path(__file__).parent
Ask = Callable[..., Any]


@pytest.fixture(scope="session")
def ask(tmp_path_factory: pytest.TempPathFactory) -> Ask:
    """`ask("vllm", job)` runs ask_vllm.py in vLLM's environment on `job` and returns what it answers."""

    def run(name: str, job: Any, *, script: str | None = None, timeout: int = 900) -> Any:
        python = environments.python_of(name)
        if python is None:
            pytest.skip(f"the environment of {name} is not there; `make clients` makes it")
        folder = tmp_path_factory.mktemp(name)
        (folder / "job.json").write_text(json.dumps(job))
        command = [python, HERE / f"ask_{script or name}.py", folder / "job.json", folder / "answer.json"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=_environment())
        assert done.returncode == 0, done.stderr[-4000:]
        return json.loads((folder / "answer.json").read_text())

    return run


def _environment() -> dict[str, str]:
    """The checkout on the path (with its entry points, which vLLM looks for), nothing of pytest's."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST")}
    return kept | {"PYTHONPATH": str(HERE.parents[1]), "OMP_NUM_THREADS": "2"}
