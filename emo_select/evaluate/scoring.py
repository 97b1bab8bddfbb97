"""Log-likelihoods of continuations: each distinct prefix token once, the head only where something is scored.

Source of the idea: prefix trees with tree attention, as used for speculative decoding (SpecInfer, arXiv 2305.09781).
A pack is one sequence whose attention mask lets a token see its own ancestors only; positions are those of the
token in its own input, so rotary embeddings are the same as in separate sequences. Packs behind the same prefix are
the rows of a batch.

Legend: B packs of a batch, P cached prefix tokens, N tokens of the longest pack (others padded on the right), U scored
positions of all packs, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from transformers.cache_utils import Cache, DynamicLayer

from emo_select.errors import NumericError, SpecError
from emo_select.evaluate.prefixes import Block, Ids, Pack, Planner, ScoredInput, build_pack
from emo_select.models.caching import cache_argument

PACK_TOKENS = 256  # aimed at per pack: enough for a document or more, few enough that hidden pairs cost little
HEAD_ELEMENTS = 1 << 25  # logits that are turned into float32 probabilities at a time


@dataclass
class Counters:
    """Work done so far, in tokens; `padding` is not part of `total`."""

    prefix: int = 0
    packed: int = 0
    stock: int = 0
    padding: int = 0
    forwards: int = 0

    @property
    def total(self) -> int:
        """All tokens that went through the decoder."""
        return self.prefix + self.packed + self.stock


class PrefixLayer(DynamicLayer):
    """Keeps the states of the first forward; later forwards see them in front of their own and leave no trace."""

    def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states, value_states
            return key_states, value_states
        rows = len(key_states)
        return (torch.cat([self.keys.expand(rows, -1, -1, -1), key_states], dim=-2),
                torch.cat([self.values.expand(rows, -1, -1, -1), value_states], dim=-2))


class SharedPrefixScorer:
    """Scores many (input, continuation) pairs with one decoder.

    `budget` is the number of new tokens per forward; it is halved for good when memory runs out. `pack` is the size
    of packs that is aimed at.
    """

    def __init__(self, model: Any, budget: int, counters: Counters | None = None, pack: int = PACK_TOKENS) -> None:
        self.model, self.budget, self.counters, self.pack = model, budget, counters or Counters(), pack
        self.device = model.get_input_embeddings().weight.device

    def score(self, inputs: Sequence[ScoredInput], targets: Sequence[Ids]) -> Iterator[tuple[int, float, bool]]:
        """Yield (index, summed log-probability of its targets in nats, whether all of them are the argmax).

        Results come in the order in which they are computed. `targets[i]` are the token ids of the continuation,
        one per scored position of `inputs[i]`.
        """
        waiting = set(range(len(inputs)))
        while waiting:
            try:
                for index, total, greedy in self._attempt(inputs, targets, sorted(waiting)):
                    waiting.discard(index)
                    yield index, total, greedy
            except RuntimeError as error:
                self.budget = halved(self.budget, error)

    def _attempt(
        self, inputs: Sequence[ScoredInput], targets: Sequence[Ids], chosen: Sequence[int]
    ) -> Iterator[tuple[int, float, bool]]:
        rows = [inputs[index] for index in chosen]
        for block in Planner(rows, max(1, min(self.pack, self.budget // 2))).plan():
            prefix = self._encode_prefix(block)
            packs = [(members, build_pack([rows[member] for member in members], block.length))
                     for members in block.packs]
            for batch in batches(packs, self.budget):
                indices = [chosen[member] for members, _ in batch for member in members]
                results = self._run([pack for _, pack in batch], prefix, [targets[index] for index in indices])
                yield from zip(indices, *results, strict=True)

    @torch.inference_mode()
    def _encode_prefix(self, block: Block) -> Cache | None:
        if not block.length:
            return None
        cache = Cache(layer_class_to_replicate=PrefixLayer)
        ids = torch.from_numpy(block.prefix)[None].to(self.device)
        self.model(input_ids=ids, use_cache=True, logits_to_keep=1, **{cache_argument(type(self.model)): cache})
        self.counters.prefix += block.length
        self.counters.forwards += 1
        return cache

    @torch.inference_mode()
    def _run(
        self, packs: Sequence[Pack], prefix: Cache | None, targets: Sequence[Ids]
    ) -> tuple[list[float], list[bool]]:
        width, real = max(len(pack.tokens) for pack in packs), sum(len(pack.tokens) for pack in packs)
        wanted, rows = _scored_positions(packs, width)
        logits = self.model(
            input_ids=self._padded([pack.tokens for pack in packs], width),
            position_ids=self._padded([pack.positions for pack in packs], width),
            attention_mask=self._mask(packs, width, prefix.get_seq_length() if prefix else 0),
            use_cache=prefix is not None,
            logits_to_keep=torch.from_numpy(wanted).to(self.device),
            **{cache_argument(type(self.model)): prefix},
        ).logits
        self.counters.packed += real
        self.counters.padding += width * len(packs) - real
        self.counters.forwards += 1
        chosen, best = gather_log_probs(logits.reshape(-1, logits.shape[-1]), torch.from_numpy(rows),
                                        torch.from_numpy(np.concatenate(targets)))
        ends = np.cumsum([len(target) for target in targets])[:-1]
        return [float(part.sum()) for part in np.split(chosen, ends)], [bool(p.all()) for p in np.split(best, ends)]

    def _padded(self, rows: Sequence[Ids], width: int) -> torch.Tensor:
        return torch.from_numpy(np.stack([np.pad(row, (0, width - len(row))) for row in rows])).to(self.device)

    def _mask(self, packs: Sequence[Pack], width: int, prefix_length: int) -> torch.Tensor:
        """Additive attention mask (B, 1, N, P + N); padding sees itself and the prefix, and nothing sees padding."""
        hidden = np.repeat(~np.eye(width, dtype=bool)[None], len(packs), axis=0)
        for row, pack in zip(hidden, packs, strict=True):
            row[: len(pack.tokens), : len(pack.tokens)] = ~pack.allowed
        mask = torch.zeros(len(packs), width, prefix_length + width, dtype=self.model.dtype, device=self.device)
        mask[..., prefix_length:].masked_fill_(torch.from_numpy(hidden).to(self.device), torch.finfo(mask.dtype).min)
        return mask[:, None]


def batches(packs: Sequence[tuple[list[int], Pack]], budget: int) -> Iterator[list[tuple[list[int], Pack]]]:
    """Group packs, longest first, so that rows × longest row stays within `budget` tokens (one row at least)."""
    ordered = sorted(packs, key=lambda item: -len(item[1].tokens))
    start = 0
    while start < len(ordered):
        size = max(1, budget // len(ordered[start][1].tokens))
        yield ordered[start : start + size]
        start += size


def _scored_positions(packs: Sequence[Pack], width: int) -> tuple[np.ndarray[Any, Any], Ids]:
    """Which positions (B, N) need the head; and, input by input, the row of their logits that each scored token has."""
    wanted = np.zeros((len(packs), width), bool)
    flat = np.concatenate([ids + row * width for row, pack in enumerate(packs) for ids in pack.scored])
    wanted.reshape(-1)[flat] = True
    return wanted, (np.cumsum(wanted.reshape(-1)) - 1)[flat]


def gather_log_probs(
    logits: torch.Tensor, rows: torch.Tensor, targets: torch.Tensor
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Log-probability (float64, natural log) of `targets[j]` at `logits[rows[j]]`, and whether it is the argmax.

    `logits` is (U, V); the softmax is taken in float32, a block of rows at a time.
    """
    rows, targets = rows.to(logits.device), targets.to(logits.device)
    normalisers, argmax = [], []
    for part in logits.split(max(1, HEAD_ELEMENTS // logits.shape[-1])):
        normalisers.append(torch.logsumexp(part.float(), dim=-1))
        argmax.append(part.argmax(dim=-1))
    chosen = logits[rows, targets].float() - torch.cat(normalisers)[rows]
    if not bool(torch.isfinite(chosen).all()):
        raise NumericError("The model gives log-probabilities that are NaN or infinite; check its weights or use "
                           "--dtype float32.")
    return chosen.cpu().double().numpy(), (torch.cat(argmax)[rows] == targets).cpu().numpy()


def halved(budget: int, error: RuntimeError) -> int:
    """The budget to go on with after running out of memory; any other error is raised again."""
    if not should_reduce_batch_size(error):
        raise error
    if budget < 2:
        raise SpecError("Not even one token fits into memory; use a larger device, --device-map auto, or bfloat16.") \
            from error
    clear_device_cache(garbage_collection=True)
    return budget // 2
