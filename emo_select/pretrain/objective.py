"""The EMO training objective: all tokens of a document share a pool of experts (arXiv 2605.06663, section 3).

Per document and layer the softmax over the routed experts is averaged over the document's tokens; the d most likely
experts are the pool; the other routed logits become -inf before the softmax and the top-k. d is drawn per document.
The shared experts stand outside of this.

Shapes: B rows, S positions, T = B·S tokens, N documents, R routed experts of a layer, K of them chosen per token,
L MoE layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from emo_select.errors import ModelError, SpecError

if TYPE_CHECKING:
    from emo_select.models.emo import EmoForCausalLM, EmoRouter

IGNORED = -100  # the label that no loss counts


class Batch(NamedTuple):
    """Tokens of one step on one rank.

    `input_ids` and `labels` are (B, S), labels unshifted and -100 where not trained. `documents` (B, S) numbers the
    document of each token from 0 within the batch, in any order, -1 for padding; a row may hold several documents.
    """

    input_ids: Tensor
    labels: Tensor
    documents: Tensor


@dataclass(frozen=True)
class Losses:
    """Scalars of one step. `total` has the gradient; its mean over the ranks is the loss of the global batch.

    `entropy` is the mean over tokens and layers of the entropy (nats) of the routed softmax after the pool;
    `peak_load` the largest share of choices of one expert, times R, averaged over layers (1 is perfectly balanced).
    """

    total: Tensor
    cross_entropy: Tensor
    balance: Tensor
    z: Tensor
    entropy: Tensor
    peak_load: Tensor


def draw_pool_sizes(documents: int, smallest: int, largest: int, generator: torch.Generator) -> Tensor:
    """One size per document, uniform on {smallest, …, largest}: (N,) on the CPU."""
    return torch.randint(smallest, largest + 1, (documents,), generator=generator)


def document_means(probabilities: Tensor, documents: Tensor, count: int) -> Tensor:
    """Mean over each document's tokens: (T, R) and document numbers (T,) → (N, R). Padding (-1) counts nowhere."""
    real = documents >= 0
    sums = probabilities.new_zeros(count, probabilities.shape[-1])
    sums = sums.index_add(0, documents[real], probabilities[real])
    tokens = torch.bincount(documents[real], minlength=count).clamp(min=1)
    return sums / tokens[:, None]


def document_pools(means: Tensor, sizes: Tensor) -> Tensor:
    """The `sizes[n]` most likely experts of each document: (N, R) and (N,) → boolean (N, R); ties take the lower."""
    ranks = means.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    return ranks < sizes.to(ranks.device)[:, None]


class _LayerPool:
    """The `pool` of one router during one step; remembers the routed logits that it saw."""

    def __init__(self, documents: Tensor, sizes: Tensor | None) -> None:
        self.documents, self.sizes = documents, sizes
        self.logits: Tensor | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        """Routed logits (T, R) → which experts each token may use; padding may use all."""
        allowed = self._allowed(logits.detach())
        self.logits = logits.float().masked_fill(~allowed, float("-inf"))
        return allowed

    def _allowed(self, logits: Tensor) -> Tensor:
        if self.sizes is None:
            return torch.ones_like(logits, dtype=torch.bool)
        means = document_means(F.softmax(logits, dim=-1, dtype=torch.float), self.documents, len(self.sizes))
        pools = document_pools(means, self.sizes)
        return pools[self.documents.clamp(min=0)] | (self.documents < 0)[:, None]


class _Routing(NamedTuple):
    """What the auxiliary losses need of one layer, over the real tokens of this rank."""

    counts: Tensor  # (R,) choices per expert
    probability: Tensor  # (R,) sum of the softmax after the pool
    z: Tensor  # sum of squared log-sum-exps of the pool's logits
    entropy: Tensor  # sum of entropies
    top_k: int


@dataclass(eq=False)
class EmoObjective:
    """Loss of an EMO model on one batch: cross entropy + balance_weight · balance + z_weight · z.

    `pool_sizes` (smallest, largest) bounds d; None trains a standard MoE. A size above a layer's R means R.
    With `global_balance` the expert counts of the balance loss are summed over the data-parallel ranks of `group`
    (default: all), without it each rank balances its own tokens; micro-batches of an accumulated step are balanced
    one by one. Call it on every rank and average the gradients over the ranks: the result is then that of one rank
    with all documents.

        with objective(batch, generator) as losses:
            losses.total.backward()

    Wrap the model for data parallelism as you like and pass the wrapped one as `forward`.

    Raises:
        ModelError: always-active experts. SpecError: pool sizes that cannot hold the routed top-k.
    """

    model: EmoForCausalLM
    pool_sizes: tuple[int, int] | None
    balance_weight: float = 0.1
    z_weight: float = 1e-3
    global_balance: bool = True
    group: dist.ProcessGroup | None = None
    forward: torch.nn.Module | None = None

    def __post_init__(self) -> None:
        from emo_select.models.emo import EmoRouter

        self.routers = [module for module in self.model.modules() if isinstance(module, EmoRouter)]
        if any(router.always_active for router in self.routers):
            raise ModelError("Always-active experts cannot be trained with document pools; use shared experts.")
        if self.pool_sizes is None:
            return
        smallest, largest = self.pool_sizes
        needed = max(router.top_k - router.num_shared for router in self.routers)
        if not needed <= smallest <= largest:
            raise SpecError(f"Pool sizes {smallest} to {largest} do not fit: the smallest must be at least the "
                            f"{needed} routed experts that each token uses, and not above the largest.")

    @contextmanager
    def __call__(self, batch: Batch, generator: torch.Generator) -> Iterator[Losses]:
        """The losses of one batch; `generator` (CPU) draws the pool sizes of its documents, in their numbering.

        Call `total.backward()` inside of the `with`: gradient checkpointing routes a second time, with these pools.
        """
        sizes = None
        if self.pool_sizes is not None:
            count = max(1, int(batch.documents.max()) + 1)  # a rank may have nothing but padding
            sizes = draw_pool_sizes(count, *self.pool_sizes, generator)
        with self.with_sizes(batch, sizes) as losses:
            yield losses

    @contextmanager
    def with_sizes(self, batch: Batch, sizes: Tensor | None) -> Iterator[Losses]:
        """As a call, with the pool sizes (N,) given; None leaves all experts to every document."""
        documents = batch.documents.reshape(-1)
        with self._pools(documents, sizes) as pools:
            logits = (self.forward or self.model)(
                input_ids=batch.input_ids, use_cache=False, output_router_logits=False
            ).logits
            layers = [_routing(pool, router, documents >= 0) for pool, router in zip(pools, self.routers, strict=True)]
            yield self._combine(logits, batch.labels, layers, (documents >= 0).sum())

    @contextmanager
    def _pools(self, documents: Tensor, sizes: Tensor | None) -> Iterator[list[_LayerPool]]:
        pools = [_LayerPool(documents, sizes) for _ in self.routers]
        for router, pool in zip(self.routers, pools, strict=True):
            router.pool = pool
        try:
            yield pools
        finally:
            for router in self.routers:
                router.pool = None

    def _combine(self, logits: Tensor, labels: Tensor, layers: list[_Routing], tokens: Tensor) -> Losses:
        labels = labels[:, 1:]
        items = (labels != IGNORED).sum()
        totals = self._summed([*(layer.counts for layer in layers), tokens[None], items[None]])
        # per rank, on average
        all_tokens, all_items = (total.squeeze().clamp(min=1) / self._ranks for total in totals[-2:])
        nll = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED,
                              reduction="sum")
        cross_entropy = nll / all_items
        counts = totals[:-2] if self.global_balance else [layer.counts for layer in layers]
        balance = torch.stack([
            _balance(layer, count, all_tokens if self.global_balance else tokens.clamp(min=1))
            for layer, count in zip(layers, counts, strict=True)
        ]).mean()
        z = torch.stack([layer.z for layer in layers]).mean() / all_tokens
        with torch.no_grad():
            entropy = torch.stack([layer.entropy for layer in layers]).mean() / tokens.clamp(min=1)
            peak = torch.stack([count.max() / count.sum().clamp(min=1) * len(count) for count in counts]).mean()
        total = cross_entropy + self.balance_weight * balance + self.z_weight * z
        return Losses(total, cross_entropy.detach(), balance.detach(), z.detach(), entropy, peak)

    @property
    def _ranks(self) -> int:
        return dist.get_world_size(self.group) if dist.is_initialized() else 1

    def _summed(self, values: list[Tensor]) -> list[Tensor]:
        """Each vector summed over the ranks, in a single collective."""
        flat = torch.cat([value.detach().double() for value in values])  # exact: these are whole numbers
        if self._ranks > 1:
            dist.all_reduce(flat, group=self.group)
        return list(torch.split(flat.float(), [len(value) for value in values]))


def _routing(pool: _LayerPool, router: EmoRouter, real: Tensor) -> _Routing:
    assert pool.logits is not None  # the forward pass has just called it
    logits = pool.logits[real]
    log_probability = F.log_softmax(logits, dim=-1)
    probability = log_probability.exp()
    top_k = router.top_k - router.num_shared
    chosen = probability.detach().topk(top_k, dim=-1).indices
    with torch.no_grad():
        entropy = -(probability * log_probability.clamp(min=-1e4)).sum()  # 0 · -inf outside of the pool
    return _Routing(
        counts=torch.bincount(chosen.flatten(), minlength=logits.shape[-1]),
        probability=probability.sum(dim=0),
        z=torch.logsumexp(logits, dim=-1).square().sum(),
        entropy=entropy,
        top_k=top_k,
    )


def _balance(layer: _Routing, counts: Tensor, tokens: Tensor) -> Tensor:
    """R · Σ_e (share of choices of e) · (mean probability of e); 1 if both are uniform."""
    shares = counts.to(layer.probability.dtype) / counts.sum().clamp(min=1)
    return len(counts) * (shares * layer.probability / tokens).sum()
