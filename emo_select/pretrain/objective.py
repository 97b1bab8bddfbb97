"""The EMO objective as formulas (arXiv 2605.06663, section 3): plain torch, no engine and no model around it.

All tokens of a document draw their experts from one pool. Per layer and document, the softmax over the routed experts
is summed over the document's tokens; the d most likely experts are the pool; the other routed logits become -inf
before the softmax and the top-k of each token. Shared experts stand outside and weigh 1 each. d is uniform on
{smallest, …, largest} in training and fixed in evaluation.

Defaults are the published behaviour, oddities included; where we decide otherwise it takes a named switch.

Shapes: B rows, S positions, T = B·S tokens of a micro-batch on one rank, N documents, E experts of a layer, R routed
of them (the first), s = E - R shared (the last), K experts per token including the shared, k = K - s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from emo_select.errors import SpecError

IGNORED = -100  # the label that no loss counts

Balance = Literal["global", "local"]


def document_numbers(input_ids: Tensor, eos: int, *, after_eos: bool = False) -> Tensor:
    """(B, S) token ids → number of each token's document, (B, S), counted on through the rows from 0.

    A document starts at every EOS but one in position 0: as published, an EOS is the first token of the next
    document. With `after_eos` it is the last of its own, as in the attention's masking. Rows never share a document,
    and padding belongs to the last one of its row.
    """
    starts = input_ids == eos
    if after_eos:
        starts = F.pad(starts[:, :-1], (1, 0))
    starts[:, 0] = True
    return (starts.flatten().cumsum(0) - 1).view_as(input_ids)


def documents_per_row(numbers: Tensor) -> list[int]:
    """How many documents each row of `document_numbers` has: B whole numbers."""
    last = numbers[:, -1].tolist()
    return [now - before for now, before in zip(last, [-1, *last], strict=False)]


def evaluation_size(smallest: int, largest: int, given: int | None = None) -> int:
    """The pool size of evaluation: `given`, else the middle of the training range."""
    return (smallest + largest) // 2 if given is None else given


def check_pool(smallest: int, largest: int, routed_per_token: int) -> None:
    """Raise `SpecError` where a pool could not hold the k routed experts of each token."""
    if not routed_per_token <= smallest <= largest:
        raise SpecError(f"Pool sizes {smallest} to {largest} do not fit: the smallest must be at least the "
                        f"{routed_per_token} routed experts that each token uses, and not above the largest.")


def document_sums(probability: Tensor, documents: Tensor, count: int) -> Tensor:
    """Sum over each document's tokens: (T, R) and numbers (T,) → (N, R). Tokens numbered -1 count nowhere."""
    kept = documents.clamp(min=0)
    weighed = probability * (documents >= 0)[:, None]
    return probability.new_zeros(count, probability.shape[-1]).index_add_(0, kept, weighed)


def document_pools(sums: Tensor, sizes: Tensor) -> Tensor:
    """The `sizes[n]` most likely experts of each document: (N, R) and (N,) → boolean (N, R); ties take the lower."""
    ranks = sums.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    return ranks < sizes.to(ranks.device)[:, None]


def pool_of_tokens(logits: Tensor, documents: Tensor, sizes: Tensor) -> Tensor:
    """Which experts each token may use: routed logits (T, R), numbers (T,), sizes (N,) → boolean (T, R).

    Tokens numbered -1 may use all. There is no gradient through the choice.
    """
    probability = F.softmax(logits.detach(), dim=-1, dtype=torch.float)
    pools = document_pools(document_sums(probability, documents, len(sizes)), sizes)
    return pools[documents.clamp(min=0)] | (documents < 0)[:, None]


def sizes_by_probability(logits: Tensor, documents: Tensor, top_p: float, smallest: int, largest: int) -> Tensor:
    """Pool sizes (N,) of the top-p ablation: the fewest experts whose mean probability in the document reaches top_p.

    Routed logits (T, R) and document numbers (T,). Sizes are kept within {smallest, …, largest}.
    """
    probability = F.softmax(logits.detach(), dim=-1, dtype=torch.float)
    count = int(documents.max()) + 1
    sums = document_sums(probability, documents, count)
    reached = (sums / sums.sum(-1, keepdim=True)).sort(-1, descending=True).values.cumsum(-1)
    return ((reached < top_p).sum(-1) + 1).clamp(smallest, largest)


class Routing(NamedTuple):
    """What one router decides for T tokens. `logits` and `probability` are those of the routed experts in the pool.

    `weights` are the k largest probabilities, not renormalised, then s ones; `experts` their numbers; `counts` (E,)
    how often each expert was chosen.
    """

    logits: Tensor  # (T, R), -inf outside the pool
    probability: Tensor  # (T, R)
    weights: Tensor  # (T, K)
    experts: Tensor  # (T, K)
    counts: Tensor  # (E,)


def route(logits: Tensor, top_k: int, shared: int, allowed: Tensor | None = None) -> Routing:
    """Logits of all experts (T, E) in fp32 → `Routing`. The columns of the shared experts have no effect.

    `allowed` (T, R) restricts the routed experts; None is a standard MoE.
    """
    experts = logits.shape[-1]
    routed = logits[:, :experts - shared]
    if allowed is not None:
        routed = routed.masked_fill(~allowed, float("-inf"))
    probability = F.softmax(routed, dim=-1)
    weights, index = torch.topk(probability, top_k - shared, dim=-1)
    if shared:
        last = torch.arange(experts - shared, experts, device=index.device).expand(len(index), shared)
        weights, index = torch.cat((weights, weights.new_ones(last.shape)), -1), torch.cat((index, last), -1)
    counts = torch.zeros(experts, dtype=torch.long, device=index.device)
    counts = counts.index_add(0, index.flatten(), torch.ones_like(index.flatten()))
    return Routing(routed, probability, weights, index, counts)


def balance_loss(mean_probability: Tensor, counts: Tensor, top_k: int, labels: Tensor | float) -> Tensor:
    """(R/k) · Σ_e counts_e · mean probability_e / labels; 1 if all is uniform and every token has a label.

    `mean_probability` (R,) over the rank's own T positions, after the pool. For the published global balance `counts`
    (R,) and `labels` are summed over all ranks (`over_ranks`); for local balance they are the rank's own. `labels`
    counts the whole step although the counts are those of one micro-batch. `top_k` is k, without the shared experts.
    """
    routed = len(mean_probability)
    return routed / top_k * torch.dot(counts.to(mean_probability.dtype), mean_probability) / labels


def router_z_loss(logits: Tensor, labels: Tensor | float) -> Tensor:
    """Σ over tokens of (log-sum-exp of the pool's logits (T, R))² / the rank's labels in the whole step."""
    return torch.logsumexp(logits, dim=-1).square().sum() / labels


def lm_z_loss(logits: Tensor, labels: Tensor, count: Tensor | float) -> Tensor:
    """Σ over labels that count of (log-sum-exp of all logits)² / `count`; logits (T, V), labels (T,)."""
    return torch.logsumexp(logits.float(), dim=-1).square()[labels != IGNORED].sum() / count


def cross_entropy(logits: Tensor, labels: Tensor, count: Tensor | float) -> Tensor:
    """Σ over labels that count of the negative log-likelihood / `count`; logits (T, V), labels (T,) already shifted."""
    total: Tensor = F.cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="sum")
    return total / count


def over_ranks(values: Sequence[Tensor], group: dist.ProcessGroup | None = None) -> list[Tensor]:
    """Whole numbers, each a vector or scalar, summed over the ranks in one collective; fp32."""
    flat = torch.cat([value.detach().reshape(-1).double() for value in values])
    if dist.is_initialized() and dist.get_world_size(group) > 1:
        dist.all_reduce(flat, group=group)
    parts = torch.split(flat.float(), [value.numel() for value in values])
    return [part.view(value.shape) for part, value in zip(parts, values, strict=True)]


def entropy(routing: Routing) -> Tensor:
    """Entropy (nats) of each token's distribution over its pool, (T,)."""
    each: Tensor = torch.special.entr(routing.probability)
    return each.sum(-1)


@dataclass(frozen=True)
class PoolSizes:
    """Draws d for every document and layer, uniform on {smallest, …, largest} including both ends.

    d is derived from (seed, step, micro-batch, rank, layer, row, document) and nothing else, so that a resumed run
    goes on exactly. `published` takes the default CPU generator instead, layer by layer, row by row, document by
    document, as the original does; then a resumed run draws other sizes. `same_for_all_layers` gives a document one
    d; as published every layer draws its own.
    """

    smallest: int
    largest: int
    seed: int = 0
    published: bool = False
    same_for_all_layers: bool = False

    def draw(self, documents: Sequence[int], layers: int, *, step: int, micro_batch: int, rank: int) -> Tensor:
        """Sizes (layers, N) on the CPU for rows with so many documents each."""
        drawn = 1 if self.same_for_all_layers else layers
        if self.published:
            sizes = torch.randint(self.smallest, self.largest + 1, (drawn, sum(documents)))
        else:
            place = (self.seed, step, micro_batch, rank)
            sizes = torch.stack([self._derived(documents, (*place, layer)) for layer in range(drawn)])
        return sizes.expand(layers, -1)

    def _derived(self, documents: Sequence[int], place: tuple[int, ...]) -> Tensor:
        import numpy as np

        rows = [np.random.default_rng((*place, row)).integers(self.smallest, self.largest, count, endpoint=True)
                for row, count in enumerate(documents)]
        return torch.from_numpy(np.concatenate(rows))
