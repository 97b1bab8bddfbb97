"""One decoder layer at a time, read from the shards: first its *shell*, all but the experts, then experts.

`layers.py` makes modules of what is read here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from emo_select.checkpoint import Checkpoint
from emo_select.checkpoint.header import DTYPES, SAFETENSORS_DTYPE
from emo_select.errors import CheckpointError, ModelError, NumericError
from emo_select.experts.frame import look_up_rows, tables_of
from emo_select.experts.prefixes import Ids
from emo_select.models.families import (
    ParameterSource,
    expert_parameters,
    experts_per_layer,
    family_of,
    layer_parameters,
    model_parameters,
    parameter_shape,
    read_parameter,
)
from emo_select.models.preflight import check_weights

PIECE = 1 << 22  # numbers


@dataclass(frozen=True)
class Shell:
    """A layer's tensors by their name within the layer, all but the expert weights."""

    layer: int
    tensors: Mapping[str, Tensor]

    def below(self, module: str) -> Shell:
        """The tensors of a submodule, by their name within it."""
        return Shell(self.layer, {name.removeprefix(f"{module}."): tensor for name, tensor in self.tensors.items()
                                  if name.startswith(f"{module}.")})


class Reader:
    """Reads layers onto a device, the next shell in a thread while the present layer computes."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        check_weights(checkpoint)
        self.checkpoint = checkpoint.plain(SAFETENSORS_DTYPE[str(dtype).removeprefix("torch.")])
        self.family = family_of(checkpoint.config)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch")
        self._ahead: dict[tuple[str, int], Future[Any]] = {}
        self._spare: dict[str, Tensor] = {}

    def shell(self, layer: int) -> Shell:
        """The layer's shell, from the prefetch if there is one."""
        ahead = self._ahead.pop(("shell", layer), None)
        return ahead.result() if ahead else self.read_shell(layer)

    def experts(self, layer: int, kept: Sequence[int]) -> dict[str, Tensor]:
        """Expert tensors by name (gate_up_proj, down_proj, …) with `kept` on axis 0, in the compute precision."""
        ahead = self._ahead.pop(("experts", layer), None)
        return ahead.result() if ahead else self.read_experts(layer, kept)

    def recycle(self, weights: Mapping[str, Tensor]) -> None:
        """Take back the memory of experts that are no longer used: fresh memory costs more than reading does."""
        self._spare |= {name: tensor.view(-1) for name, tensor in weights.items() if tensor.device.type == "cpu"}

    def prefetch_shell(self, layer: int) -> None:
        """Start reading the next shell."""
        if layer < len(experts_per_layer(self.checkpoint.config)):
            self._ahead["shell", layer] = self._thread.submit(self.read_shell, layer)

    def prefetch_experts(self, layer: int, kept: Sequence[int]) -> None:
        """Start reading expert weights: onto a GPU, or, to hold only one layer in memory, into the page cache."""
        if self.device.type == "cuda":
            self._ahead["experts", layer] = self._thread.submit(self.read_experts, layer, kept)
        else:
            self.warm(layer, kept)

    def warm(self, layer: int, kept: Sequence[int]) -> None:
        """Let the kernel read expert weights into its page cache."""
        self._thread.submit(self._warm, layer, kept)

    def fill_around(self, base: nn.Module, layers: nn.Module, used: Ids) -> None:
        """Give what lies outside a decoder's layers its weights; of embeddings only the rows of the tokens in `used`.

        Raises:
            ModelError: the tokens are not the model's.
        """
        tables, tensors = tables_of(base, layers), {}
        for source in model_parameters(self.checkpoint):
            name = source.parameter.removeprefix(self.family.layers.rpartition(".")[0] + ".")
            table = tables.get(name.removesuffix(".weight"))
            if table is None:
                tensors[name] = self._read_plain(source)
                continue
            _require_known(used, table.num_embeddings)
            rows = self._read_plain(replace(source, rows=tuple(used.tolist())))
            table.weight = nn.Parameter(rows.to(self.dtype), requires_grad=False)
            look_up_rows(table, used)
        fill(base, tensors, self.dtype, "The model around its layers", apart=layers)

    def close(self) -> None:
        """Stop the thread."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def read_shell(self, layer: int) -> Shell:
        """As `shell`, whatever is ahead."""
        prefix = f"{self.family.layers}.{layer}."
        return Shell(layer, {source.parameter.removeprefix(prefix): self._read_plain(source)
                             for source in layer_parameters(self.checkpoint, layer, experts=())})

    def _read_plain(self, source: ParameterSource) -> Tensor:
        values = read_parameter(self.checkpoint, source)
        return self._finite(source.tensor or source.parameter, values).to(self.device)

    def read_experts(self, layer: int, kept: Sequence[int]) -> dict[str, Tensor]:
        """As `experts`, whatever is ahead."""
        prefix = f"{self.family.layers}.{layer}.{self.family.experts_module}."
        found = {source.parameter.removeprefix(prefix): self._read_fused(source).to(self.device, self.dtype)
                 for source in expert_parameters(self.checkpoint, layer, kept)}
        each = {fused.parameter.removeprefix(f"{self.family.experts_module}."): fused.rows.each
                for fused in self.family.experts}
        return {name: value if each[name] == 1 else value.unflatten(0, (len(kept), each[name]))
                for name, value in found.items()}

    def _read_fused(self, source: ParameterSource) -> Tensor:
        """One parameter of all experts."""
        values = read_parameter(self.checkpoint, source, self._room(source))
        if source.tensor is not None:
            return self._finite(source.tensor, values)
        if not _is_finite(values):
            for names, block in zip(source.blocks, values, strict=True):
                self._finite(" or ".join(names), block)
        return values

    def _room(self, source: ParameterSource) -> Tensor:
        """Memory for a parameter, that of an earlier layer if it suffices."""
        shape, stored = parameter_shape(self.checkpoint, source)
        dtype, size = getattr(torch, DTYPES[stored][1]), math.prod(shape)
        spare = self._spare.pop(source.parameter.rpartition(".")[2], None)
        if spare is None or spare.dtype != dtype or len(spare) < size:
            spare = torch.empty(size, dtype=dtype)
        return spare[:size].view(shape)

    def _finite(self, name: str, values: Tensor) -> Tensor:
        if not _is_finite(values):
            raise NumericError(f"The weights {name} of {self.checkpoint.directory} contain NaN or infinity; download "
                               "or save the checkpoint again.")
        return values

    def _warm(self, layer: int, kept: Sequence[int]) -> None:
        for source in expert_parameters(self.checkpoint, layer, kept):
            for name in source.names:
                self.checkpoint.warm(name, source.rows)


def _is_finite(values: Tensor) -> bool:
    if not values.is_floating_point():
        return True
    # a sum is one pass over memory; only if it overflows or meets NaN is every element looked at. In pieces, since sums
    # of half precision are made of a copy in fp32
    return all(bool(piece.sum(dtype=torch.float32).isfinite()) or bool(piece.isfinite().all())
               for piece in values.flatten().split(PIECE))


def fill(module: nn.Module, tensors: Mapping[str, Tensor], dtype: torch.dtype, what: str,
         apart: nn.Module | None = None) -> None:
    """Give a module on the meta device its weights (cast to `dtype`; buffers stay fp32), all but those of `apart`.

    Raises:
        CheckpointError: a tensor is missing, unexpected or of another shape.
    """
    left = set() if apart is None else {id(value) for value in (*apart.parameters(), *apart.buffers())}
    missing = {name: value.shape for name, value in (*module.named_parameters(), *module.named_buffers())
               if value.is_meta and id(value) not in left}
    for name, tensor in tensors.items():
        if missing.pop(name, None) != tensor.shape:
            raise CheckpointError(f"{name} of {what} has shape {list(tensor.shape)}, which does not fit "
                                  "config.json; the config belongs to another checkpoint.")
        owner, _, leaf = name.rpartition(".")
        place = module.get_submodule(owner)
        if leaf in place._parameters:
            place._parameters[leaf] = nn.Parameter(tensor.to(dtype), requires_grad=False)
        else:
            place._buffers[leaf] = tensor.float() if tensor.is_floating_point() else tensor
    if missing:
        raise CheckpointError(f"There is no tensor {min(missing)} of {what}; config.json does not fit the weights.")


def cut(tensors: Mapping[str, Tensor], module: nn.Module, kept: Sequence[int], experts: int) -> dict[str, Tensor]:
    """Tensors of a layer with `experts` experts for a `module` that has only `kept`.

    An axis that is shorter there runs over the experts, some entries each; what lies behind the experts stays.
    """
    places = dict((*module.named_parameters(), *module.named_buffers()))
    return {name: _cut(tensor, places[name].shape, kept, experts) for name, tensor in tensors.items()}


def _cut(tensor: Tensor, shape: torch.Size, kept: Sequence[int], experts: int) -> Tensor:
    for axis, (size, wanted) in enumerate(zip(tensor.shape, shape, strict=True)):
        if size != wanted:
            each = (size - wanted) // (experts - len(kept))
            rows = [expert * each + entry for expert in kept for entry in range(each)]
            chosen = [*rows, *range(experts * each, size)]
            tensor = tensor.index_select(axis, torch.tensor(chosen, device=tensor.device))
    return tensor


def _require_known(used: Ids, size: int) -> None:
    if len(used) and not 0 <= used[0] <= used[-1] < size:
        raise ModelError(f"The calibration tokens go up to id {used[-1]}, but the model knows {size} tokens; the "
                         "tokenizer belongs to another vocabulary.")
