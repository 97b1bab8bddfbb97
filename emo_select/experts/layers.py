"""Decoder layers, one at a time, filled with weights and run by transformers' own code.

A layer is a `Front`, all that can run before its experts are chosen, and a `Back`, the rest with the experts that are
kept. Between them every token has one vector, as between layers.

Where the layer's halves are independent, attention with experts that give zero and experts with attention that gives
zero, `Front` is the one and `Back` the other: each token passes attention once, whatever is kept, and experts see
neither padding nor attention. Other layers run whole: `Front` passes on what it gets, running the layer up to its
experts only when the router is asked, and `Back` runs all of it. Which is right for a layer is tried out beforehand
(`probe.py`).
"""

from __future__ import annotations

import json
import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from emo_select.errors import CheckpointError, ModelError
from emo_select.experts.batches import Batch
from emo_select.experts.frame import Frame, Texts, as_returned, first_of, the_hidden
from emo_select.experts.keepset import KeepSet
from emo_select.experts.kinds import Kinds, kind_of
from emo_select.experts.moe import Recorder, streamed_experts
from emo_select.experts.prune import pruned_config
from emo_select.experts.routers import Ear, Nowhere, Routing, Scores
from emo_select.experts.stream import Reader, Shell, cut, fill
from emo_select.models.conversion import built_config, meta_model
from emo_select.models.families import always_active_per_layer, experts_per_layer, shared_per_layer

FIRST_NORMS = ("input_layernorm", "pre_attention_layernorm")  # feed attention alone where halves are independent


class Skeleton:
    """The model without weights, from which layers are made.

    Attributes:
        config: of the decoder, as transformers reads it.
        shape: of what one token has between two layers, (D,) in most models. dtype: its precision.
    """

    def __init__(self, reader: Reader, kinds: Kinds) -> None:
        self._reader, self._source, self._family = reader, reader.checkpoint.config, reader.family
        model: Any = meta_model(built_config(self._source)).eval()
        self._base: Any = model.get_submodule(self._family.layers.rpartition(".")[0])
        self._layers: Any = model.get_submodule(self._family.layers)
        self.config: Any = self._base.config
        self._classes = [type(layer) for layer in self._layers]
        self._kinds = [kinds[kind_of(layer)] for layer in self._layers]
        self._experts = experts_per_layer(self._source)
        self._configs: dict[str, Any] = {}
        self._alike = _layers_alike(self._source)

    def take(self, texts: Texts) -> None:
        """Make ready for these texts: read what the model has around its layers.

        Raises:
            ModelError: their tokens are not the model's. CheckpointError: a tensor is missing or does not fit.
        """
        compute_buffers(self._base, self._base, self._reader.device)
        self._reader.fill_around(self._base, self._layers, texts.used)
        returns = [kind.returns for kind in self._kinds]
        self.frame = Frame(self._base, self._layers, texts, returns, self._reader.device)
        first: Tensor = self.frame.run(0, the_hidden)
        self.shape, self.dtype = first.shape[2:], first.dtype
        if (layer := self.frame.first_that_looks_further()) is not None:
            raise ModelError(f"Layer {layer} of this model also looks at what layers further below gave, so its layers "
                             "cannot be run one at a time.")

    @property
    def whole(self) -> int:
        """How many of the layers with experts do not split into two halves."""
        return sum(bool(count) and not kind.split for count, kind in zip(self._experts, self._kinds, strict=True))

    def front(self, shell: Shell) -> Front:
        """What can run of the shell's layer, with the router of the unpruned layer, before experts are chosen."""
        kind = self._kinds[shell.layer]
        layer = self._layer(shell.layer, self.config)
        _require_known(shell, layer)
        ear = self._ask_only(layer, shell.layer)
        place = _Place(self.frame, shell.layer, self.shape)
        if not kind.split:
            if ear is not None:
                self._fill(layer, shell)
            return WholeFront(place, layer, ear)
        block = layer.get_submodule(self._family.moe_module)
        stand_in = NoExperts(kind.block)
        layer.set_submodule(self._family.moe_module, stand_in)
        self._fill(layer, shell)
        if ear is not None:
            self._fill(block, shell.below(self._family.moe_module))
        return AttentionHalf(place, layer, stand_in, block, ear)

    def back(self, shell: Shell, weights: Mapping[str, Tensor], *, kept: Sequence[int] | None = None,
             rows: Tensor | None = None, recorder: Recorder | None = None) -> Back:
        """The rest of the shell's layer: with its experts (only `kept` of them), or with the MLP of a dense one.

        `weights` and `rows` are those of `StreamedExperts`. With `kept`, the layer is built from the configuration
        that the pruned checkpoint will have, so it computes exactly what that checkpoint does.
        """
        kind = self._kinds[shell.layer]
        layer = self._layer(shell.layer, self.config if kept is None else self._pruned_config(shell.layer, kept))
        if weights:
            place = self._family.experts_module
            layer.set_submodule(place, streamed_experts(layer.get_submodule(place), weights, rows, recorder))
        if recorder is not None:
            self._record(layer, recorder)
        if kind.split:
            for name, returns in (kind.mixers or {}).items():
                layer.set_submodule(name, NoAttention(returns))
            for name in FIRST_NORMS:
                if hasattr(layer, name):
                    layer.set_submodule(name, nn.Identity())
        self._fill(layer, shell, kept)
        where = _Place(self.frame, shell.layer, self.shape)
        return ExpertsHalf(where, layer) if kind.split else WholeBack(where, layer, recorder)

    def _ask_only(self, layer: nn.Module, index: int) -> Ear | None:
        """Let an MoE layer run no further than to its experts, and nothing that they do not depend on."""
        if not self._experts[index]:
            return None
        layer.set_submodule(self._family.experts_module, Nowhere())
        for name in self._family.separate_shared:
            layer.set_submodule(name, Zeros())
        return Ear(layer.get_submodule(self._family.router_module), self._experts[index])

    def _record(self, layer: nn.Module, recorder: Recorder) -> None:
        Ear(layer.get_submodule(self._family.router_module), recorder.rules.experts, recorder.scored,
            recorder.chosen)
        block = self._family.moe_module or self._family.experts_module  # some layers mix experts in by themselves

        def after_block(module: nn.Module, inputs: Any, output: Any) -> None:
            value = first_of(output)
            recorder.finished(inputs[0].reshape(-1, inputs[0].shape[-1]), value.reshape(-1, value.shape[-1]))

        layer.get_submodule(block).register_forward_hook(after_block)

    def _fill(self, module: nn.Module, shell: Shell, kept: Sequence[int] | None = None) -> None:
        compute_buffers(self._base, module, self._reader.device)
        wanted = {name for name, value in (*module.named_parameters(), *module.named_buffers()) if value.is_meta}
        tensors = {name: tensor for name, tensor in shell.tensors.items() if name in wanted}
        if kept is not None:
            tensors = cut(tensors, module, kept, self._experts[shell.layer])
        fill(module, tensors, self._reader.dtype, f"layer {shell.layer}")

    def _layer(self, index: int, config: Any) -> nn.Module:
        from transformers.initialization import no_init_weights

        with torch.device("meta"), no_init_weights():
            layer: nn.Module = self._classes[index](config, index)
        return layer.eval()

    def _pruned_config(self, layer: int, kept: Sequence[int]) -> Any:
        experts = tuple(None if not count else tuple(kept) if index == layer or self._alike else tuple(range(count))
                        for index, count in enumerate(self._experts))
        keep_set = KeepSet(experts=experts, method="layerwise", keep_k=len(kept))
        content = pruned_config(self._source, self._family, keep_set)
        key = json.dumps(content, sort_keys=True)
        if key not in self._configs:
            made = built_config(content)
            self._configs[key] = made if type(made) is type(self.config) else made.get_text_config()
            self._configs[key]._attn_implementation = self.config._attn_implementation
        return self._configs[key]


class Embedded:
    """The texts before the first layer."""

    def __init__(self, skeleton: Skeleton) -> None:
        self._skeleton = skeleton

    def read(self, batch: Batch) -> Tensor:
        """What the first layer gets for a batch, (T, width)."""
        found: Tensor = self._skeleton.frame.run(0, the_hidden, batch)
        return batch.unpad(found.flatten(2))


class Front(ABC):
    """All of a layer that can run before its experts are chosen."""

    @abstractmethod
    def __call__(self, batch: Batch, hidden: Tensor, stream: int = 0) -> Tensor:
        """(T, width) packed → what `Back` goes on with, (T, width).

        Batches of one `stream` find there the prefixes that they continue.
        """

    @abstractmethod
    def route(self, batch: Batch) -> Routing:
        """What the router says of the batch that this thread has just put through."""

    def scores(self, batch: Batch) -> Scores:
        """Of `route` the scores; where a router can be asked for them alone, it does not choose."""
        return self.route(batch).scores


class Back(ABC):
    """The rest of a layer, whose input is what `Front` gave."""

    @abstractmethod
    def __call__(self, batch: Batch, hidden: Tensor) -> Tensor:
        """(T, width) packed → (T, width)."""


class AttentionHalf(Front):
    """A layer whose block of experts gives zero."""

    def __init__(self, place: _Place, layer: nn.Module, stand_in: NoExperts, block: nn.Module, ear: Ear | None) -> None:
        self._place, self._layer, self._stand_in, self._block, self._ear = place, layer, stand_in, block, ear

    def __call__(self, batch: Batch, hidden: Tensor, stream: int = 0) -> Tensor:
        return batch.unpad(self._place.run(self._layer, batch, self._place.pad(batch, hidden, stream)))

    def route(self, batch: Batch) -> Routing:
        assert self._ear is not None
        seen = batch.unpad(self._stand_in.seen)
        return self._ear.ask(lambda: self._block(seen[None]))

    def scores(self, batch: Batch) -> Scores:
        assert self._ear is not None
        alone = getattr(self._ear.router, "scores", None)  # emo's router has it
        return super().scores(batch) if alone is None else Scores(*alone(batch.unpad(self._stand_in.seen)))


class ExpertsHalf(Back):
    """A layer whose attention gives zero. Tokens do not see each other here, so there is no padding."""

    def __init__(self, place: _Place, layer: nn.Module) -> None:
        self._layer, self._shape, self._arguments = layer, place.shape, place.arguments()

    def __call__(self, batch: Batch, hidden: Tensor) -> Tensor:
        rest, named = self._arguments
        return first_of(self._layer(hidden[None].unflatten(-1, self._shape), *rest, **named)).reshape(hidden.shape)


class WholeFront(Front):
    """Nothing of a layer but the question whom its router would choose."""

    def __init__(self, place: _Place, layer: nn.Module, ear: Ear | None) -> None:
        self._place, self._layer, self._ear = place, layer, ear
        self._of_thread = threading.local()

    def __call__(self, batch: Batch, hidden: Tensor, stream: int = 0) -> Tensor:
        if self._ear is not None:
            self._of_thread.padded = self._place.pad(batch, hidden, stream)
        return hidden

    def route(self, batch: Batch) -> Routing:
        assert self._ear is not None
        padded = self._of_thread.padded
        return self._ear.ask(lambda: self._place.run(self._layer, batch, padded)).rows(batch.places)


class WholeBack(Back):
    """All of a layer, padding included, which does not count."""

    def __init__(self, place: _Place, layer: nn.Module, recorder: Recorder | None) -> None:
        self._place, self._layer, self._recorder = place, layer, recorder

    def __call__(self, batch: Batch, hidden: Tensor) -> Tensor:
        if self._recorder is not None:
            self._recorder.places = batch.places
        return batch.unpad(self._place.run(self._layer, batch, self._place.pad(batch, hidden, 0)))


class _Place:
    """Where in the model a layer runs, and the prefixes that batches there continue."""

    def __init__(self, frame: Frame, index: int, shape: Sequence[int]) -> None:
        self._frame, self._index, self.shape = frame, index, shape
        self._contexts: dict[tuple[int, int], Tensor] = {}

    def pad(self, batch: Batch, hidden: Tensor, stream: int) -> Tensor:
        """(T, width) → (B, S, …), behind the prefix that the batch continues, which has come before."""
        if batch.leads:  # a copy, since `hidden` may be overwritten
            parts = hidden.clone().split(list(batch.lengths))
            self._contexts |= {(stream, number): part for number, part in zip(batch.segments, parts, strict=True)}
        context = None if batch.parent is None else self._contexts[stream, batch.parent]
        padded: Tensor = batch.pad(hidden, context).unflatten(-1, self.shape)
        return padded

    def run(self, layer: nn.Module, batch: Batch, padded: Tensor) -> Tensor:
        """(B, S, …) through the layer, with the arguments that the model itself gives it → (B, S, width)."""
        found: Tensor = self._frame.run(
            self._index, lambda _, rest, named: first_of(layer(padded, *rest, **named)).flatten(2), batch)
        return found

    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What the model gives the layer besides hidden states, for one token."""
        found: tuple[tuple[Any, ...], dict[str, Any]] = self._frame.run(
            self._index, lambda _, rest, named: (rest, named))
        return found


class NoAttention(nn.Module):
    """Stands in for attention where only the experts half of a layer runs: it adds nothing to the residual."""

    def __init__(self, returns: int) -> None:
        super().__init__()
        self._returns = returns

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Zeros that take no memory."""
        return as_returned(hidden_states.new_zeros(1).expand_as(hidden_states), self._returns)


class NoExperts(nn.Module):
    """Stands in for the experts block where only the attention half of a layer runs; keeps the block's input."""

    def __init__(self, returns: int) -> None:
        super().__init__()
        self._returns, self._of_thread = returns, threading.local()

    @property
    def seen(self) -> Tensor:
        """The input of the calling thread's last batch."""
        value: Tensor = self._of_thread.seen
        return value

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Zeros that take no memory."""
        self._of_thread.seen = hidden
        return as_returned(hidden.new_zeros(1).expand_as(hidden), self._returns)


class Zeros(nn.Module):
    """Stands in for a module that need not run, as its result is not used."""

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Zeros in the input's shape."""
        return torch.zeros_like(hidden)


def compute_buffers(model: Any, module: nn.Module, device: torch.device) -> None:
    """Give the buffers that are never stored (tables of positions and the like) the values that `model` gives them."""
    for part in module.modules():
        missing = [name for name in part._non_persistent_buffers_set
                   if (value := part._buffers.get(name)) is not None and value.is_meta]
        for name in missing:
            part._buffers[name] = torch.empty_like(part.get_buffer(name), device=device)
        if missing:
            model._init_weights(part)


def _require_known(shell: Shell, layer: nn.Module) -> None:
    known = {name for name, _ in (*layer.named_parameters(), *layer.named_buffers())}
    if unknown := sorted(shell.tensors.keys() - known):
        raise CheckpointError(f"Layer {shell.layer} of a {type(layer).__name__} has no {unknown[0]}; config.json does "
                              "not fit the weights.")


def _layers_alike(config: Mapping[str, Any]) -> bool:
    """Whether every MoE layer has as many experts and shared ones as the others, and none is singled out."""
    counts = zip(experts_per_layer(config), shared_per_layer(config), strict=True)
    return len({count for count in counts if count[0]}) == 1 and not any(always_active_per_layer(config))
