"""Golden models, loaded once per implementation, and tiny models made on the spot."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from emo_select.models import EmoConfig, EmoForCausalLM, load_model

Load = Callable[..., Any]


@pytest.fixture(scope="session")
def golden_model(golden: Path) -> Load:
    """`golden_model(name, experts, dtype, attention)`: shared between tests, which must not change it."""

    @cache
    def load(name: str, experts: str | None = None, dtype: str = "float32", attention: str = "sdpa") -> Any:
        return load_model(str(golden / "models" / name), dtype=dtype, attn_implementation=attention,
                          experts_implementation=experts)

    return load


@pytest.fixture(scope="session")
def expected(golden: Path) -> Load:
    """`expected(name)`: the reference outputs of a golden model."""

    @cache
    def load(name: str) -> dict[str, torch.Tensor]:
        return load_file(golden / "models" / name / "expected.safetensors")

    return load


@pytest.fixture
def tiny() -> Load:
    """`tiny(**config)`: a randomly initialised EMO of two layers with 8 experts, 2 of them per token."""

    def build(**changes: Any) -> EmoForCausalLM:
        values: dict[str, Any] = {
            "vocab_size": 40, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_experts": 8, "num_experts_per_tok": 3, "num_shared_experts": 1,
            "pad_token_id": 0, "eos_token_id": 1, "max_position_embeddings": 64, "initializer_range": 0.2,
        }
        torch.manual_seed(0)
        return EmoForCausalLM(EmoConfig(**(values | changes))).eval()

    return build


@pytest.fixture(autouse=True)
def _same_random_numbers() -> Iterator[None]:
    torch.manual_seed(0)
    yield
