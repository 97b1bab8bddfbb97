"""Native models of the published architectures, and loading of any checkpoint. Importing this imports no torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from emo_select.models.registration import register

if TYPE_CHECKING:
    from emo_select.models.config import EmoConfig, FlexOlmoNoQKNormPrenormConfig, Olmo2NoQKNormPrenormConfig
    from emo_select.models.dense import Olmo2NoQKNormPrenormForCausalLM, Olmo2NoQKNormPrenormModel
    from emo_select.models.emo import (
        EmoForCausalLM,
        EmoModel,
        FlexOlmoNoQKNormPrenormForCausalLM,
        FlexOlmoNoQKNormPrenormModel,
    )
    from emo_select.models.loading import load_model, load_tokenizer

_LAZY = {
    "EmoConfig": "config",
    "FlexOlmoNoQKNormPrenormConfig": "config",
    "Olmo2NoQKNormPrenormConfig": "config",
    "EmoForCausalLM": "emo",
    "EmoModel": "emo",
    "FlexOlmoNoQKNormPrenormForCausalLM": "emo",
    "FlexOlmoNoQKNormPrenormModel": "emo",
    "Olmo2NoQKNormPrenormForCausalLM": "dense",
    "Olmo2NoQKNormPrenormModel": "dense",
    "load_model": "loading",
    "load_tokenizer": "loading",
}

__all__ = [
    "EmoConfig",
    "EmoForCausalLM",
    "EmoModel",
    "FlexOlmoNoQKNormPrenormConfig",
    "FlexOlmoNoQKNormPrenormForCausalLM",
    "FlexOlmoNoQKNormPrenormModel",
    "Olmo2NoQKNormPrenormConfig",
    "Olmo2NoQKNormPrenormForCausalLM",
    "Olmo2NoQKNormPrenormModel",
    "load_model",
    "load_tokenizer",
    "register",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
