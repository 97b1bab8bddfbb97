"""How much of a pass is matrix products: what no better program could leave out."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.overrides import TorchFunctionMode

Item = TypeVar("Item")
Result = TypeVar("Result")
PRODUCTS = frozenset({"linear", "mm", "matmul", "bmm", "addmm", "baddbmm", "einsum", "grouped_mm", "conv1d",
                      "scaled_dot_product_attention"})


class Stopwatch:
    """Seconds that threads spend in matrix products and convolutions.

    On a GPU, where calls return before their work is done, it measures nothing.
    """

    def __init__(self, device: torch.device) -> None:
        self._runs, self._lock, self.seconds = device.type == "cpu", threading.Lock(), 0.0

    def timed(self, step: Callable[[Item], Result], item: Item) -> Result:
        """What `step(item)` returns."""
        if not self._runs:
            return step(item)
        with _Products() as seen:
            result = step(item)
        with self._lock:
            self.seconds += seen.seconds
        return result


class _Products(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seconds = 0.0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") not in PRODUCTS:
            return func(*args, **(kwargs or {}))
        begun = time.perf_counter()
        result = func(*args, **(kwargs or {}))
        self.seconds += time.perf_counter() - begun
        return result
