"""Shared prefixes: cut where that saves most, run once, counted as often as they occur."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_families import MODELS
from test_stream import EMO, Hooked, Loaded, assert_equal_scores, loaded  # noqa: F401 - a fixture

from emo_select.experts import StreamOptions, collect_activations, select_layerwise
from emo_select.experts import prefixes as module
from emo_select.experts.batches import pack
from emo_select.experts.passes import Pass
from emo_select.experts.prefixes import split, whole
from emo_select.experts.scores import CRITERIA


def few_shot(seed: int = 0, shots: int = 40, texts: int = 6) -> list[list[int]]:
    """Two tasks, each with a prefix of its own, one text that is its prefix, and two texts apart."""
    draw = torch.Generator().manual_seed(seed)

    def ids(length: int) -> list[int]:
        return torch.randint(3, 60, (length,), generator=draw).tolist()

    found = []
    for _ in range(2):
        prefix = ids(shots)
        found += [prefix + ids(2 + text) for text in range(texts)] + [prefix]
    return [*found, ids(9), ids(14)]


@pytest.fixture(autouse=True)
def little_is_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LEAST_SAVED", 20)


@given(st.lists(st.tuples(st.integers(0, 3), st.lists(st.integers(0, 2), max_size=4)), max_size=12))
def test_segments_put_together_are_the_texts(drawn: list[tuple[int, list[int]]]) -> None:
    texts = [[group] * 20 + ids for group, ids in drawn]
    groups = [group % 2 for group, _ in drawn]
    segments = split(texts, groups)
    rest = segments[len(segments) - len(texts):]
    for text, group, segment in zip(texts, groups, rest, strict=True):
        before = [] if segment.parent is None else segments[segment.parent].tokens.tolist()
        assert [*before, *segment.tokens.tolist()] == text
        assert segment.weights == ((group, 1),)
    for number, prefix in enumerate(segments[:len(segments) - len(texts)]):
        below = [groups[i] for i, segment in enumerate(rest) if segment.parent == number]
        assert len(below) > 1
        assert dict(prefix.weights) == {group: below.count(group) for group in set(below)}
    assert sum(len(segment.tokens) * sum(n for _, n in segment.weights) for segment in segments) == sum(map(len, texts))


def test_every_task_has_a_prefix_of_its_own() -> None:
    header = [7] * 5
    texts = [header + [8 + task] * 30 + [20 + text] * 3 for task in range(3) for text in range(4)]
    segments = split(texts, [0] * 12)
    assert [len(segment.tokens) for segment in segments] == [35] * 3 + [3] * 12
    assert [segment.parent for segment in segments] == [None] * 3 + [0] * 4 + [1] * 4 + [2] * 4


def test_texts_that_share_little_are_left_whole() -> None:
    texts = [[1, 2, 3, *range(10 * i, 10 * i + 30)] for i in range(5, 12)]
    assert [segment.tokens.tolist() for segment in split(texts, [0] * 7)] == texts


@pytest.mark.parametrize("budget", [16, 64, 4096])
def test_mask_and_positions_are_those_of_separate_texts(budget: int) -> None:
    texts = few_shot()
    segments = split(texts, [0] * len(texts))
    batches = pack(segments, budget)
    assert sorted(n for batch in batches for n in batch.segments) == [n for n, s in enumerate(segments)
                                                                      if len(s.tokens)]
    assert [batch.leads for batch in batches] == sorted((batch.leads for batch in batches), reverse=True)
    for batch in (batch for batch in batches if batch.parent is not None):
        prefix = torch.from_numpy(segments[batch.parent].tokens)[:, None]
        packed = torch.from_numpy(np.concatenate([segments[n].tokens for n in batch.segments]))[:, None]
        laid_out, seen = batch.pad(packed, prefix)[..., 0], batch.mask(torch.float32, torch.device("cpu"))[:, 0] == 0
        assert torch.equal(batch.unpad(laid_out[..., None]), packed)
        whole_texts = []
        for (row, column), length in zip(batch._starts, batch.lengths, strict=True):
            last = column + length - 1
            whole_texts.append(laid_out[row, seen[row, last]].tolist())
            assert batch.positions()[row, seen[row, last]].tolist() == list(range(batch.context + length))
        assert sorted(whole_texts) == sorted([*prefix[:, 0].tolist(), *segments[n].tokens.tolist()]
                                             for n in batch.segments)


@pytest.mark.parametrize("name", [*MODELS, *EMO])
def test_scores_equal_hooks_on_the_loaded_model(loaded: Loaded, name: str, monkeypatch: pytest.MonkeyPatch  # noqa: F811
                                                ) -> None:
    model, checkpoint = loaded(name)
    texts, ran = few_shot(), []
    monkeypatch.setattr("emo_select.experts.passes.split", lambda *given: ran.append(split(*given)) or ran[-1])
    ours = collect_activations(checkpoint, texts)
    assert any(segment.parent is not None for segment in ran[0]), "no prefix was shared"
    theirs = Hooked(model, checkpoint.config).run(texts)
    for criterion in CRITERIA:
        for layer, score in enumerate(ours.score(criterion)):
            if score is not None:
                assert score == pytest.approx(theirs.score(layer, criterion), rel=2e-4, abs=2e-6), (criterion, layer)
    assert sum(ours.tokens) == theirs.tokens


def test_texts_longer_than_an_attention_window_are_run_whole(loaded: Loaded) -> None:  # noqa: F811
    _, checkpoint = loaded("gpt_oss")
    assert checkpoint.config["sliding_window"] == 128
    for shots, shared in ((100, True), (130, False)):
        segments = Pass(checkpoint, few_shot(shots=shots), None, StreamOptions()).segments
        assert any(segment.parent is not None for segment in segments) == shared


@pytest.mark.parametrize("name", ["emo_densefirst", "qwen2_moe", "deepseek_v3"])
@pytest.mark.parametrize("score", ["router_probability", "easy_ep"])
def test_layerwise_finds_what_whole_texts_give(loaded: Loaded, name: str, score: str,  # noqa: F811
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    _, checkpoint = loaded(name)
    texts, found = few_shot(), []
    groups = ["a", "b", *["a"] * 5, *["b"] * 7, "a", "b"]
    for cut in (split, whole):
        monkeypatch.setattr("emo_select.experts.passes.split", cut)
        found.append(select_layerwise(checkpoint, texts, [6, 9], groups=groups, weights={"a": 2, "b": 1}, score=score,
                                      options=StreamOptions(token_budget=48)))
    for keep in (6, 9):
        shared, apart = (result[keep] for result in found)
        assert shared.experts == apart.experts
        assert_equal_scores(rows(shared.scores), rows(apart.scores))


def rows(scores: Any) -> Sequence[Sequence[float] | None]:
    assert scores is not None
    return list(scores)
