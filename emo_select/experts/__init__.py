"""Which experts a task uses, and a checkpoint with only those. The names below load on first use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from emo_select.experts.activations import collect_activations
    from emo_select.experts.calibration import calibration_tokens, mixed_tokens
    from emo_select.experts.keepset import KeepSet
    from emo_select.experts.layerwise import select_layerwise
    from emo_select.experts.methods import select_from_scores, select_random
    from emo_select.experts.options import StreamOptions
    from emo_select.experts.prune import prune_checkpoint
    from emo_select.experts.scores import Scores
    from emo_select.experts.select import select_experts

_LAZY = {
    "KeepSet": "keepset",
    "Scores": "scores",
    "StreamOptions": "options",
    "calibration_tokens": "calibration",
    "collect_activations": "activations",
    "mixed_tokens": "calibration",
    "prune_checkpoint": "prune",
    "select_experts": "select",
    "select_from_scores": "methods",
    "select_layerwise": "layerwise",
    "select_random": "methods",
}

__all__ = [
    "KeepSet",
    "Scores",
    "StreamOptions",
    "calibration_tokens",
    "collect_activations",
    "mixed_tokens",
    "prune_checkpoint",
    "select_experts",
    "select_from_scores",
    "select_layerwise",
    "select_random",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
