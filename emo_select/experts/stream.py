"""One decoder layer at a time: read it from the shards, run it on every calibration batch, forget it.

A transformers model is built on the meta device, where it has structure but no weights. For a layer, a fresh module
of its class gets the tensors that are needed. All families here compute x + attention(norm(x)) and then
r + experts(norm(r)), so replacing one of the two submodules by a stand-in that returns zeros runs the other half
alone, by transformers' own code:

- the attention half needs attention, norms and router (the layer's *shell*), no expert;
- the experts half needs no attention and no padding, and only the experts that are kept.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from emo_select.checkpoint import Checkpoint
from emo_select.checkpoint.header import DTYPES, SAFETENSORS_DTYPE
from emo_select.errors import CheckpointError, ModelError, NumericError
from emo_select.experts.batches import Batch
from emo_select.experts.keepset import KeepSet
from emo_select.experts.moe import NoAttention, NoExperts, Recorder, StreamedExperts, attach
from emo_select.experts.prefixes import Ids
from emo_select.experts.prune import pruned_config
from emo_select.models.families import (
    ParameterSource,
    always_active_per_layer,
    expert_parameters,
    experts_per_layer,
    family_of,
    layer_parameters,
    parameter_shape,
    read_parameter,
    shared_per_layer,
)
from emo_select.models.preflight import check_weights
from emo_select.models.startup import import_models

EMBEDDING = "model.embed_tokens.weight"
FIRST_NORMS = ("input_layernorm", "pre_attention_layernorm")  # feed attention alone, so the experts half needs none


@dataclass(frozen=True)
class Shell:
    """A layer's tensors by their name within the layer, all but the expert weights."""

    layer: int
    tensors: Mapping[str, Tensor]
    expert_rows: frozenset[str]
    """Names whose axis 0 runs over the layer's experts."""

    def kept(self, experts: Sequence[int]) -> dict[str, Tensor]:
        """The tensors with only these experts' rows."""
        return {name: tensor[list(experts)] if name in self.expert_rows else tensor
                for name, tensor in self.tensors.items()}


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
        return ahead.result() if ahead else self._read_shell(layer)

    def experts(self, layer: int, kept: Sequence[int]) -> dict[str, Tensor]:
        """Expert tensors by name (gate_up_proj, down_proj, …) with `kept` on axis 0, in the compute precision."""
        ahead = self._ahead.pop(("experts", layer), None)
        return ahead.result() if ahead else self._read_experts(layer, kept)

    def recycle(self, weights: Mapping[str, Tensor]) -> None:
        """Take back the memory of experts that are no longer used: fresh memory costs more than reading does."""
        self._spare |= {name: tensor.view(-1) for name, tensor in weights.items() if tensor.device.type == "cpu"}

    def prefetch_shell(self, layer: int) -> None:
        """Start reading the next shell."""
        if layer < len(experts_per_layer(self.checkpoint.config)):
            self._ahead["shell", layer] = self._thread.submit(self._read_shell, layer)

    def prefetch_experts(self, layer: int, kept: Sequence[int]) -> None:
        """Start reading expert weights: onto a GPU, or, to hold only one layer in memory, into the page cache."""
        if self.device.type == "cuda":
            self._ahead["experts", layer] = self._thread.submit(self._read_experts, layer, kept)
        else:
            self.warm(layer, kept)

    def warm(self, layer: int, kept: Sequence[int]) -> None:
        """Let the kernel read expert weights into its page cache."""
        self._thread.submit(self._warm, layer, kept)

    def rows(self, name: str, rows: Sequence[int]) -> Tensor:
        """Rows of a tensor, on the device in the compute precision."""
        return self._finite(name, self.checkpoint.read(name, rows)).to(self.device, self.dtype)

    def close(self) -> None:
        """Stop the thread."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _read_shell(self, layer: int) -> Shell:
        sources = layer_parameters(self.checkpoint, layer, experts=())
        names = [source.parameter.removeprefix(f"model.layers.{layer}.") for source in sources]
        values = [self._finite(source.tensor or source.parameter, read_parameter(self.checkpoint, source))
                  for source in sources]
        tensors = {name: value.to(self.device) for name, value in zip(names, values, strict=True)}
        rows = frozenset(name for name, source in zip(names, sources, strict=True)
                         if source.tensor is not None and self.family.role(source.tensor).kind == "rows")
        return Shell(layer, tensors, rows)

    def _read_experts(self, layer: int, kept: Sequence[int]) -> dict[str, Tensor]:
        return {source.parameter.rpartition(".")[2]: self._read_fused(source).to(self.device, self.dtype)
                for source in expert_parameters(self.family, layer, kept)}

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
        for source in expert_parameters(self.family, layer, kept):
            for name in [source.tensor] if source.tensor else [n for block in source.blocks for n in block]:
                self.checkpoint.warm(name, source.rows)


class Skeleton:
    """The model without weights, and the halves of its layers as functions."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> None:
        import_models()
        from transformers import AutoModelForCausalLM

        self.source, self.device, self.dtype = checkpoint.config, device, dtype
        self.family = family_of(self.source)
        self.config = _transformers_config(self.source)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(self.config, dtype=dtype, trust_remote_code=False)
        self.base: Any = model.model.eval()
        self._classes = [type(layer) for layer in self.base.layers]
        self._built = dict(enumerate(self.base.layers))  # each for the one attention half that will be asked for
        self._configs: dict[str, Any] = {}
        self._alike = _layers_alike(self.source)
        self.base.embed_tokens, self.base.norm = nn.Identity(), nn.Identity()
        self.base.rotary_emb = type(self.base.rotary_emb)(self.config).to(device)

    def attention_half(self, shell: Shell) -> AttentionHalf:
        """Attention of the shell's layer, with the router of the unpruned layer; it takes the place of the one before.

        Afterwards `route` gives what that router says of the batch.
        """
        layer = self._built.pop(shell.layer, None) or self._layer(shell.layer, self.config)
        block = layer.get_submodule(self.family.moe_module)
        router = self._router(layer, shell) if shell.expert_rows else None
        # a block whose router is called `router` (gpt_oss) returns its scores too
        stand_in = NoExperts("pair" if hasattr(block, "router") else "tensor")
        setattr(layer, self.family.moe_module, stand_in)
        tensors = {name: t for name, t in shell.tensors.items() if not name.startswith(f"{self.family.moe_module}.")}
        fill(layer, tensors, self.dtype, shell.layer)
        self.base.layers = nn.ModuleList(layer if i == shell.layer else _Skip() for i in range(len(self._classes)))
        return AttentionHalf(self.base, stand_in, router)

    def experts_half(self, shell: Shell, weights: Mapping[str, Tensor], *, kept: Sequence[int] | None = None,
                     rows: Tensor | None = None, recorder: Recorder | None = None) -> ExpertsHalf:
        """What follows attention: experts of an MoE layer (only `kept` of them), or the MLP of a dense one.

        `weights` and `rows` are those of `StreamedExperts`. With `kept`, the layer is built from the configuration
        that the pruned checkpoint will have, so it computes exactly what that checkpoint does.
        """
        config = self.config if kept is None else self._pruned_config(shell.layer, kept)
        layer = self._layer(shell.layer, config)
        layer.self_attn = NoAttention()
        unused = {name for name in FIRST_NORMS if hasattr(layer, name)}
        for name in unused:
            setattr(layer, name, nn.Identity())
        block = layer.get_submodule(self.family.moe_module)
        if weights:
            template = block.get_submodule(self.family.experts_module.rpartition(".")[2])
            block.experts = StreamedExperts(template, weights, rows, recorder)
        if recorder is not None:
            attach(block, layer.get_submodule(self.family.router_module), recorder)
        tensors = shell.tensors if kept is None else shell.kept(kept)
        fill(layer, {name: t for name, t in tensors.items() if name.split(".")[0] not in {"self_attn", *unused}},
             self.dtype, shell.layer)
        return ExpertsHalf(layer)

    def _router(self, layer: nn.Module, shell: Shell) -> nn.Module:
        router = layer.get_submodule(self.family.router_module)
        prefix = f"{self.family.router_module}."
        fill(router, {name.removeprefix(prefix): t for name, t in shell.tensors.items() if name.startswith(prefix)},
             self.dtype, shell.layer)
        return router

    def _layer(self, index: int, config: Any) -> nn.Module:
        from transformers.initialization import no_init_weights

        with torch.device("meta"), no_init_weights():
            layer: nn.Module = self._classes[index](config, index)
        return layer.eval()

    def _pruned_config(self, layer: int, kept: Sequence[int]) -> Any:
        experts = tuple(None if not count else tuple(kept) if index == layer or self._alike else tuple(range(count))
                        for index, count in enumerate(experts_per_layer(self.source)))
        keep_set = KeepSet(experts=experts, method="layerwise", keep_k=len(kept))
        content = pruned_config(self.source, self.family, keep_set)
        key = json.dumps(content, sort_keys=True)
        if key not in self._configs:
            self._configs[key] = _transformers_config(content)
            self._configs[key]._attn_implementation = self.config._attn_implementation
        return self._configs[key]


class AttentionHalf:
    """r = x + attention(norm(x)) of one layer, with the mask and rotary tables that the model itself makes."""

    def __init__(self, base: Any, stand_in: NoExperts, router: nn.Module | None) -> None:
        self._base, self._stand_in, self._router = base, stand_in, router
        self._contexts: dict[tuple[int, int], Tensor] = {}

    def __call__(self, batch: Batch, hidden: Tensor, stream: int = 0) -> Tensor:
        """(T, D) packed → (T, D) packed. Batches of one `stream` find there the prefixes that they continue."""
        if batch.leads:  # a copy, since `hidden` may be overwritten
            parts = hidden.clone().split(list(batch.lengths))
            self._contexts |= {(stream, number): part for number, part in zip(batch.segments, parts, strict=True)}
        if batch.parent is None:
            padded, apart = batch.pad(hidden), {}
        else:
            padded = batch.pad(hidden, self._contexts[stream, batch.parent])
            apart = {"attention_mask": batch.mask(hidden.dtype, hidden.device),
                     "position_ids": batch.positions().to(hidden.device)}
        return batch.unpad(self._base(inputs_embeds=padded, use_cache=False, **apart).last_hidden_state)

    def route(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """The router's logits (T, E), weights and indices (T, K) for the batch this thread has just put through."""
        assert self._router is not None
        found: tuple[Tensor, Tensor, Tensor] = self._router(batch.unpad(self._stand_in.seen))
        return found

    def logits(self, batch: Batch) -> Tensor:
        """The first thing that `route` gives; without a choice of experts where the router can leave that out."""
        alone = getattr(self._router, "logits", None)  # emo's router has it
        if alone is None:
            return self.route(batch)[0]
        found: Tensor = alone(batch.unpad(self._stand_in.seen))
        return found


class ExpertsHalf:
    """r + experts(norm(r)) of one layer; tokens do not see each other here."""

    def __init__(self, layer: nn.Module) -> None:
        self._layer = layer

    def __call__(self, hidden: Tensor) -> Tensor:
        """(T, D) → (T, D)."""
        output = self._layer(hidden[None], attention_mask=None, position_ids=None, position_embeddings=None)
        value: Tensor = output[0] if isinstance(output, tuple) else output
        return value.reshape(hidden.shape)


class Embedded:
    """The calibration tokens' embeddings; only rows of tokens that occur are read."""

    def __init__(self, reader: Reader, token_ids: Sequence[Ids]) -> None:
        self._ids = token_ids
        used = np.unique(np.concatenate(self._ids)) if self._ids else np.empty(0, dtype=np.int64)
        size = reader.checkpoint.info(EMBEDDING).shape[0]
        if len(used) and not 0 <= used[0] <= used[-1] < size:
            raise ModelError(f"The calibration tokens go up to id {used[-1]}, but the model knows {size} tokens; the "
                             "tokenizer belongs to another vocabulary.")
        self._used, self._table = used, reader.rows(EMBEDDING, used.tolist())

    def read(self, batch: Batch) -> Tensor:
        """(T, D) of a batch."""
        ids = np.concatenate([self._ids[number] for number in batch.segments])
        rows = torch.from_numpy(np.searchsorted(self._used, ids))
        return self._table[rows.to(self._table.device)]


def _layers_alike(config: Mapping[str, Any]) -> bool:
    """Whether every MoE layer has as many experts and shared ones as the others, and none is singled out."""
    counts = zip(experts_per_layer(config), shared_per_layer(config), strict=True)
    return len({count for count in counts if count[0]}) == 1 and not any(always_active_per_layer(config))


def _is_finite(values: Tensor) -> bool:
    # a sum is one pass over memory; only if it overflows or meets NaN is every element looked at
    return not values.is_floating_point() or bool(values.sum(dtype=torch.float32).isfinite()) \
        or bool(values.isfinite().all())


def fill(module: nn.Module, tensors: Mapping[str, Tensor], dtype: torch.dtype, layer: int) -> None:
    """Give a module on the meta device its weights (cast to `dtype`; buffers stay fp32).

    Raises:
        CheckpointError: a tensor is missing, unexpected or of another shape.
    """
    missing = {name: value.shape for name, value in (*module.named_parameters(), *module.named_buffers())
               if value.is_meta}
    for name, tensor in tensors.items():
        if missing.pop(name, None) != tensor.shape:
            raise CheckpointError(f"{name} of layer {layer} has shape {list(tensor.shape)}, which does not fit "
                                  "config.json; the config belongs to another checkpoint.")
        owner, _, leaf = name.rpartition(".")
        place = module.get_submodule(owner)
        if leaf in place._parameters:
            place._parameters[leaf] = nn.Parameter(tensor.to(dtype), requires_grad=False)
        else:
            place._buffers[leaf] = tensor.float()
    if missing:
        raise CheckpointError(f"Layer {layer} has no tensor {min(missing)}; config.json does not fit the weights.")


def _transformers_config(config: Mapping[str, Any]) -> Any:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))


class _Skip(nn.Module):
    """A layer that leaves the hidden states alone."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The input."""
        return hidden_states
