"""What every streamed pass needs: the calibration tokens packed, the model's layers, memory, progress."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from emo_select import progress
from emo_select.checkpoint import Checkpoint
from emo_select.errors import SpecError
from emo_select.experts.batches import ROW_TOKENS, Batch, GroupRows, pack
from emo_select.experts.frame import Texts
from emo_select.experts.layers import Embedded, Skeleton
from emo_select.experts.options import StreamOptions
from emo_select.experts.prefixes import split, whole
from emo_select.experts.probe import probe
from emo_select.experts.products import Stopwatch
from emo_select.experts.rules import LayerRules, layer_rules
from emo_select.experts.scores import LayerSums
from emo_select.experts.states import Budget, HiddenStates
from emo_select.experts.stream import Reader
from emo_select.experts.team import Team
from emo_select.experts.workers import Result, Workers
from emo_select.models.families import experts_per_layer
from emo_select.models.masks import why_no_mask

WORTH_SAYING = 10.0  # seconds
EVERYTHING = "all"  # the group of examples that were given none


class Pass:
    """One calibration set on its way through one checkpoint.

    Attributes:
        groups, tokens, examples: example groups, with their numbers of tokens and examples over all processes.
        segments: this process's part, what texts share only once. batches: the segments, packed.
        layers: number of decoder layers.
    """

    def __init__(self, checkpoint: Checkpoint, token_ids: Sequence[Sequence[int]], groups: Sequence[str] | None,
                 options: StreamOptions, num_shared: int | None = None) -> None:
        _require_tokens(token_ids)
        self.checkpoint, self.device, self.dtype = checkpoint, options.torch_device(), options.torch_dtype()
        self.team = Team.join(self.device)
        self.rules: list[LayerRules | None] = layer_rules(checkpoint.config, num_shared)
        self.layers = len(experts_per_layer(checkpoint.config))
        self.reader = Reader(checkpoint, self.device, self.dtype)
        tried = probe(checkpoint.config)
        self.skeleton = Skeleton(self.reader, tried.kinds)
        self._count(token_ids, groups or [EVERYTHING] * len(token_ids), tried.shares_prefixes)
        self.batches = pack(self.segments, options.batch_tokens())
        self.rows = self.batches[-1].stop if self.batches else 0
        self.budget = Budget(self.device, options.budget_bytes(), options.scratch)
        self.workers, self._products = Workers(self.device), Stopwatch(self.device)
        self.key = _digest(checkpoint.forward_fingerprint, self.dtype, options.batch_tokens(), ROW_TOKENS,
                           self.team.size, num_shared, token_ids, groups)

    def _count(self, token_ids: Sequence[Sequence[int]], groups: Sequence[str], shares: bool) -> None:
        self.groups = list(dict.fromkeys(groups))
        number = {group: i for i, group in enumerate(self.groups)}
        self.tokens, self.examples = [0] * len(number), [0] * len(number)
        for ids, group in zip(token_ids, groups, strict=True):
            self.tokens[number[group]] += len(ids)
            self.examples[number[group]] += 1
        mine = self.team.share(len(token_ids))
        texts, of_group = [token_ids[i] for i in mine], [number[groups[i]] for i in mine]
        apart = not shares or why_no_mask(self.skeleton.config, max(map(len, texts), default=0))
        self.segments = (whole if apart else split)(texts, of_group)

    def embedded(self) -> Embedded:
        """The tokens before the first layer."""
        return Embedded(self.skeleton)

    def new_states(self) -> HiddenStates:
        """Room for the hidden states of this process's tokens."""
        return self.budget.allocate(self.rows, math.prod(self.skeleton.shape), self.skeleton.dtype)

    def group_rows(self, batch: Batch) -> GroupRows:
        """See `Batch.group_rows`."""
        return batch.group_rows(self.segments)

    def each_batch(self, step: Callable[[Batch], Result]) -> Iterator[tuple[Batch, Result]]:
        """(batch, step(batch)) for all batches, those of shared prefixes done before any other begins."""
        def timed(batch: Batch) -> Result:
            return self._products.timed(step, batch)

        for leads in (True, False):
            yield from self.workers.map(timed, [batch for batch in self.batches if batch.leads == leads])

    def new_sums(self, layer: int, names: Sequence[str]) -> LayerSums:
        """Zeros for an MoE layer."""
        rules = self.rules[layer]
        assert rules is not None
        return LayerSums(len(self.groups), rules.experts, names, self.device)

    def complete(self, sums: LayerSums, layer: int) -> None:
        """Add the other processes' sums and make sure that all are finite."""
        self.team.add_up(sums)
        sums.check(layer)

    @contextmanager
    def running(self, what: str, streams: int = 1) -> Iterator[Meter]:
        """The model ready for the texts, inference mode, progress, and the reader closed at the end."""
        try:
            self.skeleton.take(Texts(self.segments))
            with torch.inference_mode(), progress.track(what, total=self.layers * self.rows * streams) as bar:
                meter = Meter(bar, self.layers)
                yield meter
            meter.say(self._products.seconds / self.workers.count)
        finally:
            self.workers.close()
            self.reader.close()


class Meter:
    """Progress of a pass, counted in tokens × layers: layer, tokens per second, peak memory."""

    def __init__(self, bar: progress.Bar, layers: int) -> None:
        self._bar, self._layers, self._layer = bar, layers, 0
        self._begun, self._done = time.monotonic(), 0

    def layer(self, layer: int, skipped: int = 0) -> None:
        """A layer begins; `skipped` tokens × layers were done by an earlier process."""
        self._layer = layer
        self._bar.advance(skipped)

    def advance(self, tokens: int) -> None:
        """A batch has passed the layer."""
        self._done += tokens
        rate = self._done / max(time.monotonic() - self._begun, 1e-9)
        self._bar.advance(tokens, f"layer {self._layer + 1}/{self._layers}, {rate:,.0f} tokens/s, "
                                  f"peak {peak_memory() / 1e9:.1f} GB")


    def say(self, products: float) -> None:
        """Sum up a pass that took long enough to ask where its time went; `products`: seconds in matrix products."""
        seconds = time.monotonic() - self._begun
        if seconds < WORTH_SAYING:
            return
        share = f", {products / seconds:.0%} of them in matrix products" if products else ""
        progress.say(f"{self._done:,} tokens × layers in {seconds:.0f} s{share}; peak {peak_memory() / 1e9:.1f} GB.")


def peak_memory() -> int:
    """Largest resident memory of this process so far, in bytes."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _require_tokens(token_ids: Sequence[Sequence[int]]) -> None:
    if not any(len(ids) for ids in token_ids):
        raise SpecError("The calibration set is empty; choose a task with examples in its selection split, or give "
                        "texts with --calibration.")


def _digest(*parts: Any) -> str:
    *settings, token_ids, groups = parts
    digest = hashlib.sha256(repr((settings, groups)).encode())
    for ids in token_ids:
        digest.update(np.asarray(ids, dtype=np.int64).tobytes() + b"|")
    return digest.hexdigest()
