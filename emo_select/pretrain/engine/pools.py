"""Gives the routers of a model their documents and pool sizes before each forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from olmo_core.distributed.utils import get_rank
from olmo_core.train.callbacks import Callback
from torch import Tensor, nn

from emo_select.pretrain import objective
from emo_select.pretrain.engine.router import EmoRouter
from emo_select.pretrain.objective import PoolSizes
from emo_select.pretrain.recipe import Recipe


class Draws(Protocol):
    """Draws a pool size for every document and layer."""

    def draw(self, documents: Sequence[int], layers: int, *, step: int, micro_batch: int, rank: int) -> Tensor:
        """Sizes (layers, documents of all rows)."""


def draws_of(recipe: Recipe) -> Draws | None:
    """The draws of a recipe; None where nothing is drawn."""
    pool, rule = recipe.objective.pool, recipe.objective
    if pool is None:
        return None
    return PoolSizes(pool.smallest, pool.largest, seed=recipe.seed, published=rule.published_draws,
                     same_for_all_layers=rule.same_pool_size_in_all_layers)


def routers(model: nn.Module) -> list[EmoRouter]:
    """The routers of a model, first layer first."""
    return [module for module in model.modules() if isinstance(module, EmoRouter)]


class Pools(Callback):  # type: ignore[misc,unused-ignore]
    """A forward pre-hook of the model that knows the step by being a callback of the trainer.

    In training it hands out drawn sizes, in evaluation the fixed one. Rows arrive as one micro-batch (B, S).
    """

    def __init__(self, model: nn.Module, recipe: Recipe, draws: Draws) -> None:
        pool = recipe.objective.pool
        assert pool is not None
        self.routers, self.draws = routers(model), draws
        self.eos, self.after_eos = recipe.tokenizer.eos_token_id, recipe.objective.eos_ends_its_document
        self.evaluation = objective.evaluation_size(pool.smallest, pool.largest, pool.evaluation)
        self.now, self.micro_batch = 0, 0
        model.register_forward_pre_hook(self._hand_out, with_kwargs=True)

    def pre_step(self, batch: dict[str, Any]) -> None:
        """A step begins: its micro-batches are counted anew."""
        del batch
        self.now, self.micro_batch = self.step, 0

    def _hand_out(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        input_ids = args[0] if args else kwargs["input_ids"]
        numbers = objective.document_numbers(input_ids, self.eos, after_eos=self.after_eos)
        sizes = self._sizes(objective.documents_per_row(numbers), model.training)
        device = self.routers[0].device
        documents, sizes = numbers.flatten().to(device), sizes.to(device)
        for router, of_layer in zip(self.routers, sizes, strict=True):
            router.documents, router.sizes = documents, of_layer

    def _sizes(self, rows: list[int], training: bool) -> Tensor:
        if not training:
            return torch.full((len(self.routers), sum(rows)), self.evaluation)
        place = {"step": self.now, "micro_batch": self.micro_batch, "rank": get_rank()}
        self.micro_batch += 1
        return self.draws.draw(rows, len(self.routers), **place)
