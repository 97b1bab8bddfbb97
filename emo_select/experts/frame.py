"""The model around its layers: its own forward, run on a batch's tokens up to one layer.

Embedding and its multipliers, masks of every kind, position tables, whatever else a model hands to its layers: all of
it is transformers' own code. The layers in front only pass on what they get; at the layer that is asked for, the
caller takes over with what the model would give it, and the run ends there.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from emo_select.errors import ModelError
from emo_select.experts.batches import Batch
from emo_select.experts.prefixes import Ids, Segment

Action = Callable[[Tensor, tuple[Any, ...], dict[str, Any]], Any]
"""Takes a layer's place: its hidden states (B, S, …), the other arguments by position and by name."""


def the_hidden(hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """An action that does nothing."""
    return hidden


class Texts:
    """The calibration tokens by segment, and which of the vocabulary they use."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        self._ids: list[Ids] = [segment.tokens for segment in segments]
        self.used: Ids = np.unique(np.concatenate(self._ids)) if self._ids else np.empty(0, dtype=np.int64)

    def padded(self, batch: Batch) -> Tensor:
        """Token ids (B, S) of a batch in its padded arrangement; padding is token 0, whatever that means."""
        packed = torch.from_numpy(np.concatenate([self._ids[number] for number in batch.segments]))[:, None]
        context = None if batch.parent is None else torch.from_numpy(self._ids[batch.parent])[:, None]
        return batch.pad(packed, context)[..., 0]

    def one(self) -> Tensor:
        """A single token, (1, 1)."""
        return torch.tensor([[int(self.used[0])]])


class Frame:
    """`base`, a model on the meta device but for what lies outside its `layers`."""

    def __init__(self, base: nn.Module, layers: Sequence[nn.Module], texts: Texts, returns: Sequence[int],
                 device: torch.device) -> None:
        self._base, self._texts, self._device = base, texts, device
        self._of_thread, self._layers = threading.local(), len(layers)
        for index, layer in enumerate(layers):
            layer.forward = partial(self._at, index, returns[index])

    def run(self, layer: int, action: Action, batch: Batch | None = None, below: Action = the_hidden) -> Any:
        """What `action` returns in place of `layer`; without a batch it gets the arguments for a single token.

        The layers below it hand on what `below` returns in their place.
        """
        here, extra = self._of_thread, {}
        here.layer, here.action, here.below, here.result = layer, action, below, None
        ids = self._texts.one() if batch is None else self._texts.padded(batch)
        if batch is not None and batch.parent is not None:
            extra = {"attention_mask": batch.mask(self._mask_dtype, self._device),
                     "position_ids": batch.positions().to(self._device)}
        try:
            self._base(input_ids=ids.to(self._device), use_cache=False, **extra)
        except _Done:
            return here.result
        finally:
            here.action = here.below = here.result = None  # nothing of a batch stays behind
        raise ModelError(f"The model's forward does not come to its layer {layer}.")

    def first_that_looks_further(self) -> int | None:
        """The first layer whose other arguments depend on what the layers below it gave; None: there is no such layer.

        Such a layer cannot be run from the states in front of it alone.
        """
        def arguments(change: float) -> list[list[Tensor]]:
            found: list[list[Tensor]] = []

            def note(hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
                found.append([value.clone() for value in _tensors((args, kwargs))])
                return hidden + change

            self.run(self._layers - 1, note, below=note)
            return found

        for layer, (a, b) in enumerate(zip(arguments(0), arguments(1), strict=True)):
            if len(a) != len(b) or not all(map(torch.equal, a, b)):
                return layer
        return None

    @property
    def _mask_dtype(self) -> torch.dtype:
        return next(self._base.parameters()).dtype

    def _at(self, index: int, returns: int, *args: Any, **kwargs: Any) -> Any:
        """In place of a layer's forward."""
        hidden, rest = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
        here = self._of_thread
        if index < here.layer:
            return as_returned(here.below(hidden, rest, kwargs), returns)
        here.result = here.action(hidden, rest, kwargs)
        raise _Done


class _Done(Exception):
    """The layer that was asked for has been reached."""


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _tensors(part)


def as_returned(value: Any, returns: int) -> Any:
    """`value` as a module returns it: alone (0), or first in a tuple of `returns` entries."""
    return (value, *[None] * (returns - 1)) if returns else value


def first_of(output: Any) -> Tensor:
    """The tensor that a module returns, or the first of several."""
    value: Tensor = output[0] if isinstance(output, tuple) else output
    return value


def look_up_rows(table: nn.Embedding, used: Ids) -> None:
    """Let a table that has only the rows of the tokens in `used` (ascending) be asked by token ids."""
    ids = torch.from_numpy(used)

    def to_rows(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (torch.searchsorted(ids.to(args[0].device), args[0]), *args[1:])

    table.padding_idx = None  # means nothing but in training
    table.register_forward_pre_hook(to_rows)


def tables_of(base: nn.Module, layers: nn.Module) -> Mapping[str, nn.Embedding]:
    """The embedding tables outside the layers, by name."""
    inside = set(layers.modules())
    return {name: module for name, module in base.named_modules()
            if isinstance(module, nn.Embedding) and module not in inside}
