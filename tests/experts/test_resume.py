"""A killed pass goes on after the last finished layer, and its result is the same to the last byte."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from emo_select.checkpoint import open_checkpoint
from emo_select.experts import KeepSet, StreamOptions, collect_activations, select_layerwise
from emo_select.experts.scores import RECORD, TENSORS
from emo_select.experts.states import HiddenStates
from emo_select.experts.stream import Reader
from emo_select.ownership import MARKER

GOLDEN = Path(__file__).parents[1] / "golden" / "models"
PROMPTS = [[5, 9, 11, 30], [7, 8], [40, 41, 42, 43, 44, 45, 46], [50]]
KEEP_KS = [4, 8, (8, 12, 4, 6), 32]


class Killed(BaseException):
    """Stands for the end of the process in the middle of a layer."""


@pytest.fixture
def die_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[int]]:
    """Make the pass end when it asks for the shell of a layer; returns the layers asked for, in order."""
    plain = Reader.shell

    def arm(layer: int) -> list[int]:
        asked: list[int] = []

        def shell(self: Reader, wanted: int) -> Any:
            asked.append(wanted)
            if wanted == layer:
                raise Killed
            return plain(self, wanted)

        monkeypatch.setattr(Reader, "shell", shell)
        return asked

    return arm


def layerwise(work_dir: Path | None, model: str = "emo_shared1") -> dict[Any, KeepSet]:
    return select_layerwise(open_checkpoint(GOLDEN / model), PROMPTS, KEEP_KS, work_dir=work_dir)


@pytest.mark.parametrize("layer", [1, 2, 3])
@pytest.mark.parametrize("model", ["emo_shared1", "emo_densefirst"])
def test_layerwise(layer: int, model: str, tmp_path: Path, die_at: Callable[[int], list[int]]) -> None:
    if model == "emo_densefirst":
        KEEP_KS[-1] = 16
    undisturbed = layerwise(None, model)
    die_at(layer)
    with pytest.raises(Killed):
        layerwise(tmp_path / "work", model)
    asked = die_at(-1)
    resumed = layerwise(tmp_path / "work", model)
    assert asked[0] == layer - 1 and 0 not in asked[layer == 1:]  # its experts half is still to be run
    assert {k: v.model_dump_json() for k, v in resumed.items()} == \
        {k: v.model_dump_json() for k, v in undisturbed.items()}
    KEEP_KS[-1] = 32


@pytest.mark.parametrize("layer", [1, 3])
def test_activations(layer: int, tmp_path: Path, die_at: Callable[[int], list[int]]) -> None:
    checkpoint, groups = open_checkpoint(GOLDEN / "emo_densefirst"), ["a", "b", "a", "b"]
    collect_activations(checkpoint, PROMPTS, groups, tmp_path / "undisturbed")
    die_at(layer)
    with pytest.raises(Killed):
        collect_activations(checkpoint, PROMPTS, groups, tmp_path / "resumed")
    assert not (tmp_path / "resumed").exists()
    asked = die_at(-1)
    collect_activations(checkpoint, PROMPTS, groups, tmp_path / "resumed")
    assert asked == list(range(layer, 4))
    for name in (TENSORS, RECORD):
        assert (tmp_path / "resumed" / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes()
    assert sorted(path.name for path in (tmp_path / "resumed").iterdir()) == [MARKER, RECORD, TENSORS]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["resumed", "undisturbed"]


def test_a_snapshot_of_something_else_is_ignored(tmp_path: Path, die_at: Callable[[int], list[int]]) -> None:
    die_at(2)
    with pytest.raises(Killed):
        layerwise(tmp_path)
    asked = die_at(-1)
    other = select_layerwise(open_checkpoint(GOLDEN / "emo_shared1"), [*PROMPTS, [3]], KEEP_KS, work_dir=tmp_path)
    assert asked[0] == 0
    assert other == select_layerwise(open_checkpoint(GOLDEN / "emo_shared1"), [*PROMPTS, [3]], KEEP_KS)


def test_a_crash_while_a_snapshot_is_written_leaves_the_one_before(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, die_at: Callable[[int], list[int]]) -> None:
    undisturbed, plain, written = layerwise(None), HiddenStates.save, []

    def save(self: HiddenStates, path: Path) -> int:
        written.append(path.name)
        if path.name.startswith("2-"):
            path.write_bytes(b"half")
            raise Killed
        return plain(self, path)

    monkeypatch.setattr(HiddenStates, "save", save)
    with pytest.raises(Killed):
        layerwise(tmp_path)
    monkeypatch.undo()
    assert any(name.startswith("1-") for name in written)
    assert layerwise(tmp_path) == undisturbed


def test_kill_nine(tmp_path: Path, die_at: Callable[[int], list[int]]) -> None:
    """The real thing, in a process of its own, with the hidden states in the scratch file."""
    program = """
import os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_resume import *
plain, asked = Reader.shell, []
def shell(self, layer):
    if layer == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return plain(self, layer)
Reader.shell = shell
out = Path(sys.argv[2])
select_layerwise(open_checkpoint(GOLDEN / "emo_shared1"), PROMPTS, [4, 8], work_dir=out / "work",
                 options=StreamOptions(memory_budget=0, scratch=out / "scratch"))
"""
    command = [sys.executable, "-c", program, str(Path(__file__).parent), str(tmp_path)]
    done = subprocess.run(command, check=False, timeout=600, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == -signal.SIGKILL
    assert list((tmp_path / "scratch").iterdir()) == []
    assert json.loads((tmp_path / "work" / "resume-0" / "1.json").read_text())["hidden"] >= 1
    checkpoint, options = open_checkpoint(GOLDEN / "emo_shared1"), StreamOptions(memory_budget=0, scratch=tmp_path)
    asked = die_at(-1)
    resumed = select_layerwise(checkpoint, PROMPTS, [4, 8], work_dir=tmp_path / "work", options=options)
    assert asked == [1, 2, 3]
    assert resumed == select_layerwise(checkpoint, PROMPTS, [4, 8], options=options)
