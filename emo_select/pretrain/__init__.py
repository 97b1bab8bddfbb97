"""The EMO training objective, and the training of the demo models. Importing this imports no torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from emo_select.pretrain.config import PretrainConfig, read_config
    from emo_select.pretrain.objective import Batch, EmoObjective, Losses
    from emo_select.pretrain.trainer import pretrain

_LAZY = {
    "Batch": "objective",
    "EmoObjective": "objective",
    "Losses": "objective",
    "PretrainConfig": "config",
    "pretrain": "trainer",
    "read_config": "config",
}

__all__ = ["Batch", "EmoObjective", "Losses", "PretrainConfig", "pretrain", "read_config"]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
