"""Tiny real models and hand-made requests."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from made_requests import sentence

MakeModel = Callable[..., Any]


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """A byte-level BPE tokenizer of a few hundred entries, with an end-of-text token and no BOS."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    rng = random.Random(0)
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<|endoftext|>", "<|pad|>"],
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    inner.train_from_iterator([sentence(rng, 30) + ". Question: Answer:\n\n" for _ in range(200)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|endoftext|>", pad_token="<|pad|>")


@pytest.fixture(scope="session")
def make_model() -> MakeModel:
    """Build a tiny causal model of a transformers architecture; large weights, so that its outputs differ."""

    def make(name: str, **changes: Any) -> Any:
        import torch
        import transformers

        torch.manual_seed(0)
        sizes = {"vocab_size": 400, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 3,
                 "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.15,
                 "eos_token_id": 0, "pad_token_id": 1, "bos_token_id": None, "max_position_embeddings": 4096}
        config = getattr(transformers, f"{name}Config")(**{**sizes, **changes})
        return getattr(transformers, f"{name}ForCausalLM")(config).eval()

    return make


@pytest.fixture(scope="session")
def moe(make_model: MakeModel) -> Any:
    """An OLMoE that would return router logits, as pruned checkpoints do."""
    return make_model("Olmoe", num_experts=8, num_experts_per_tok=2, output_router_logits=True)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A tiny EMO checkpoint with a tokenizer."""
    import torch

    from emo_select.models import EmoConfig, EmoForCausalLM

    torch.manual_seed(0)
    config = EmoConfig(vocab_size=400, hidden_size=32, intermediate_size=16, num_hidden_layers=2,
                       num_attention_heads=4, num_experts=9, num_experts_per_tok=3, num_shared_experts=1,
                       initializer_range=0.15, pad_token_id=1, eos_token_id=0)
    folder = tmp_path_factory.mktemp("model")
    EmoForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
