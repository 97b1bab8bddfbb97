"""What transformers calls the key-value cache: `past_key_values`, from 5.24 on `cache` (the old name goes in 5.40)."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import Any

OLD, NEW = "past_key_values", "cache"


def cache_argument(kind: Any) -> str:
    """The keyword under which `forward` of a class of modules takes a cache."""
    return _name_in(kind.forward)


@lru_cache(maxsize=64)
def _name_in(forward: Callable[..., Any]) -> str:
    return NEW if NEW in inspect.signature(forward).parameters else OLD
