"""Checkpoints of ours and the clients that are asked about them."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from client_calls import HERE, in_environment

Ask = Callable[..., Any]


@pytest.fixture(scope="session")
def ask(tmp_path_factory: pytest.TempPathFactory) -> Ask:
    """`ask("vllm", job)` runs ask_vllm.py in vLLM's environment on `job` and returns what it answers."""

    def run(name: str, job: Any) -> Any:
        folder = tmp_path_factory.mktemp(name)
        (folder / "job.json").write_text(json.dumps(job))
        in_environment(name, HERE / f"ask_{name.partition('_')[0]}.py", folder / "job.json", folder / "answer.json")
        return json.loads((folder / "answer.json").read_text())

    return run
