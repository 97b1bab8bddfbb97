"""Which layers of a model are built alike, and what has to be known to run one of a kind."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class LayerKind:
    """How layers of one kind behave, as seen in a small copy of the model.

    Modules that return several things return a tuple of that many; 0 is for a tensor alone.
    """

    returns: int
    """What the layer returns."""
    block: int = 0
    """What its block of experts returns."""
    mixers: Mapping[str, int] | None = None
    """What the submodules return in which tokens see each other, by name."""
    split: bool = False
    """Whether attention and experts are independent halves."""


Kinds = Mapping[str, LayerKind]


def kind_of(layer: nn.Module) -> str:
    """A name that layers share whose modules, tensors and switches (flags, kinds of attention) are the same."""
    names = [name for name, _ in (*layer.named_parameters(), *layer.named_buffers())]
    switches = [(name, sorted((key, value) for key, value in vars(module).items()
                              if isinstance(value, bool | str) and not key.startswith("_")))
                for name, module in (("", layer), *layer.named_children())]
    digest = hashlib.sha256(repr((sorted(names), switches)).encode()).hexdigest()[:16]
    return f"{type(layer).__name__}-{digest}"


def mixers_of(layer: nn.Module) -> list[str]:
    """Submodules in which tokens see each other: those that are given an attention mask."""
    return [name for name, module in layer.named_children()
            if "attention_mask" in inspect.signature(module.forward).parameters]


def returned(output: Any) -> int:
    """How a module returns its values; see `LayerKind`."""
    return len(output) if isinstance(output, tuple) else 0
