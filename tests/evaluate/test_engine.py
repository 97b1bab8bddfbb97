"""The engine gives the numbers of lm-eval's own model class, on real model classes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from made_requests import choice_requests, generation_requests

from emo_select.evaluate.engine import SharedPrefixLM

ABSOLUTE, RELATIVE = 5e-4, 2e-6


def stock(model: Any, tokenizer: Any, max_length: int = 2048) -> HFLM:
    return HFLM(pretrained=model, tokenizer=tokenizer, max_length=max_length, add_bos_token=False, batch_size=4)


def ours(model: Any, tokenizer: Any, **options: Any) -> SharedPrefixLM:
    return SharedPrefixLM(model, tokenizer, **{"max_length": 2048, "token_budget": 300, **options})


def assert_same_scores(found: list[Any], expected: list[Any]) -> None:
    assert [score[0] for score in found] == pytest.approx([score[0] for score in expected], abs=ABSOLUTE, rel=RELATIVE)
    assert [score[1] for score in found] == [score[1] for score in expected]


@pytest.mark.parametrize("budget", [1, 64, 300, 5000])
def test_log_likelihoods_equal_stock(moe: Any, tokenizer: Any, budget: int) -> None:
    requests = choice_requests()
    engine = ours(moe, tokenizer, token_budget=budget)
    assert engine.stock_reason is None
    assert_same_scores(engine.loglikelihood(requests), stock(moe, tokenizer).loglikelihood(requests))


@pytest.mark.parametrize("name", ["Llama", "Qwen3", "GPTNeoX", "Mistral", "Gemma2"])
def test_other_architectures(make_model: Any, tokenizer: Any, name: str) -> None:
    model = make_model(name, **({"head_dim": 8} if name in ("Qwen3", "Gemma2") else {}))
    requests = choice_requests(docs=4)
    assert_same_scores(ours(model, tokenizer).loglikelihood(requests), stock(model, tokenizer).loglikelihood(requests))


def test_eager_attention(make_model: Any, tokenizer: Any) -> None:
    model = make_model("Olmoe", num_experts=4, num_experts_per_tok=2, attn_implementation="eager")
    requests = choice_requests(docs=4)
    engine = ours(model, tokenizer)
    assert engine.stock_reason is None and model.config._attn_implementation == "eager"
    assert_same_scores(engine.loglikelihood(requests), stock(model, tokenizer).loglikelihood(requests))


def test_requests_over_the_maximum_length_are_cut_as_stock_cuts_them(moe: Any, tokenizer: Any) -> None:
    requests = choice_requests(docs=5)
    long_answer = Instance("loglikelihood", {}, ("sun", " moon river" * 100), 0, ("choices", 99, 1))
    engine = ours(moe, tokenizer, max_length=100)
    found = engine.loglikelihood([*requests, long_answer])
    assert_same_scores(found[:-1], stock(moe, tokenizer, 100).loglikelihood(requests))
    assert [score.was_cut(100) for score in found[:8]] == [True] * 4 + [False] * 4  # not the unconditional ones
    assert found[-1].was_cut(100) and found[-1].num_tokens > 100


def test_a_model_without_custom_masks_takes_the_stock_path(make_model: Any, tokenizer: Any) -> None:
    model = make_model("Mistral", sliding_window=40)
    requests = choice_requests(docs=4)
    engine = ours(model, tokenizer)
    assert "limited to 40 tokens" in (engine.stock_reason or "")
    assert_same_scores(engine.loglikelihood(requests), stock(model, tokenizer).loglikelihood(requests))
    texts = generation_requests(docs=3)
    assert engine.generate_until(texts) == stock(model, tokenizer).generate_until(texts)


def test_the_probe_refuses_a_recurrent_model(make_model: Any, tokenizer: Any) -> None:
    model = make_model("Mamba2", num_heads=4, head_dim=16, n_groups=1, state_size=8, expand=2)
    reason = ours(model, tokenizer).stock_reason or ""  # from transformers 5.24 on it takes a cache, of its own kind
    assert "differ" in reason or "does not take a cached prefix" in reason


def test_bfloat16_is_near_float32(make_model: Any, tokenizer: Any) -> None:
    model = make_model("Llama")
    requests = choice_requests(docs=4)
    exact = ours(model, tokenizer).loglikelihood(requests)
    engine = ours(copy.deepcopy(model).to(torch.bfloat16), tokenizer)
    assert engine.stock_reason is None
    assert [score[0] for score in engine.loglikelihood(requests)] == pytest.approx([s[0] for s in exact], rel=0.05)


def test_each_distinct_token_runs_about_once(moe: Any, tokenizer: Any) -> None:
    requests = choice_requests(docs=20)
    engine = ours(moe, tokenizer)
    encoded = engine.encode_pairs([request.args for request in requests])
    everything = sum(len(context) + len(rest) - 1 for _, context, rest in encoded)
    distinct = {tuple([*context, *rest][:end]) for _, context, rest in encoded for end in range(1, len(context + rest))}
    engine.loglikelihood(requests)
    assert engine.counters.total < 1.1 * len(distinct) < everything / 4


def test_tokens_are_those_of_lm_eval(moe: Any, tokenizer: Any) -> None:
    pairs = [("Question: sun\nAnswer:", " moon"), ("Question: sun ", "moon"), ("Answer:", ""), ("", " sun"),
             ("<|endoftext|>sun", " moon"), ("é 漢字 \n", " ☃"), ("sun", "shine")]
    engine, reference = ours(moe, tokenizer), stock(moe, tokenizer)
    for pair, (_, context, rest) in zip(pairs, engine.encode_pairs(pairs), strict=True):
        expected = reference._encode_pair(*pair) if pair[0] else ([0], reference.tok_encode(pair[1]))
        assert (context, rest) == expected


def test_an_answer_without_tokens_scores_zero(moe: Any, tokenizer: Any) -> None:
    engine = ours(moe, tokenizer)
    requests = [Instance("loglikelihood", {}, ("sun", text), 0, ("choices", 7, 1)) for text in ("", " moon")]
    found = engine.loglikelihood(requests)
    assert found[0] == (0.0, True) and found[0].num_tokens == 0 and found[1].num_tokens >= 1


def test_running_out_of_memory_halves_the_budget(moe: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    requests, forward, longest = choice_requests(docs=6), type(moe).forward, 120
    engine, expected = ours(moe, tokenizer, token_budget=400), stock(moe, tokenizer).loglikelihood(requests)

    def limited(self: Any, input_ids: Any, **options: Any) -> Any:
        if input_ids.numel() > longest and not isinstance(options.get("logits_to_keep"), int):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate much.")
        return forward(self, input_ids=input_ids, **options)

    monkeypatch.setattr(type(moe), "forward", limited)
    assert_same_scores(engine.loglikelihood(requests), expected)
    assert engine.token_budget < 400


@pytest.mark.parametrize("rows", [1, 3, 100])
def test_generations_equal_stock(moe: Any, tokenizer: Any, rows: int) -> None:
    requests = generation_requests()
    engine = ours(moe, tokenizer)
    engine.decoder.cached = rows * 300
    found = engine.generate_until(requests)
    expected = stock(moe, tokenizer).generate_until(requests)
    assert found == expected
    assert len({text.num_tokens for text in found}) > 1  # some stop early, some do not


def test_long_prompts_keep_their_end(moe: Any, tokenizer: Any) -> None:
    requests = generation_requests(docs=6)
    engine = ours(moe, tokenizer, max_length=120)
    found = engine.generate_until(requests)
    assert found == stock(moe, tokenizer, 120).generate_until(requests)
    assert {text.cut for text in found} == {True}


def test_finished_rows_leave_the_batch(moe: Any, tokenizer: Any) -> None:
    requests = generation_requests(docs=16, shots=0, max_tokens=60)
    engine = ours(moe, tokenizer)
    texts = engine.generate_until(requests)
    prompts = sum(len(tokenizer.encode(request.args[0])) for request in requests)
    longest = max(text.num_tokens for text in texts)
    assert engine.counters.total < prompts * 2 + 0.8 * longest * len(requests)


def test_sampling_is_left_to_stock(moe: Any, tokenizer: Any) -> None:
    requests = generation_requests(docs=2, do_sample=True, temperature=0.7)
    engine = ours(moe, tokenizer)
    torch.manual_seed(3)
    assert all(isinstance(text, str) for text in engine.generate_until(requests))
    assert engine.counters.total == 0


def test_an_empty_prompt_is_continued_on_the_stock_path_too(make_model: Any, tokenizer: Any) -> None:
    engine = ours(make_model("Mamba2", num_heads=4, head_dim=16, n_groups=1, state_size=8, expand=2), tokenizer)
    assert engine.stock_reason is not None
    options = {"until": ["never"], "max_gen_toks": 4}
    requests = [Instance("generate_until", {}, (text, options), n, ("own", n, 1)) for n, text in enumerate(("", "sun"))]
    assert all(engine.generate_until(requests))
