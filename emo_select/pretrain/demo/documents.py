"""Batches of synthetic documents: each states facts of one domain and ends with the end-of-text token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from emo_select.demo import domains
from emo_select.pretrain.model_objective import Batch
from emo_select.pretrain.objective import IGNORED


def step_generator(seed: int, step: int, stream: int = 0) -> torch.Generator:
    """A CPU generator that depends on its arguments alone; `stream` tells uses within a step apart."""
    # the CPU generator uses 32 bits of its seed
    return torch.Generator().manual_seed((seed * 1_000_003 + step * 4 + stream) % 2**32)


class Documents:
    """Draws documents. Batch `step` depends on the seed and the step alone, so training can resume anywhere.

    A document is `facts` questions with their answers, about random pairs of one random domain. Labels are the
    answers and the end of the document; the words of a question are random, so they are not trained on.
    """

    def __init__(self, tokenizer: Any, *, seed: int, per_step: int, facts: int) -> None:
        self.seed, self.per_step, self.facts = seed, per_step, facts
        self.end = int(tokenizer.token_to_id("<|endoftext|>"))
        texts = [tokenizer.encode(text).ids for text in domains.texts()]
        shape = (len(domains.DOMAINS), len(domains.COLOURS) * len(domains.THINGS), -1)
        self.table = torch.tensor(texts).reshape(shape)  # (domains, pairs, tokens of a fact)

    def batch(self, step: int) -> Batch:
        """The documents of a step, one per row: (per_step, facts · tokens)."""
        generator = step_generator(self.seed, step)
        domain = torch.randint(len(self.table), (self.per_step,), generator=generator)
        pair = torch.randint(self.table.shape[1], (self.per_step, self.facts), generator=generator)
        facts = self.table[domain[:, None], pair]  # (documents, facts, tokens)
        return self._batch(facts)

    def _batch(self, facts: Tensor) -> Batch:
        labels = torch.full_like(facts, IGNORED)
        labels[..., -2] = facts[..., -2]  # the answer; after it comes the blank line
        ids, labels = facts.flatten(1).clone(), labels.flatten(1)
        ids[:, -1] = labels[:, -1] = self.end
        return Batch(ids, labels, torch.arange(len(ids))[:, None].expand_as(ids))
