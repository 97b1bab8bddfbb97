"""Pretraining: the EMO objective, recipes, the engine, the demo's training. Importing this imports no torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from emo_select.pretrain.demo.config import PretrainConfig, read_config
    from emo_select.pretrain.demo.trainer import pretrain
    from emo_select.pretrain.model_objective import Batch, EmoObjective, Losses

_LAZY = {
    "Batch": "model_objective",
    "EmoObjective": "model_objective",
    "Losses": "model_objective",
    "PretrainConfig": "demo.config",
    "pretrain": "demo.trainer",
    "read_config": "demo.config",
}

__all__ = ["Batch", "EmoObjective", "Losses", "PretrainConfig", "pretrain", "read_config"]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
