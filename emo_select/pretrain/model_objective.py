"""The objective on a transformers EMO model: restricts its routers for one forward pass and adds up the losses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from emo_select.errors import ModelError
from emo_select.pretrain import objective as formulas
from emo_select.pretrain.objective import IGNORED, PoolSizes, Routing

if TYPE_CHECKING:
    from emo_select.models.emo import EmoForCausalLM, EmoRouter

Divisor = Literal["labels", "tokens"]


class Batch(NamedTuple):
    """Tokens of one step on one rank.

    `input_ids` and `labels` are (B, S), labels unshifted and -100 where not trained. `documents` (B, S) numbers the
    document of each token from 0 within the batch, in any order, -1 for padding; a row may hold several documents.
    `objective.document_numbers` makes them from the token ids as the published trainer does.
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


class _LayerPool:
    """The `pool` of one router during one step; remembers the routed logits that it saw."""

    def __init__(self, documents: Tensor, sizes: Tensor | None) -> None:
        self.documents, self.sizes = documents, sizes
        self.logits: Tensor | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        """Routed logits (T, R) → which experts each token may use; padding may use all."""
        allowed = torch.ones_like(logits, dtype=torch.bool)
        if self.sizes is not None:
            allowed = formulas.pool_of_tokens(logits, self.documents, self.sizes)
        self.logits = logits.float().masked_fill(~allowed, float("-inf"))
        return allowed


class _Counted(NamedTuple):
    """What the losses of a step are divided by, each a scalar."""

    tokens: Tensor  # real tokens of this rank
    all_tokens: Tensor  # of all ranks, per rank on average
    labels: Tensor  # labels of this rank
    all_labels: Tensor  # of all ranks, per rank on average


@dataclass(eq=False)
class EmoObjective:
    """Loss of an EMO model on one batch: cross entropy + balance_weight · balance + z_weight · z.

    `pool_sizes` (smallest, largest) bounds d; None trains a standard MoE. A size above a layer's R means R.
    With `global_balance` the expert counts of the balance loss are summed over the data-parallel ranks of `group`
    (default: all), without it each rank balances its own tokens; micro-batches of an accumulated step are balanced
    one by one. Call it on every rank and average the gradients over the ranks.

    `divisor` "labels" is the published normalisation: all losses of a rank are divided by its number of labels.
    With "tokens" the router losses are divided by the number of real tokens, for training on few labels per token,
    and ranks with more of them weigh more: averaged gradients are then those of one rank with all documents.
    `same_for_all_layers` gives each document one d; as published every layer draws its own.

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
    divisor: Divisor = "labels"
    same_for_all_layers: bool = False
    group: dist.ProcessGroup | None = None
    forward: torch.nn.Module | None = None

    def __post_init__(self) -> None:
        from emo_select.models.emo import EmoRouter

        self.routers = [module for module in self.model.modules() if isinstance(module, EmoRouter)]
        if any(router.always_active for router in self.routers):
            raise ModelError("Always-active experts cannot be trained with document pools; use shared experts.")
        if self.pool_sizes is not None:
            needed = max(router.top_k - router.num_shared for router in self.routers)
            formulas.check_pool(*self.pool_sizes, needed)

    @contextmanager
    def __call__(self, batch: Batch, generator: torch.Generator) -> Iterator[Losses]:
        """The losses of one batch; `generator` (CPU) draws the pool sizes: layer by layer, in it by document number.

        Call `total.backward()` inside of the `with`: gradient checkpointing routes a second time, with these pools.
        """
        sizes = None
        if self.pool_sizes is not None:
            count = max(1, int(batch.documents.max()) + 1)  # a rank may have nothing but padding
            shape = (1 if self.same_for_all_layers else len(self.routers), count)
            smallest, largest = self.pool_sizes
            sizes = torch.randint(smallest, largest + 1, shape, generator=generator)
        with self.with_sizes(batch, sizes) as losses:
            yield losses

    @contextmanager
    def with_sizes(self, batch: Batch, sizes: Tensor | None) -> Iterator[Losses]:
        """As a call, with the pool sizes (N,) or (layers, N) given; None leaves all experts to every document."""
        documents = batch.documents.reshape(-1)
        real = documents >= 0
        with self._pools(documents, sizes) as pools:
            logits = (self.forward or self.model)(
                input_ids=batch.input_ids, use_cache=False, output_router_logits=False
            ).logits
            layers = [_routing(pool, router, real) for pool, router in zip(pools, self.routers, strict=True)]
            yield self._combine(logits, batch.labels, layers, real.sum())

    @contextmanager
    def _pools(self, documents: Tensor, sizes: Tensor | None) -> Iterator[list[_LayerPool]]:
        each = [None] * len(self.routers) if sizes is None else sizes.expand(len(self.routers), sizes.shape[-1])
        pools = [_LayerPool(documents, of_layer) for of_layer in each]
        for router, pool in zip(self.routers, pools, strict=True):
            router.pool = pool
        try:
            yield pools
        finally:
            for router in self.routers:
                router.pool = None

    def _combine(self, logits: Tensor, labels: Tensor, layers: Sequence[Routing], tokens: Tensor) -> Losses:
        shifted = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
        own = [routing.counts for routing in layers]
        *counts, all_tokens, all_labels = formulas.over_ranks(
            [*own, tokens, (shifted != IGNORED).sum()], self.group)
        ranks = dist.get_world_size(self.group) if dist.is_initialized() else 1
        counted = _Counted(tokens.clamp(min=1), all_tokens.clamp(min=1) / ranks,
                           (shifted != IGNORED).sum().clamp(min=1), all_labels.clamp(min=1) / ranks)
        per_labels = self.divisor == "labels"
        nll = formulas.cross_entropy(logits.flatten(0, 1), shifted.flatten(),
                                     counted.labels if per_labels else counted.all_labels)
        chosen = counts if self.global_balance else own
        balance = torch.stack([self._balance(*pair, counted, ranks)
                               for pair in zip(layers, chosen, strict=True)]).mean()
        z_divisor = counted.labels if per_labels else counted.all_tokens
        z = torch.stack([formulas.router_z_loss(routing.logits, z_divisor) for routing in layers]).mean()
        with torch.no_grad():
            entropy = torch.stack([formulas.entropy(routing).sum() for routing in layers]).mean() / counted.tokens
            peak = torch.stack([_peak(*pair) for pair in zip(layers, chosen, strict=True)]).mean()
        total = nll + self.balance_weight * balance + self.z_weight * z
        return Losses(total, nll.detach(), balance.detach(), z.detach(), entropy, peak)

    def _balance(self, routing: Routing, counts: Tensor, counted: _Counted, ranks: int) -> Tensor:
        """One layer's balance: as published, or with every real token of all ranks weighing the same."""
        experts = routing.probability.shape[-1]
        per_token = routing.weights.shape[-1] - (len(counts) - experts)
        spread = counted.tokens
        labels = counted.all_labels * ranks if self.global_balance else counted.labels
        if self.divisor == "tokens":
            spread = counted.all_tokens if self.global_balance else counted.tokens
            labels = counts[:experts].sum().clamp(min=1) / per_token
        return formulas.balance_loss(routing.probability.sum(0) / spread, counts[:experts], per_token, labels)


def _routing(pool: _LayerPool, router: EmoRouter, real: Tensor) -> Routing:
    """What the router decided for the real tokens, from the logits that its pool saw."""
    assert pool.logits is not None  # the forward pass has just called it
    shared = pool.logits.new_zeros(len(pool.logits), router.num_shared)
    return formulas.route(torch.cat((pool.logits, shared), -1)[real], router.top_k, router.num_shared)


def _peak(routing: Routing, counts: Tensor) -> Tensor:
    chosen = counts[:routing.probability.shape[-1]]
    return chosen.max() / chosen.sum().clamp(min=1) * len(chosen)


__all__ = ["Batch", "EmoObjective", "Losses", "PoolSizes"]
