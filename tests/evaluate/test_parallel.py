"""Several processes give the files of one, each with its own share of the documents."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from emo_select.evaluate import EvalOptions, evaluate_checkpoint, parallel
from emo_select.tasks import get_tasks

PROGRAM = """
import json, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from emo_select.evaluate import EvalOptions, evaluate_checkpoint, run
from emo_select.tasks import get_tasks
loaded, load = [], run.load_engine
run.load_engine = lambda *args: loaded.append(load(*args)) or loaded[0]
evaluate_checkpoint(sys.argv[1], get_tasks(["demo"])[:2], Path(sys.argv[2]), EvalOptions(limit=5, device="cpu"))
print(json.dumps({"tokens": loaded[0].counters.total}))
"""


def test_two_processes_write_what_one_writes(model: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python",
               sys.executable, "-c", PROGRAM, str(model), str(tmp_path / "two")]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    tokens = [json.loads(line)["tokens"] for line in done.stdout.splitlines() if line.startswith("{")]
    evaluate_checkpoint(model, get_tasks(["demo"])[:2], tmp_path / "one", EvalOptions(limit=5, device="cpu"))
    files = sorted(path.name for path in (tmp_path / "one").glob("[!.]*"))
    assert files == sorted(path.name for path in (tmp_path / "two").glob("[!.]*"))
    for name in files:
        assert metrics(tmp_path / "one" / name) == pytest.approx(metrics(tmp_path / "two" / name), abs=1e-5)
    assert len(tokens) == 2 and min(tokens) > 0.25 * sum(tokens)  # both did a share


def metrics(path: Path) -> dict[str, Any]:
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.suffix == ".jsonl" else (
        [json.loads(path.read_text())])
    return {f"{i} {key}": value for i, line in enumerate(lines) for key, value in line["metrics"].items()
            if isinstance(value, int | float)}


def test_documents_stay_whole_and_go_round(monkeypatch: pytest.MonkeyPatch) -> None:
    owners = ["a", "a", "b", "c", "b", "d"]
    monkeypatch.setattr(parallel, "world_size", lambda: 3)
    shares = []
    for rank in range(3):
        monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
        shares.append(parallel.own_share(owners))
    assert shares == [[0, 1, 5], [2, 4], [3]]


def test_alone_without_torchrun() -> None:
    with parallel.process_group():
        assert (parallel.rank(), parallel.world_size(), parallel.exchanged("x")) == (0, 1, ["x"])
