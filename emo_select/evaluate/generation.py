"""Greedy generation in length-sorted batches: the common prefix is run once, and a finished row leaves its batch.

Legend: B rows, P tokens of the common prefix, W tokens of the longest rest of a prompt (others padded on the left).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import Cache, DynamicLayer

from emo_select.evaluate.prefixes import Ids, common_prefix
from emo_select.evaluate.scoring import Counters, PrefixLayer, halved
from emo_select.models.caching import cache_argument

WORTH_CACHING = 64  # tokens of a common prefix, below which it is run with every row
ROOM = 64  # positions that a cache grows by, so that most steps copy nothing
LEAVE_SHARE = 8  # finished rows are dropped once they are at least one in this many: dropping copies the cache


@dataclass(frozen=True)
class Stops:
    """When a row ends: at a token id, when `reached(ids)` is true, or after `max_tokens` tokens."""

    ids: frozenset[int]
    reached: Callable[[Sequence[int]], bool]
    max_tokens: int

    def end(self, generated: Sequence[int]) -> bool:
        """Whether the last of these tokens ends the row."""
        return len(generated) >= self.max_tokens or generated[-1] in self.ids or self.reached(generated)


@dataclass(eq=False)
class Row:
    """One prompt on its way. `generated` ends with the token that stopped it."""

    index: int
    prompt: Ids
    generated: list[int] = field(default_factory=list)
    done: bool = False


class GrowingLayer(DynamicLayer):
    """A cache layer in a buffer with room to grow, so that adding a token does not copy the ones before it."""

    def __init__(self, keys: Any = None, values: Any = None, rows: int = 1) -> None:
        super().__init__()
        if keys is not None:
            self.lazy_initialization(keys, values)
            self.update(keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1))

    def lazy_initialization(self, key_states: Any, value_states: Any) -> None:
        super().lazy_initialization(key_states, value_states)
        self._buffers: list[Any] = [None, None]
        self._used = 0

    def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self._used + key_states.shape[-2]
        for which, states in enumerate((key_states, value_states)):
            self._buffers[which] = self._with_room(self._buffers[which], states, end)
            self._buffers[which][..., self._used : end, :] = states
        self._used = end
        self.keys, self.values = (buffer[..., :end, :] for buffer in self._buffers)
        return self.keys, self.values

    def _with_room(self, buffer: Any, states: Any, needed: int) -> Any:
        if buffer is not None and buffer.shape[-2] >= needed:
            return buffer
        larger = states.new_empty((*states.shape[:-2], needed + ROOM, states.shape[-1]))
        if buffer is not None:
            larger[..., : self._used, :] = buffer[..., : self._used, :]
        return larger

    def batch_select_indices(self, indices: Any) -> None:
        """Keep these rows."""
        self._buffers = [buffer[indices.to(buffer.device)] for buffer in self._buffers]
        self.keys, self.values = (buffer[..., : self._used, :] for buffer in self._buffers)


@dataclass
class Batch:
    """Rows that are decoded together: what the next forward is given."""

    rows: list[Row]
    cache: Cache
    ids: torch.Tensor
    mask: torch.Tensor
    positions: torch.Tensor

    def feed(self, tokens: torch.Tensor) -> None:
        """Make `tokens` (B) the next input."""
        self.ids = tokens[:, None]
        self.mask = torch.nn.functional.pad(self.mask, (0, 1), value=1)
        self.positions = self.positions[:, -1:] + 1

    def keep(self, places: list[int]) -> None:
        """Drop all rows but these from the batch and from its cache."""
        chosen = torch.tensor(places, device=self.ids.device)
        self.rows = [self.rows[place] for place in places]
        self.ids, self.mask, self.positions = (part[chosen] for part in (self.ids, self.mask, self.positions))
        for layer in self.cache.layers:
            layer.batch_select_indices(chosen)


class GreedyDecoder:
    """Continues prompts with the most likely token, many at a time.

    Of a batch, `cached` bounds rows × (longest prompt + new tokens) and `prefill` rows × prompt tokens of its first
    forward. Both are halved for good when memory runs out.
    """

    def __init__(self, model: Any, cached: int, prefill: int, counters: Counters) -> None:
        self.model, self.cached, self.prefill, self.counters = model, cached, prefill, counters
        self.device = model.get_input_embeddings().weight.device

    def generate(self, prompts: Sequence[Ids], stops: Stops) -> Iterator[tuple[int, list[int]]]:
        """Yield (index, generated token ids, the stopping token included) as rows end."""
        longest_first = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
        waiting = [Row(index, prompts[index]) for index in longest_first]
        base = shared_length(prompts)
        prefix = self._encode_prefix(prompts[0][:base]) if base else None
        while waiting:
            longest = len(waiting[0].prompt)
            rows = waiting[: self._batch_size(longest + stops.max_tokens, longest - base)]
            try:
                for row in self._decode(rows, base, prefix, stops):
                    waiting.remove(row)
                    yield row.index, row.generated
            except RuntimeError as error:
                self.cached, self.prefill = halved(self.cached, error), max(1, self.prefill // 2)
                for row in waiting:
                    row.generated.clear()

    def _batch_size(self, length: int, prompt: int) -> int:
        return max(1, min(self.cached // length, self.prefill // prompt))

    def _decode(self, rows: list[Row], base: int, prefix: Cache | None, stops: Stops) -> Iterator[Row]:
        """Run one batch to its end, yielding each row when it ends."""
        batch = self._start(rows, base, prefix)
        while True:
            chosen = self._step(batch)
            for row, token in zip(batch.rows, chosen.tolist(), strict=True):
                if not row.done:
                    row.generated.append(token)
                    row.done = stops.end(row.generated)
                    if row.done:
                        yield row
            alive = [place for place, row in enumerate(batch.rows) if not row.done]
            if not alive:
                return
            batch.feed(chosen)
            if (len(batch.rows) - len(alive)) * LEAVE_SHARE >= len(batch.rows):
                batch.keep(alive)

    def _start(self, rows: list[Row], base: int, prefix: Cache | None) -> Batch:
        ids, mask = left_padded([row.prompt[base:] for row in rows])
        mask = torch.nn.functional.pad(mask, (base, 0), value=1).to(self.device)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, base:]
        return Batch(list(rows), batch_cache(prefix, len(rows)), ids.to(self.device), mask, positions)

    @torch.inference_mode()
    def _encode_prefix(self, tokens: Ids) -> Cache:
        cache = Cache(layer_class_to_replicate=PrefixLayer)
        ids = torch.from_numpy(tokens)[None].to(self.device)
        self.model(input_ids=ids, use_cache=True, logits_to_keep=1, **{cache_argument(type(self.model)): cache})
        self.counters.prefix += len(tokens)
        self.counters.forwards += 1
        return cache

    @torch.inference_mode()
    def _step(self, batch: Batch) -> torch.Tensor:
        """The most likely next token of every row (B)."""
        logits: torch.Tensor = self.model(
            input_ids=batch.ids, attention_mask=batch.mask, position_ids=batch.positions,
            use_cache=True, logits_to_keep=1, **{cache_argument(type(self.model)): batch.cache},
        ).logits
        self.counters.packed += batch.ids.numel()
        self.counters.forwards += 1
        return logits[:, -1].argmax(dim=-1)


def shared_length(prompts: Sequence[Ids]) -> int:
    """Length of the prefix that all prompts share and that is worth caching; every prompt keeps a token of its own."""
    ordered = sorted(prompts, key=lambda prompt: prompt.astype(">u4").tobytes())
    shared = min(common_prefix(ordered[0], ordered[-1]), min(map(len, prompts)) - 1)
    return shared if len(prompts) > 1 and shared >= WORTH_CACHING else 0


def left_padded(prompts: Sequence[Ids]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids (B, W) padded on the left with 0, and their mask."""
    width = max(map(len, prompts))
    ids = torch.from_numpy(np.stack([np.pad(prompt, (width - len(prompt), 0)) for prompt in prompts]))
    mask = torch.stack([(torch.arange(width) >= width - len(prompt)).long() for prompt in prompts])
    return ids, mask


def batch_cache(prefix: Cache | None, rows: int) -> Cache:
    """A cache that can grow, in which every row begins with `prefix`."""
    if prefix is None:
        return Cache(layer_class_to_replicate=GrowingLayer)
    return Cache(layers=[GrowingLayer(layer.keys, layer.values, rows) for layer in prefix.layers])
