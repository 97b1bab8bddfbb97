"""Training checkpoints become released ones and back, tensor by tensor, without the training engine."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from emo_select.convert.hf import HfOptions, to_hf
    from emo_select.convert.olmo_core import CoreOptions, to_olmo_core

_LAZY = {"HfOptions": "hf", "to_hf": "hf", "CoreOptions": "olmo_core", "to_olmo_core": "olmo_core"}

__all__ = ["CoreOptions", "HfOptions", "to_hf", "to_olmo_core"]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
