"""What every language model here does around its arithmetic: remember responses, share the work, show progress."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from emo_select import progress
from emo_select.evaluate import parallel
from emo_select.evaluate.responses import ResponseStore
from emo_select.evaluate.scoring import Counters

Compute = Callable[[Sequence[Any]], Iterator[tuple[int, Any]]]
"""Requests in, (index, response) out, in any order."""


class Answering:
    """Mixed into an lm-eval model: answers requests from `store`, the rest by computing them."""

    store: ResponseStore
    counters: Counters

    def answer(self, kind: str, requests: Sequence[Any], compute: Compute, title: str) -> list[Any]:
        """Responses in the order of the requests; those of other processes and of earlier runs are not computed."""
        keys = [self.store.key(kind, request.args) for request in requests]
        new = {key: request for key, request in zip(keys, requests, strict=True) if key not in self.store}
        pending = list(new.items())
        share = [pending[index] for index in parallel.own_share([_document(request) for _, request in pending])]
        left = Counter(_document(request) for _, request in share)  # open requests per document
        with progress.track(title, total=len(left)) as bar:
            for index, response in compute([request for _, request in share]):
                key, request = share[index]
                self.store.add(key, response)
                left[_document(request)] -= 1
                bar.advance(left[_document(request)] == 0, note=f"{self.counters.total:,} tokens")
        for part in parallel.exchanged([(key, self.store[key]) for key, _ in share]):
            self.store.learn(part)
        return [self.store.response(key) for key in keys]


def _document(request: Any) -> tuple[str, int]:
    return str(request.task_name), int(request.doc_id or 0)
