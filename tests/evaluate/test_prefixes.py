"""The trie plan: every input is in exactly one pack, shared tokens run once, masks follow ancestors."""

from __future__ import annotations

import numpy as np
import pytest

from emo_select.evaluate.prefixes import Planner, ScoredInput, build_pack, common_prefix


def scored(tokens: list[int], continuation: int) -> ScoredInput:
    return ScoredInput(np.array(tokens, dtype=np.int64), len(tokens) - continuation)


def few_shot_inputs(docs: int, choices: int, block: int, seed: int = 0) -> list[ScoredInput]:
    rng = np.random.default_rng(seed)
    shots = rng.integers(0, 50, block).tolist()
    rows = []
    for _ in range(docs):
        context = shots + rng.integers(0, 50, 12).tolist()
        rows += [scored(context + rng.integers(0, 50, 5).tolist(), 6) for _ in range(choices)]
    return rows


def tokens_run(inputs: list[ScoredInput], budget: int) -> int:
    blocks = Planner(inputs, budget).plan()
    return sum(
        block.length + sum(len(build_pack([inputs[i] for i in pack], block.length).tokens) for pack in block.packs)
        for block in blocks
    )


@pytest.mark.parametrize("budget", [1, 40, 200, 10_000])
def test_every_input_is_in_one_pack_and_continues_its_block(budget: int) -> None:
    inputs = few_shot_inputs(docs=20, choices=4, block=100) + few_shot_inputs(docs=9, choices=2, block=150, seed=1)
    inputs += [scored([1, 2, 3], 1), scored([1, 2, 3], 1), scored([1, 2], 2)]
    blocks = Planner(inputs, budget).plan()
    assert sorted(i for block in blocks for pack in block.packs for i in pack) == list(range(len(inputs)))
    for block in blocks:
        for index in (i for pack in block.packs for i in pack):
            assert inputs[index].tokens[: block.length].tolist() == block.prefix.tolist()
            assert inputs[index].first_scored >= block.length


def test_the_few_shot_block_and_each_context_run_once() -> None:
    inputs = few_shot_inputs(docs=30, choices=4, block=300)
    least = 300 + 30 * (12 + 4 * 5)
    assert tokens_run(inputs, budget=10_000) == pytest.approx(least, rel=0.02)
    # Small packs cut between documents, so hardly anything runs twice.
    assert tokens_run(inputs, budget=200) == pytest.approx(least, rel=0.05)
    assert sum(len(row.tokens) for row in inputs) > 20 * least


def test_subjects_get_a_block_each() -> None:
    subjects = [few_shot_inputs(docs=20, choices=4, block=200, seed=seed) for seed in range(3)]
    blocks = Planner([row for subject in subjects for row in subject], budget=150).plan()
    assert sorted(block.length for block in blocks if block.length >= 200) == pytest.approx([200] * 3, abs=2)


def test_a_prefix_never_swallows_a_scored_position() -> None:
    inputs = [scored([7] * 100 + [9, i], 2) for i in range(50)]
    blocks = Planner(inputs, budget=20).plan()
    assert max(block.length for block in blocks) == 100


def test_pack_layout() -> None:
    inputs = [scored([1, 2, 3, 4], 2), scored([1, 2, 3, 5, 6], 2), scored([1, 2, 9], 1)]
    pack = build_pack(inputs, base=1)
    assert pack.tokens.tolist() == [2, 3, 4, 5, 6, 9]
    assert pack.positions.tolist() == [1, 2, 3, 3, 4, 2]
    assert [ids.tolist() for ids in pack.scored] == [[1, 2], [3, 4], [5]]
    seen = [np.flatnonzero(row).tolist() for row in pack.allowed]
    assert seen == [[0], [0, 1], [0, 1, 2], [0, 1, 3], [0, 1, 3, 4], [0, 5]]


def test_inputs_that_contain_each_other_or_repeat_add_nothing() -> None:
    inputs = [scored([1, 2], 1), scored([1, 2], 2), scored([1, 2, 3], 2)]
    pack = build_pack(inputs, base=0)
    assert pack.tokens.tolist() == [1, 2, 3]
    assert [ids.tolist() for ids in pack.scored] == [[1], [0, 1], [1, 2]]


def test_common_prefix() -> None:
    a = np.array([1, 2, 3])
    assert common_prefix(a, np.array([1, 2, 4])) == 2
    assert common_prefix(a, a) == 3
    assert common_prefix(a, np.array([1], dtype=np.int64)) == 1
    assert common_prefix(a, np.empty(0, np.int64)) == 0
