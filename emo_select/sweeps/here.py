"""Models that are on this machine: what a sweep can know of a model before any unit runs, without the network."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from emo_select.checkpoint import Checkpoint


def opened(name: str) -> Checkpoint | None:
    """The model's checkpoint, if it is here."""
    from emo_select.checkpoint import open_checkpoint

    return open_checkpoint(name) if _is_here(name) else None


def experts_of(model: str) -> int | None:
    """Experts of a full layer of a model that is on this machine and has any; else None."""
    from emo_select.models.families import is_moe
    from emo_select.pipeline.expand import num_experts

    found = opened(model)
    return num_experts(found.config) if found is not None and is_moe(found.config) else None


def _is_here(name: str) -> bool:
    """Whether opening the model needs no network. A local folder that is no checkpoint is left to `open_checkpoint`."""
    if name.startswith("demo/") or Path(name).expanduser().exists() or name.count("/") != 1:
        return True
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(name, "config.json"), str)
