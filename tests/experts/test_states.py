"""Packing and the hidden-state cache."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from emo_select.errors import DiskSpaceError, SpecError
from emo_select.experts.batches import pack
from emo_select.experts.prefixes import Segment
from emo_select.experts.states import Budget, HiddenStates
from emo_select.spec import parse_bytes

CPU = torch.device("cpu")


def alone(lengths: Sequence[int], groups: Sequence[int] | None = None) -> list[Segment]:
    return [Segment(np.arange(length), ((group, 1),))
            for length, group in zip(lengths, groups or [0] * len(lengths), strict=True)]


@given(st.lists(st.integers(0, 40), max_size=30), st.integers(1, 120))
def test_packing_covers_every_token_once(lengths: list[int], budget: int) -> None:
    batches = pack(alone(lengths), budget)
    assert sorted(e for b in batches for e in b.segments) == [i for i, n in enumerate(lengths) if n]
    at = 0
    for batch in batches:
        assert batch.start == at
        at = batch.stop
        rows, width = batch.shape
        assert rows * width <= budget or rows == 1
        assert batch.lengths == tuple(lengths[e] for e in batch.segments)
    assert at == sum(lengths)


def test_padding_is_on_the_right_and_comes_off_again() -> None:
    segments = alone([2, 3], [0, 1])
    (batch,) = pack(segments, 100)
    packed = torch.arange(1.0, 6.0)[:, None]
    assert batch.pad(packed)[..., 0].tolist() == [[1, 2, 3], [4, 5, 0]]
    assert torch.equal(batch.unpad(batch.pad(packed)), packed)
    assert [(group, None if rows is None else rows.tolist(), times)
            for group, rows, times in batch.group_rows(segments)] == [(0, [3, 4], 1), (1, [0, 1, 2], 1)]
    assert batch.group_rows(alone([2, 3], [5, 5])) == [(5, None, 1)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_tier_keeps_the_same_bytes(tmp_path: Path, dtype: torch.dtype) -> None:
    values = torch.randn(50, 8).to(dtype)
    tiers = {}
    for limit in (None, 0):
        states = Budget(CPU, limit, tmp_path).allocate(50, 8, dtype)
        tiers[states.tier] = states
        states.write(0, values[:30])
        states.write(30, values[30:])
        assert torch.equal(states.read_rows(0, 50), values)
        assert states.save(tmp_path / "saved") == values.numel() * dtype.itemsize
        copy = Budget(CPU, None).allocate(50, 8, dtype)
        copy.load(tmp_path / "saved")
        assert torch.equal(copy.read_rows(7, 33), values[7:33])
    assert tiers.keys() == {"host", "scratch"}


def test_budget_is_shared_and_given_back(tmp_path: Path) -> None:
    budget = Budget(CPU, 1000, tmp_path)
    first = budget.allocate(10, 20, torch.float32)
    second = budget.allocate(10, 20, torch.float32)
    assert (first.tier, second.tier) == ("host", "scratch")
    budget.release(first)
    assert budget.allocate(10, 20, torch.float32).tier == "host"


def test_scratch_file_has_no_name_so_a_crash_leaves_nothing(tmp_path: Path) -> None:
    program = """
import os, sys, torch
from pathlib import Path
from emo_select.experts.states import Budget
states = Budget(torch.device("cpu"), 0, Path(sys.argv[1])).allocate(1000, 64, torch.float32)
states.write(0, torch.ones(1000, 64))
assert list(Path(sys.argv[1]).iterdir()) == []
os.kill(os.getpid(), 9)
"""
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False, timeout=120)
    assert done.returncode == -9
    assert list(tmp_path.iterdir()) == []


def test_scratch_that_does_not_fit_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(DiskSpaceError, match="scratch"):
        Budget(CPU, 0, tmp_path).allocate(10**12, 4096, torch.float32)


def test_sizes() -> None:
    assert [parse_bytes(text) for text in ("8GB", "1.5 MiB", "200", "2k")] == [8 * 10**9, 3 * 2**19, 200, 2000]
    for text in ("much", "", "-1GB", "1..5GB", "8XB"):
        with pytest.raises(SpecError, match="8GB"):
            parse_bytes(text)


def test_abstract_states_name_their_tier() -> None:
    assert all(cls.tier for cls in HiddenStates.__subclasses__() if "tier" in vars(cls))
