"""Batches side by side on a CPU's cores.

A layer's matrix products are small (some hundred rows of a few hundred numbers); split over the cores one by one they
use them badly. Here each core takes a batch of its own through the layer. Results are handed back in the order of the
batches, so that sums come out the same whatever the timing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


class Workers:
    """As many threads as torch would use for one operation, each with one core; on a GPU the calling thread alone.

    `count` says how many.
    """

    def __init__(self, device: torch.device) -> None:
        self.count = torch.get_num_threads() if device.type == "cpu" else 1
        self._pool: ThreadPoolExecutor | None = None

    def map(self, work: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[tuple[Item, Result]]:
        """(item, work(item)) in order, in inference mode; a few items are under way at a time."""
        if self.count == 1 or len(items) == 1:
            yield from ((item, work(item)) for item in items)
            return
        self._pool = self._pool or ThreadPoolExecutor(self.count, "batch", initializer=torch.set_num_threads,
                                                      initargs=(1,))
        ahead: deque[tuple[Item, Future[Result]]] = deque()
        try:
            for item in items:
                ahead.append((item, self._pool.submit(torch.inference_mode()(work), item)))
                if len(ahead) > self.count + 1:
                    yield _done(ahead)
            while ahead:
                yield _done(ahead)
        finally:
            for _, future in ahead:
                future.cancel()

    def close(self) -> None:
        """End the threads, after what they are at."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


def _done(ahead: deque[tuple[Item, Future[Result]]]) -> tuple[Item, Result]:
    item, future = ahead.popleft()
    return item, future.result()
