"""Two processes that share the examples get the statistics and keep sets of one."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from emo_select.checkpoint import open_checkpoint
from emo_select.experts import KeepSet, Scores, collect_activations, select_layerwise
from emo_select.experts.scores import CRITERIA

GOLDEN = Path(__file__).parents[1] / "golden" / "models"
PROMPTS = [[5, 9, 11, 30], [7, 8], [40, 41, 42, 43, 44, 45, 46], [50], [13, 14, 15]]
GROUPS = ["a", "b", "a", "b", "c"]
PROGRAM = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_team import *
from emo_select.experts.stream import Reader
out, plain, dead = Path(sys.argv[2]), Reader.shell, set()
checkpoint = open_checkpoint(GOLDEN / "emo_shared1")

def once(self, layer):
    if layer == 2 and "ended" not in dead:
        dead.add("ended")
        raise KeyboardInterrupt
    return plain(self, layer)

def both(folder):
    collect_activations(checkpoint, PROMPTS, GROUPS, folder / "activations")
    found = select_layerwise(checkpoint, PROMPTS, [4, 8], work_dir=folder / "work")
    if os.environ["RANK"] == "1":
        found[8].save(folder / "selection.json")

both(out / "undisturbed")
Reader.shell = once
try:
    both(out / "resumed")
except KeyboardInterrupt:
    both(out / "resumed")
"""


def torchrun(out: Path) -> list[int]:
    """Start two processes as torchrun does; their exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    together = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", PROGRAM, str(Path(__file__).parent), str(out)]
    started = [subprocess.Popen(command, env={**together, "RANK": str(rank), "LOCAL_RANK": str(rank)})
               for rank in range(2)]
    return [process.wait(timeout=600) for process in started]


def test_two_processes_equal_one_and_go_on_after_a_crash(tmp_path: Path) -> None:
    assert torchrun(tmp_path) == [0, 0]
    checkpoint = open_checkpoint(GOLDEN / "emo_shared1")
    one = collect_activations(checkpoint, PROMPTS, GROUPS)
    two = Scores.load(tmp_path / "undisturbed" / "activations")
    assert (two.groups, two.tokens, two.examples) == (one.groups, one.tokens, one.examples)
    for name in CRITERIA:
        for a, b in zip(one.score(name), two.score(name), strict=True):
            assert a is not None and b == pytest.approx(a, rel=0, abs=2e-6 * max(a))
    alone = select_layerwise(checkpoint, PROMPTS, [8])[8]
    assert KeepSet.load(tmp_path / "undisturbed" / "selection.json").experts == alone.experts
    for name in ("selection.json", "activations/scores.safetensors", "activations/scores.json"):
        assert (tmp_path / "resumed" / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes()
