"""Selection equals the published code's numbers in fp32 (tests/golden/selection; tolerances from its README)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from emo_select.checkpoint import Checkpoint, open_checkpoint
from emo_select.experts import KeepSet, Scores, collect_activations, select_from_scores, select_layerwise, select_random
from emo_select.experts.calibration import draw

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = ("shared1", "densefirst", "densefirst_variable", "noshared")
PROBABILITY_ATOL = 5e-6
EASY_EP_RTOL = 1e-4
Rows = Sequence[Sequence[float] | None]


def stored(case: str, name: str) -> Any:
    return json.loads((GOLDEN / "selection" / case / f"{name}.json").read_text())


def checkpoint_of(case: str) -> Checkpoint:
    return open_checkpoint(GOLDEN / stored(case, "case")["model"])


@cache
def scores_of(case: str) -> Scores:
    return collect_activations(checkpoint_of(case), stored(case, "prompts")["prompts"])


def lists(keep_set: KeepSet) -> list[list[int] | None]:
    return [None if kept is None else list(kept) for kept in keep_set.experts]


def largest_difference(ours: Rows | None, theirs: Rows) -> float:
    assert ours is not None
    assert [row is None for row in ours] == [row is None for row in theirs]
    return max(abs(a - b) for x, y in zip(ours, theirs, strict=True) if x and y for a, b in zip(x, y, strict=True))


@pytest.mark.parametrize(("case", "num_shared"), [("shared1", 0), ("noshared", 0), ("shared1", 1), ("densefirst", 1),
                                                  ("densefirst_variable", 1)])
def test_layerwise_for_all_keep_k_in_one_pass(case: str, num_shared: int) -> None:
    runs = {r["keep_k"]: r for r in stored(case, "layerwise")["runs"].values() if r["num_shared_experts"] == num_shared}
    assert runs
    found = select_layerwise(checkpoint_of(case), stored(case, "prompts")["prompts"], list(runs), num_shared=num_shared)
    for keep_k, run in runs.items():
        assert lists(found[keep_k]) == run["experts_kept_per_layer"]
        if found[keep_k].scores is None:  # keeps everything, so nothing was ranked
            assert keep_k == max(stored(case, "case")["experts_per_layer"])
            continue
        difference = largest_difference(found[keep_k].scores, run["avg_probs_per_layer"])
        print(f"{case} keep-k {keep_k}: largest difference of average probabilities {difference:.1e}")
        assert difference <= PROBABILITY_ATOL


@pytest.mark.parametrize("case", CASES)
def test_layerwise_alone_equals_layerwise_among_others(case: str) -> None:
    checkpoint, prompts = checkpoint_of(case), stored(case, "prompts")["prompts"]
    together = select_layerwise(checkpoint, prompts, [4, 8, 12])
    for keep_k, keep_set in together.items():
        alone = select_layerwise(checkpoint, prompts, [keep_k])[keep_k]
        assert alone.experts == keep_set.experts
        assert largest_difference(alone.scores, keep_set.scores or ()) <= 1e-12


@pytest.mark.parametrize("case", CASES)
def test_variable_schedules(case: str) -> None:
    experts = stored(case, "case")["experts_per_layer"]
    for run in stored(case, "variable").values():
        schedule = tuple(run["keep_k_per_layer"])
        found = select_layerwise(checkpoint_of(case), stored(case, "prompts")["prompts"], [schedule],
                                 num_shared=run["num_shared_experts"])[schedule]
        # the reference writes null for layers that it leaves as they are
        changed = [kept if kept and len(kept) < count else None
                   for kept, count in zip(lists(found), experts, strict=True)]
        assert changed == run["experts_kept_per_layer"]
        assert found.method == "variable"


@pytest.mark.parametrize("case", CASES)
def test_easy_ep(case: str) -> None:
    stored_scores = stored(case, "easy_ep")["scores_per_layer_float64"]
    ours = scores_of(case).score("easy_ep")
    worst = max(abs(a - b) / b for x, y in zip(ours, stored_scores, strict=True) if x for a, b in zip(x, y, strict=True)
                if b)
    print(f"{case}: largest relative difference of EASY-EP scores {worst:.1e}")
    assert worst <= EASY_EP_RTOL
    for run in stored(case, "easy_ep")["runs"].values():
        found = select_from_scores(scores_of(case), "easy_ep", run["keep_k"], checkpoint_of(case).config,
                                   num_shared=run["num_shared_experts"])
        assert lists(found) == run["experts_kept_per_layer"]


def test_easy_ep_fills_up_with_the_lowest_unused_experts() -> None:
    filled = 0
    for run in stored("shared1", "easy_ep")["few_prompts_with_ties"].values():
        prompts = [stored("shared1", "prompts")["prompts"][i] for i in run["prompt_indices_in_order"]]
        scores = collect_activations(checkpoint_of("shared1"), prompts)
        found = select_from_scores(scores, "easy_ep", run["keep_k"], checkpoint_of("shared1").config, num_shared=1)
        rows = zip(found.experts, scores.score("easy_ep"), run["kept_with_nonzero_score"], strict=True)
        for kept, score, theirs in rows:
            assert kept is not None and score is not None
            unused = [expert for expert in range(31) if score[expert] == 0]
            filling = [expert for expert in kept if score[expert] == 0]
            assert [expert for expert in kept if score[expert] > 0] == theirs
            assert filling == unused[:len(filling)]
            filled += len(filling)
    assert filled > 0


@pytest.mark.parametrize("case", ["shared1", "noshared"])
def test_global(case: str) -> None:
    reference = stored(case, "global")
    difference = largest_difference(scores_of(case).score("router_probability"), reference["avg_router_probabilities"])
    print(f"{case}: largest difference of global probabilities {difference:.1e}")
    assert difference <= PROBABILITY_ATOL
    for run in reference["runs"].values():
        found = select_from_scores(scores_of(case), "global", run["keep_k"], checkpoint_of(case).config,
                                   num_shared=run["num_shared_experts"])
        assert lists(found) == run["experts_kept_per_layer"]


@pytest.mark.parametrize("case", ["densefirst", "densefirst_variable"])
def test_global_works_for_dense_first_layers(case: str) -> None:
    """The reference fails here. Before anything is pruned, layerwise and global see the same layer."""
    first = select_layerwise(checkpoint_of(case), stored(case, "prompts")["prompts"], [8]).popitem()[1]
    ours = select_from_scores(scores_of(case), "global", 8, checkpoint_of(case).config)
    assert ours.experts[0] is None
    assert ours.experts[1] == first.experts[1]
    assert ours.scores is not None and first.scores is not None
    assert ours.scores[1] == pytest.approx(first.scores[1], abs=1e-9)


@pytest.mark.parametrize("case", CASES)
def test_random(case: str) -> None:
    for run in stored(case, "random").values():
        found = select_random(checkpoint_of(case).config, run["keep_k"], run["seed"],
                              num_shared=run["num_shared_experts"])
        assert lists(found) == run["experts_kept_per_layer"]


def test_random_at_the_published_size() -> None:
    config = {"model_type": "emo", "num_hidden_layers": 16, "num_experts": 128, "num_shared_experts": 1,
              "num_experts_per_tok": 8}
    for run in json.loads((GOLDEN / "selection" / "random_real_size.json").read_text())["runs"].values():
        found = select_random(config, run["keep_k"], run["seed"], num_shared=run["num_shared_experts"])
        assert lists(found) == run["experts_kept_per_layer"]


def test_published_draw_of_calibration_texts() -> None:
    prompts = stored("shared1", "prompts")["prompts"]
    for run in stored("shared1", "calibration_subsample")["runs"].values():
        chosen = draw(len(prompts), run["num_calibration"], run["prune_seed"])
        assert chosen == run["prompt_indices_in_order"]
        found = select_layerwise(checkpoint_of("shared1"), [prompts[i] for i in chosen], [run["keep_k"]],
                                 num_shared=run["num_shared_experts"])[run["keep_k"]]
        assert lists(found) == run["experts_kept_per_layer"]
        assert largest_difference(found.scores, run["avg_probs_per_layer"]) <= PROBABILITY_ATOL


def test_texts_cut_at_4096_tokens() -> None:
    reference = stored("shared1", "truncation")
    prompts = [ids[:4096] for ids in reference["prompts"]]
    found = select_layerwise(checkpoint_of("shared1"), prompts, [reference["keep_k"]],
                             num_shared=reference["num_shared_experts"])[reference["keep_k"]]
    assert lists(found) == reference["experts_kept_per_layer"]
    assert largest_difference(found.scores, reference["avg_probs_per_layer"]) <= PROBABILITY_ATOL
