"""Importing torch, transformers and lm-eval in less time than they take by themselves."""

from __future__ import annotations

import gc
import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from emo_select.models.registration import register

LOSSES, SCIPY = "transformers.loss.loss_utils", "scipy.optimize"


@contextmanager
def importing() -> Iterator[None]:
    """Look for no garbage while a million objects are made that stay; it would take a third of a second."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def import_models() -> None:
    """Import what any model of transformers needs, our architectures registered; scipy waits until it is called."""
    with importing():
        register()
        _import_losses()
        importlib.import_module("transformers.modeling_utils")


def _import_losses() -> None:
    """Import transformers' losses without scipy: half a second for a function that only object detection calls."""
    if SCIPY in sys.modules or LOSSES in sys.modules:
        return
    stand_in: Any = ModuleType(SCIPY)
    stand_in.linear_sum_assignment = _linear_sum_assignment
    sys.modules[SCIPY] = stand_in
    try:
        importlib.import_module(LOSSES)
    except ImportError:
        pass  # another release of transformers wants more of scipy; importing its models will get it
    finally:
        del sys.modules[SCIPY]


def _linear_sum_assignment(*args: Any, **kwargs: Any) -> Any:
    return importlib.import_module(SCIPY).linear_sum_assignment(*args, **kwargs)
