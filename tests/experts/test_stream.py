"""Streaming gives what hooks on the loaded model give: every family, any batches, wherever hidden states lie."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from test_families import MODELS, MaskedRouter, build

from emo_select.checkpoint import Checkpoint, open_checkpoint
from emo_select.experts import StreamOptions, collect_activations, select_from_scores, select_layerwise
from emo_select.experts.rules import choose, layer_rules
from emo_select.experts.scores import CRITERIA
from emo_select.models import load_model
from emo_select.models.families import always_active_per_layer, experts_per_layer, family_of, shared_per_layer

GOLDEN = Path(__file__).parents[1] / "golden" / "models"
EMO = ("emo_shared1", "emo_noshared_norm", "emo_densefirst_bias_variable", "emo_alwaysactive",
       "emo_alwaysactive_perlayer", "emo_biasattn_tied_headdim", "emo_ropescaling", "emo_sharded")
Loaded = Callable[[str], tuple[Any, Checkpoint]]


def prompts(vocabulary: int = 60, seed: int = 0) -> list[list[int]]:
    draw = torch.Generator().manual_seed(seed)
    lengths = [7, 3, 12, 7, 1, 9, 12, 5]
    return [torch.randint(3, vocabulary, (length,), generator=draw).tolist() for length in lengths]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    """(model in memory, checkpoint on disk) of a family or of a golden emo model, built once."""
    made: dict[str, tuple[Any, Checkpoint]] = {}

    def get(name: str) -> tuple[Any, Checkpoint]:
        if name not in made and name in MODELS:
            folder = tmp_path_factory.mktemp(name)
            model = build(name)
            model.save_pretrained(folder)
            made[name] = model, open_checkpoint(folder)
        elif name not in made:
            made[name] = load_model(str(GOLDEN / name)).eval(), open_checkpoint(GOLDEN / name)
        return made[name]

    return get


class Hooked:
    """Statistics by hooks on a loaded model, one prompt at a time, one expert at a time, in fp64."""

    def __init__(self, model: Any, config: dict[str, Any]) -> None:
        self.model, self.family, self.config = model, family_of(config), config
        counts = experts_per_layer(config)
        names = ("probability", "count", "gate", "norm", "reap", "reap_renormalised", "easy_ep")
        self.sums = [{name: torch.zeros(count, dtype=torch.float64) for name in names} for count in counts]
        self.tokens = 0

    def run(self, ids: Sequence[Sequence[int]]) -> Hooked:
        handles = [handle for layer, count in enumerate(experts_per_layer(self.config)) if count
                   for handle in self._attach(layer)]
        with torch.no_grad():
            for prompt in ids:
                self.tokens += len(prompt)
                self.model(torch.tensor([prompt]))
        for handle in handles:
            handle.remove()
        return self

    def score(self, layer: int, name: str) -> list[float]:
        s = self.sums[layer]
        used = s["count"].clamp(min=1)
        return {"router_probability": s["probability"] / self.tokens, "frequency": s["count"] / self.tokens,
                "gate_mass": s["gate"] / self.tokens, "easy_ep": s["easy_ep"], "ean": s["norm"] / used,
                "reap": s["reap"] / used, "reap_renormalised": s["reap_renormalised"] / used}[name].tolist()

    def _attach(self, layer: int) -> list[Any]:
        decoder = self.model.model.layers[layer]
        block, router = decoder.get_submodule(self.family.moe_module), decoder.get_submodule(self.family.router_module)
        experts, seen = decoder.get_submodule(self.family.experts_module), []

        def after_block(module: Any, inputs: Any, output: Any) -> None:
            output = output[0] if isinstance(output, tuple) else output
            self._add(layer, experts, seen.pop(), inputs[0][0], output.reshape(inputs[0].shape)[0])

        return [router.register_forward_hook(lambda module, inputs, output: seen.append(output)),
                block.register_forward_hook(after_block)]

    def _add(self, layer: int, experts: Any, routing: Any, hidden: torch.Tensor, output: torch.Tensor) -> None:
        logits, gates, index = routing
        probability, sums = self._probability(layer, logits), self.sums[layer]
        sums["probability"] += probability.sum(0, dtype=torch.float64)
        turn = (1 - torch.cosine_similarity(hidden, hidden + output, dim=-1)).clamp(min=0)
        shared_from = len(sums["count"]) - shared_per_layer(self.config)[layer]
        for expert in set(index.flatten().tolist()):
            token, slot = torch.where(index == expert)
            gate = gates[token, slot]
            everywhere = torch.full((len(token), 1), expert)
            norm = experts(hidden[token], everywhere, torch.ones(len(token), 1)).norm(dim=-1)
            peers = (gates * ((index >= shared_from) == (expert >= shared_from))).sum(-1)[token]
            for name, value in (("count", torch.ones(len(token))), ("gate", gate), ("norm", norm),
                                ("reap", gate * norm), ("reap_renormalised", gate / peers * norm),
                                ("easy_ep", probability[token, expert] * norm * turn[token])):
                sums[name][expert] += value.sum(dtype=torch.float64)

    def _probability(self, layer: int, logits: torch.Tensor) -> torch.Tensor:
        if self.family.scoring == "sigmoid":
            return logits.sigmoid()
        shared = shared_per_layer(self.config)[layer]
        if not shared or always_active_per_layer(self.config)[layer]:
            return logits.softmax(-1)
        return torch.cat([logits[:, :-shared].softmax(-1), logits[:, -shared:].softmax(-1)], -1)


def restrict(model: Any, config: dict[str, Any], layer: int, kept: Sequence[int]) -> None:
    """Let a layer of the model in memory route to the kept experts only."""
    router = model.model.layers[layer].get_submodule(family_of(config).router_module)
    count, plain = router.weight.shape[0], router.forward
    router.top_k = min(router.top_k, len(kept))
    if hasattr(router, "e_score_correction_bias"):
        router.e_score_correction_bias[[e for e in range(count) if e not in kept]] = -torch.inf

    def forward(hidden: torch.Tensor) -> Any:
        with MaskedRouter(tuple(kept), count):
            return plain(hidden)

    router.forward = forward


def plain_layerwise(model: Any, config: dict[str, Any], ids: Sequence[Sequence[int]], keep: int, score: str
                    ) -> list[list[int] | None]:
    """The definition: the whole restricted model runs again for every layer."""
    restricted, kept = copy.deepcopy(model), []
    for layer, rules in enumerate(layer_rules(config)):
        if rules is None:
            kept.append(None)
            continue
        chosen = choose(Hooked(restricted, config).run(ids).score(layer, score), min(keep, rules.experts), rules)
        restrict(restricted, config, layer, chosen)
        kept.append(chosen)
    return kept


def assert_equal_scores(ours: Sequence[Sequence[float] | None], theirs: Sequence[Sequence[float] | None]) -> None:
    """Equal but for what fp32 activations leave; the reference's own batches differ by 1.3e-6."""
    for a, b in zip(ours, theirs, strict=True):
        assert a == (b and pytest.approx(b, rel=0, abs=2e-6 * max(b)))


@pytest.mark.parametrize("name", [*MODELS, *EMO])
def test_all_criteria_equal_hooks_on_the_loaded_model(loaded: Loaded, name: str) -> None:
    model, checkpoint = loaded(name)
    ours = collect_activations(checkpoint, prompts())
    theirs = Hooked(model, checkpoint.config).run(prompts())
    for criterion in CRITERIA:
        for layer, score in enumerate(ours.score(criterion)):
            if score is not None:
                assert score == pytest.approx(theirs.score(layer, criterion), rel=2e-4, abs=2e-6), (criterion, layer)
    assert sum(ours.tokens) == theirs.tokens


@pytest.mark.parametrize("name", [*MODELS, "emo_alwaysactive", "emo_alwaysactive_perlayer", "emo_ropescaling",
                                  "quirk_alwaysactive_with_shared"])
def test_layerwise_equals_its_definition(loaded: Loaded, name: str) -> None:
    model, checkpoint = loaded(name)
    found = select_layerwise(checkpoint, prompts(), [6])[6]
    expected = plain_layerwise(model, checkpoint.config, prompts(), 6, "router_probability")
    if "alwaysactive" not in name:
        assert [kept and list(kept) for kept in found.experts] == expected
        return
    # in a restricted model the softmax still runs over the kept experts alone, as in the pruned one
    assert [kept and list(kept) for kept in found.experts] == expected
    for kept, active in zip(found.experts, always_active_per_layer(checkpoint.config), strict=True):
        assert kept is not None and set(active) <= set(kept)


@pytest.mark.parametrize("score", ["easy_ep", "ean", "frequency"])
@pytest.mark.parametrize("name", ["qwen2_moe", "emo_densefirst_bias_variable"])
def test_layerwise_by_another_score(loaded: Loaded, name: str, score: str) -> None:
    model, checkpoint = loaded(name)
    found = select_layerwise(checkpoint, prompts(), [6, 8], score=score)
    for keep in (6, 8):
        assert [kept and list(kept) for kept in found[keep].experts] == plain_layerwise(
            model, checkpoint.config, prompts(), keep, score)
        assert found[keep].score == score


@pytest.mark.parametrize("name", ["emo_densefirst", "gpt_oss", "deepseek_v3"])
@pytest.mark.parametrize("options", [StreamOptions(token_budget=1), StreamOptions(token_budget=24),
                                     StreamOptions(memory_budget=0), StreamOptions(memory_budget="1KB")], ids=str)
def test_batches_and_memory_change_nothing(loaded: Loaded, name: str, options: StreamOptions) -> None:
    _, checkpoint = loaded(name)
    reference = collect_activations(checkpoint, prompts())
    other = collect_activations(checkpoint, prompts(), options=options)
    for criterion in CRITERIA:
        assert_equal_scores(other.score(criterion), reference.score(criterion))
    kept = select_layerwise(checkpoint, prompts(), [6, 9])
    again = select_layerwise(checkpoint, prompts(), [6, 9], options=options)
    for keep in (6, 9):
        assert again[keep].experts == kept[keep].experts
        assert_equal_scores(again[keep].scores or (), kept[keep].scores or ())


@pytest.mark.parametrize("name", ["emo_densefirst", "gpt_oss", "deepseek_v3"])
def test_cores_change_nothing(loaded: Loaded, name: str) -> None:
    _, checkpoint = loaded(name)
    options, groups, found = StreamOptions(token_budget=24), list("abcaabcb"), []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        try:
            scores = collect_activations(checkpoint, prompts(), groups, options=options)
            sums = [layer and {kind: values.tolist() for kind, values in layer.values.items()}
                    for layer in scores.layers]
            found.append((sums, select_layerwise(checkpoint, prompts(), [6, 9], score="easy_ep", options=options)))
        finally:
            torch.set_num_threads(1)
    assert found[0] == found[1]


def test_groups_can_be_scored_again_alone(loaded: Loaded) -> None:
    _, checkpoint = loaded("emo_shared1")
    ids, groups = prompts(), ["a", "b", "a", "c", "b", "a", "c", "a"]
    together = collect_activations(checkpoint, ids, groups)
    assert together.groups == ["a", "b", "c"] and together.examples == [4, 2, 2]
    for group in "abc":
        alone = collect_activations(checkpoint, [x for x, g in zip(ids, groups, strict=True) if g == group])
        assert sum(alone.tokens) == together.tokens[together.groups.index(group)]
        for name in CRITERIA:
            assert_equal_scores(together.score(name, groups=[group]), alone.score(name))


def test_mixing_tasks_by_weight(loaded: Loaded) -> None:
    _, checkpoint = loaded("emo_shared1")
    scores = collect_activations(checkpoint, prompts(), ["a/x", "a/y", "b", "b", "a/x", "a/y", "b", "b"])
    a, b = (scores.score("easy_ep", groups=groups)[1] for groups in (["a/x", "a/y"], ["b"]))
    assert a is not None and b is not None
    expected = [2 * x / sum(a) + y / sum(b) for x, y in zip(a, b, strict=True)]
    assert scores.score("easy_ep", {"a": 2, "b": 1})[1] == pytest.approx(expected)
    found = select_from_scores(scores, "easy_ep", 8, checkpoint.config, weights={"a": 2, "b": 1})
    assert found.scores is not None and found.scores[1] == pytest.approx(expected)
    only_a = select_layerwise(checkpoint, prompts(), [8], groups=["a", "a", "b", "b"] * 2, weights={"a": 1})[8]
    alone = select_layerwise(checkpoint, [x for i, x in enumerate(prompts()) if i % 4 < 2], [8])[8]
    assert only_a.experts[0] == alone.experts[0]


def test_bfloat16_stays_close(loaded: Loaded) -> None:
    _, checkpoint = loaded("emo_shared1")
    exact = select_layerwise(checkpoint, prompts(), [8])[8]
    rounded = select_layerwise(checkpoint, prompts(), [8], options=StreamOptions(dtype="bfloat16"))[8]
    assert exact.scores is not None and rounded.scores is not None
    assert rounded.scores[0] == pytest.approx(exact.scores[0], abs=1e-2)
    shared = [len(set(a or ()) & set(b or ())) for a, b in zip(exact.experts, rounded.experts, strict=True)]
    assert sum(shared) >= 0.8 * 8 * len(shared)


def test_only_kept_experts_are_read(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    _, checkpoint = loaded("emo_shared1")
    fresh = open_checkpoint(checkpoint.directory)
    read: list[str] = []
    plain = fresh.read_into
    monkeypatch.setattr(fresh, "read_into", lambda name, *rest: (read.append(name), plain(name, *rest))[1])
    found = select_layerwise(fresh, prompts(), [4, 8])
    experts = {name.split(".experts.")[0] + "/" + name.split(".experts.")[1].split(".")[0]
               for name in read if ".experts." in name}
    kept = {f"model.layers.{layer}.mlp/{expert}" for keep_set in found.values()
            for layer, layer_kept in enumerate(keep_set.experts[:-1]) for expert in layer_kept or ()}
    assert experts == kept  # and none of the last layer
    assert len(read) == len(set(read)), "a weight was read twice"
    assert not any("lm_head" in name for name in read)
