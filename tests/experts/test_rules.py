"""Choosing experts: properties that hold for every score."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emo_select import progress
from emo_select.errors import KeepKError
from emo_select.experts import prune_checkpoint, select_random
from emo_select.experts.rules import LayerRules, choose, full_set, layer_rules, resolve_keep_k
from emo_select.experts.select import Selection, select_experts

EMO = {"model_type": "emo", "num_hidden_layers": 3, "num_experts": 12, "num_shared_experts": 2,
       "num_experts_per_tok": 4}
DENSE_FIRST = {**EMO, "num_experts_per_layer": [0, 12, 8], "num_shared_experts_per_layer": [0, 2, 1]}
GROUPED = {"model_type": "deepseek_v3", "num_hidden_layers": 3, "n_routed_experts": 12, "first_k_dense_replace": 1,
           "n_group": 3, "topk_group": 2, "num_experts_per_tok": 3}


@st.composite
def layers(draw: Any) -> tuple[LayerRules, int, list[float]]:
    groups = draw(st.integers(1, 3))
    shared = draw(st.integers(0, 3)) if groups == 1 else 0
    routed = groups * draw(st.integers(2, 8))
    keep_shared = draw(st.integers(0, shared))
    active = tuple(draw(st.sets(st.integers(0, routed - 1), max_size=2))) if groups == 1 else ()
    per_group = draw(st.integers(max(1, len(active)), routed // groups))
    scores = draw(st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=routed + shared, max_size=routed + shared))
    return LayerRules(routed + shared, shared, keep_shared, active, groups), per_group * groups + keep_shared, scores


@given(layers())
def test_choice_is_the_best_that_the_rules_allow(case: tuple[LayerRules, int, list[float]]) -> None:
    rules, keep, scores = case
    kept = choose(scores, keep, rules)
    assert kept == sorted(set(kept)) and len(kept) == keep
    if keep == rules.experts:
        return
    assert set(rules.always_active) <= set(kept)
    assert sum(expert >= rules.routed for expert in kept) == rules.keep_shared
    size = rules.routed // rules.groups
    for first in range(0, rules.routed, size):
        group = range(first, first + size)
        chosen = [e for e in group if e in kept]
        assert len(chosen) == (keep - rules.keep_shared) // rules.groups
        free = [e for e in chosen if e not in rules.always_active]
        for out in (e for e in group if e not in kept):  # every dropped one is worse, or as good and later
            assert all((-scores[e], e) < (-scores[out], out) for e in free)


@pytest.mark.parametrize(("config", "keep_k", "num_shared"), [
    (EMO, 13, None), (EMO, 2, None), (EMO, 0, 0), (EMO, (4, 4), None), (EMO, (4, 4, 2), None), (GROUPED, 8, None),
    (GROUPED, 3, None), (GROUPED, (6, 8, 6), None), ({**EMO, "num_shared_experts": 0, "always_active_experts": [1, 2]},
                                                     2, None)])
def test_impossible_keep_k(config: dict[str, Any], keep_k: Any, num_shared: int | None) -> None:
    with pytest.raises(KeepKError):
        resolve_keep_k(config, keep_k, num_shared)


def test_layers_with_fewer_experts_keep_all_of_theirs() -> None:
    assert resolve_keep_k(DENSE_FIRST, 10) == [None, 10, 8]
    assert resolve_keep_k(DENSE_FIRST, (99, 4, 99)) == [None, 4, 8]
    rules = layer_rules(DENSE_FIRST, num_shared=1)
    assert [rule and (rule.shared, rule.keep_shared) for rule in rules] == [None, (2, 1), (1, 1)]
    assert full_set(rules) == [None, list(range(12)), list(range(8))]


def test_random_respects_groups_and_always_active() -> None:
    grouped = select_random(GROUPED, 6, seed=3)
    assert grouped.experts[0] is None
    for kept in grouped.experts[1:]:
        assert kept is not None and [sum(e // 4 == group for e in kept) for group in range(3)] == [2, 2, 2]
    active = select_random({**EMO, "num_shared_experts": 0, "always_active_experts": [11, 3]}, 4, seed=1)
    assert all(kept is not None and {3, 11} <= set(kept) and len(kept) == 4 for kept in active.experts)
    assert select_random(EMO, 5, seed=1).experts != select_random(EMO, 5, seed=2).experts
    assert select_random(EMO, 5, seed=1) == select_random(EMO, 5, seed=1)


def test_a_schedule_below_top_k_is_said_by_select_and_by_prune_and_once(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The tiny model uses 4 experts per token; one entry of 3 holds for all layers."""
    wanted = Selection(keep_k=[[32, 16, 3, 8]], method="random")
    [keep_set] = select_experts(str(tiny), wanted).values()
    said = "Layer 2 keeps 3 experts, fewer than the 4 that a token uses, so the pruned model uses 3 per token in every"
    assert capsys.readouterr().err.replace("\n", " ").count(said) == 1
    progress.configure(quiet=False)
    progress._state.said.clear()  # another process
    for name in ("one", "two"):
        prune_checkpoint(str(tiny), keep_set, tmp_path / name, allow_nonuniform=True)
    assert capsys.readouterr().err.replace("\n", " ").count(said) == 1
    config = json.loads((tmp_path / "one" / "config.json").read_text())
    assert config["num_experts_per_tok"] == 3 and min(config["num_experts_per_layer"]) == 3
