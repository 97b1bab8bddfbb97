"""Running Python in the environment of another program."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import environments
import pytest

HERE = Path(__file__).parent


def in_environment(name: str, *arguments: str | Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run Python with `arguments` in the environment of `name`, which has to end with exit code `code`."""
    python = environments.python_of(name)
    if python is None:
        pytest.skip(f"the environment of {name} is not there; `make clients` makes it")
    done = subprocess.run([python, *arguments], capture_output=True, text=True, timeout=3000, env=_environment())
    assert done.returncode == code, done.stderr[-4000:]
    return done


def _environment() -> dict[str, str]:
    """The checkout on the path (with its entry points, which vLLM looks for), nothing of pytest's."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST")}
    return kept | {"PYTHONPATH": str(HERE.parents[1]), "OMP_NUM_THREADS": "2", "VLLM_CPU_KVCACHE_SPACE": "1",
                   "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
