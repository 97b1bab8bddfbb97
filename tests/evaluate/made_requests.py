"""Hand-made requests with shared prefixes, unconditional requests and one-token answers."""

from __future__ import annotations

import random
from typing import Any

from lm_eval.api.instance import Instance

WORDS = ["sun", "moon", "river", "stone", "cloud", "light", "apple", "door", "green", "seven", "ocean", "paper",
         "music", "winter", "silver", "horse", "bread", "field"]


def sentence(rng: random.Random, length: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(length))


def choice_requests(docs: int = 12, choices: int = 4, shots: int = 8, seed: int = 0) -> list[Instance]:
    """Few-shot multiple choice with unconditional requests and one-token answers."""
    rng = random.Random(seed)
    block = "".join(f"Question: {sentence(rng, 8)}\nAnswer: {sentence(rng, 2)}\n\n" for _ in range(shots))
    requests = []
    for doc in range(docs):
        context = f"{block}Question: {sentence(rng, 6)}\nAnswer:"
        answers = [" " + sentence(rng, rng.randint(1, 5)) for _ in range(choices - 1)] + [" sun"]
        pairs = [(context, answer) for answer in answers] + [("Answer:", answer) for answer in answers]
        requests += [Instance("loglikelihood", {}, pair, i, ("choices", doc, 1)) for i, pair in enumerate(pairs)]
    return requests


def generation_requests(docs: int = 10, shots: int = 6, max_tokens: int = 24, **options: Any) -> list[Instance]:
    """Few-shot generation with prompts of mixed lengths."""
    rng = random.Random(1)
    block = "".join(f"Question: {sentence(rng, 8)}\nAnswer: {sentence(rng, 2)}\n\n" for _ in range(shots))
    options = {"until": ["\n\n", "v"], "max_gen_toks": max_tokens, "do_sample": False, "temperature": 0.0, **options}
    contexts = [f"{block}Question: {sentence(rng, rng.randint(2, 20))}\nAnswer:" for _ in range(docs)]
    return [Instance("generate_until", {}, (context, dict(options)), 0, ("texts", doc, 1))
            for doc, context in enumerate(contexts)]
