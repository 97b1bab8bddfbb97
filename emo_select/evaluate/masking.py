"""A full model that routes as if only some of its experts existed, without pruning it.

Every router is replaced by the one that the pruned model would have, with the kept rows of its weights; the numbers
it chooses are translated back to those of the full model. So groups, shared and always-active experts, a shrunken
top-k and renormalisation come out exactly as after pruning.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from emo_select.errors import ModelError
from emo_select.experts import KeepSet
from emo_select.experts.keepset import check_keep_set
from emo_select.experts.prune import pruned_config
from emo_select.models.families import family_of


class NarrowRouter(nn.Module):
    """The router of a pruned layer, answering with expert numbers of the full layer."""

    kept: Tensor

    def __init__(self, router: nn.Module, kept: Tensor) -> None:
        super().__init__()
        self.router = router
        self.register_buffer("kept", kept, persistent=False)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states (…, D) → logits over the kept experts, weights (T, K), expert indices (T, K)."""
        logits, weights, index = self.router(hidden)
        return logits, weights, self.kept[index]


@contextmanager
def masked(model: Any, config: Mapping[str, Any], keep_set: KeepSet) -> Iterator[None]:
    """Let `model` use only the experts of `keep_set` in the body.

    `config` is the content of the full model's config.json. Raises `KeepKError` for a selection of another model.
    """
    check_keep_set(config, keep_set)
    family = family_of(config)
    layers, pruned = model.get_decoder().layers, _pruned_layers(model, pruned_config(config, family, keep_set))
    full: list[tuple[nn.Module, str, nn.Module]] = []
    try:
        for layer, small, kept in zip(layers, pruned, keep_set.experts, strict=True):
            if kept is not None:
                parent, _, name = family.router_module.rpartition(".")
                holder, router = layer.get_submodule(parent), layer.get_submodule(family.router_module)
                full.append((holder, name, router))
                setattr(holder, name, _narrowed(router, small.get_submodule(family.router_module), kept))
        yield
    finally:
        for holder, name, router in full:
            setattr(holder, name, router)


def _pruned_layers(model: Any, config: Mapping[str, Any]) -> nn.ModuleList:
    """Decoder layers of the pruned model, without weights."""
    with torch.device("meta"):
        small = type(model)(type(model.config).from_dict(dict(config)))
    layers = small.get_decoder().layers
    assert isinstance(layers, nn.ModuleList)
    return layers


def _narrowed(full: nn.Module, small: nn.Module, kept: tuple[int, ...]) -> NarrowRouter:
    state = full.state_dict()
    device = next(iter(state.values())).device
    index = torch.tensor(kept, device=device)
    rows = {name: value[index] if value.shape[:1] != small.state_dict()[name].shape[:1] else value
            for name, value in state.items()}
    small.load_state_dict(rows, assign=True)
    if any(tensor.is_meta for tensor in [*small.parameters(), *small.buffers()]):
        raise ModelError(f"{type(full).__name__} keeps weights that a keep set cannot mask; prune the model instead.")
    return NarrowRouter(small.eval(), index)
