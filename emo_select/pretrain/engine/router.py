"""Our router as a plug-in of the engine: a subclass of its router and of its router's configuration.

Shapes: B rows, S positions, D hidden, E experts, R routed, K per token with the shared ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Optional

import torch
from olmo_core.nn.moe import MoELoadBalancingLossGranularity
from olmo_core.nn.moe.router import MoELinearRouter, MoERouterConfig
from torch import Tensor

from emo_select.errors import SpecError
from emo_select.pretrain import objective
from emo_select.pretrain.objective import Routing


# The engine resolves these annotations at run time, so they are written as it writes its own.
@dataclass
class EmoRouterConfig(MoERouterConfig):
    """The engine's router configuration with the fields of the published EMO router.

    `top_k` counts the shared experts. Without `max_document_expert_pool` it is a standard MoE. `top_p`, if set, sizes
    each pool by probability instead of drawing it. `unmasked_balance` and `unmasked_z` take the losses before the
    pool.
    """

    num_shared_experts: int = 0
    min_document_expert_pool: Optional[int] = None  # noqa: UP045
    max_document_expert_pool: Optional[int] = None  # noqa: UP045
    eval_document_expert_pool: Optional[int] = None  # noqa: UP045
    eos_token_id: Optional[int] = None  # noqa: UP045
    global_balance: bool = True
    top_p: Optional[float] = None  # noqa: UP045
    unmasked_balance: bool = False
    unmasked_z: bool = False

    def build(
        self,
        d_model: int,
        num_experts: int,
        *,
        lb_loss_weight: float | None = None,
        lb_loss_granularity: MoELoadBalancingLossGranularity = MoELoadBalancingLossGranularity.local_batch,
        z_loss_weight: float | None = None,
        dtype: torch.dtype | None = None,
        init_device: str = "cpu",
    ) -> EmoRouter:
        """Called by the engine for every MoE layer; weights come divided by the number of layers."""
        return EmoRouter(self, d_model=d_model, num_experts=num_experts, lb_loss_weight=lb_loss_weight,
                         z_loss_weight=z_loss_weight, dtype=dtype or torch.float32, init_device=init_device)


class EmoRouter(MoELinearRouter):
    """Routes as `emo_select.pretrain.objective` says. `documents` and `sizes` are set before each forward pass.

    `seen` (E,) counts choices since the last `take_seen`, and `entropy_sum` sums the mean entropy of micro-batches.
    """

    def __init__(self, config: EmoRouterConfig, **kwargs: Any) -> None:
        super().__init__(top_k=config.top_k, **kwargs)
        self.rule = config
        self.documents: Tensor | None = None  # (B·S,)
        self.sizes: Tensor | None = None  # (N,)
        self.seen: Tensor | None = None
        self.entropy_sum: Tensor | None = None
        if config.max_document_expert_pool is not None:
            smallest = config.min_document_expert_pool or config.max_document_expert_pool
            objective.check_pool(smallest, config.max_document_expert_pool, self.routed_per_token)

    @property
    def num_routed(self) -> int:
        """R: experts that compete for the tokens."""
        return int(self.num_experts) - self.rule.num_shared_experts

    @property
    def routed_per_token(self) -> int:
        """k: routed experts of each token."""
        return int(self.top_k) - self.rule.num_shared_experts

    @torch._dynamo.disable()  # type: ignore[untyped-decorator,unused-ignore]
    def forward(self, x: Tensor, *, loss_div_factor: Tensor | float | None = None) -> Any:
        """(B, S, D) → weights and experts (B, S, K), choices per expert (E,), weighted losses or None."""
        logits = self.get_expert_logits(x).float().flatten(0, 1)
        routing = objective.route(logits, self.top_k, self.rule.num_shared_experts, self._allowed(logits))
        losses = None
        if self.training and torch.is_grad_enabled():
            labels = len(logits) if loss_div_factor is None else loss_div_factor
            losses = self._losses(logits[:, :self.num_routed], routing, labels)
            self._remember(routing)
        shape = (*x.shape[:-1], self.top_k)
        return routing.weights.view(shape), routing.experts.view(shape), routing.counts, losses

    def _allowed(self, logits: Tensor) -> Tensor | None:
        if self.rule.max_document_expert_pool is None:
            return None
        if self.documents is None:
            raise SpecError("The router was called without document numbers; call the model, not a part of it.")
        routed = logits[:, :self.num_routed]
        if self.rule.top_p is not None:
            return objective.pool_of_tokens(routed, self.documents, self._sizes_by_probability(routed))
        assert self.sizes is not None
        return objective.pool_of_tokens(routed, self.documents, self.sizes)

    def _sizes_by_probability(self, routed: Tensor) -> Tensor:
        assert self.documents is not None and self.rule.top_p is not None
        smallest = self.rule.min_document_expert_pool or 1
        largest = self.rule.max_document_expert_pool or self.num_routed
        return objective.sizes_by_probability(routed, self.documents, self.rule.top_p, smallest, largest)

    def _losses(self, unmasked: Tensor, routing: Routing, labels: Tensor | float) -> Tensor | None:
        """The weighted router losses of this micro-batch; what they are unweighted is added up for the metrics."""
        divisor = torch.as_tensor(labels, dtype=torch.float, device=unmasked.device)
        counts, all_labels = routing.counts[:self.num_routed], divisor
        if self.rule.global_balance:
            counts, all_labels = objective.over_ranks([counts, divisor])
        terms: list[Tensor] = []
        if self.lb_loss_weight is not None:
            probability = torch.softmax(unmasked, -1) if self.rule.unmasked_balance else routing.probability
            loss = objective.balance_loss(probability.mean(0), counts, self.routed_per_token, all_labels)
            self.load_balancing_loss += loss.detach()
            terms.append(self.lb_loss_weight * loss)
        if self.z_loss_weight is not None:
            loss = objective.router_z_loss(unmasked if self.rule.unmasked_z else routing.logits, divisor)
            self.z_loss += loss.detach()
            terms.append(self.z_loss_weight * loss)
        return torch.stack(terms).sum() if terms else None

    @torch.no_grad()
    def _remember(self, routing: Routing) -> None:
        self.batch_size_per_expert += routing.counts
        mean = objective.entropy(routing).mean()
        self.entropy_sum = mean if self.entropy_sum is None else self.entropy_sum + mean
        self.seen = routing.counts if self.seen is None else self.seen + routing.counts

    def take_seen(self) -> Tensor:
        """Choices per expert since the last call (E,), on the CPU."""
        seen, self.seen = self.seen, None
        return torch.zeros(self.num_experts, dtype=torch.long) if seen is None else seen.cpu()

    @torch.no_grad()
    def compute_metrics(self, reset: bool = True) -> dict[str, Any]:
        """The engine's metrics of a router, and the routing entropy summed over the step's micro-batches."""
        from olmo_core.train.common import ReduceType

        metrics: dict[str, Any] = super().compute_metrics(reset=False)
        routed = self.batch_size_per_expert[:self.num_routed]
        metrics["load imbalance"] = (routed.max() / routed.mean(dtype=torch.float), ReduceType.max)
        if self.entropy_sum is not None:
            metrics["routing entropy"] = (self.entropy_sum, ReduceType.mean)
        if reset:
            self.reset_metrics()
        return metrics

    def reset_metrics(self) -> None:
        """Start the metrics of the next step."""
        super().reset_metrics()
        self.entropy_sum = None
