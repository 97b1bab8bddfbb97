"""Compare a converted checkpoint with its origin by logits on random tokens, one layer of each in memory.

The training's side is computed here in plain torch from the training's tensors, by the formulas of the trainer in
evaluation without document pools (released models have none); the released side by this package's model classes from
the released files. Nothing is shared by the two but the tokens.

Shapes: B rows, S positions, T = B·S tokens, D hidden, V vocabulary, E experts of a layer (shared last), I width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from emo_select.checkpoint import Checkpoint, open_checkpoint
from emo_select.convert.dcp import TrainingTensors
from emo_select.convert.experiment import Layer, TrainingModel, read_experiment
from emo_select.convert.hf import WEIGHTS
from emo_select.convert.layout import PREFIX
from emo_select.models.config import EmoConfig
from emo_select.models.families import layer_parameters, read_parameter
from emo_select.models.loading import load_config
from emo_select.models.startup import import_models
from emo_select.progress import track

ROWS, POSITIONS, SEED = 2, 30, 0
# Largest difference that rounding explains, as a part of the largest logit, with a tenfold margin.
TOLERANCE = {"float32": 1e-5, "bfloat16": 0.1, "float16": 0.02}


@dataclass(frozen=True)
class Agreement:
    """What the comparison found. `difference` is the largest of any logit."""

    difference: float
    tolerance: float
    largest_logit: float
    tokens: int

    @property
    def holds(self) -> bool:
        """Whether the two models are the same up to rounding."""
        return self.difference <= self.tolerance


def compare(training: Path, released: Path, *, dtype: str = "float32") -> Agreement:
    """Logits of a training checkpoint (step folder) against those of a released one, on random tokens.

    `dtype` is the lowest precision that either stores; it decides the tolerance. Arithmetic is float32 on the CPU.
    """
    model = read_experiment(training)
    with open_checkpoint(released) as checkpoint, torch.inference_mode():
        rows = min(model.vocabulary, checkpoint.config["vocab_size"])
        ids = torch.randint(0, rows, (ROWS, POSITIONS), generator=torch.Generator().manual_seed(SEED))
        with track("Comparing layers", 2 * len(model.layers)) as bar:
            ours = training_logits(model, TrainingTensors(training / WEIGHTS), ids, bar.advance)[..., :rows]
            theirs = released_logits(checkpoint, ids, bar.advance)[..., :rows]
    largest = float(ours.abs().max())
    return Agreement(float((ours - theirs).abs().max()), TOLERANCE[dtype] * max(1.0, largest), largest, ids.numel())


def training_logits(model: TrainingModel, tensors: TrainingTensors, ids: Tensor,
                    advance: Callable[[], None] = lambda: None) -> Tensor:
    """Token numbers (B, S) → logits (B, S, V) of the trainer's model in evaluation, without pools."""
    def read(name: str) -> Tensor:
        return tensors.read(PREFIX + name).float()

    hidden = read("embeddings.weight")[ids]
    for index, layer in enumerate(model.layers):
        def part(name: str, block: str = f"blocks.{index}") -> Tensor:
            return read(f"{block}.{name}")

        hidden = hidden + _attention(model, part, _norm(model, hidden, part("attention_norm.weight")))
        normed = _norm(model, hidden, part("feed_forward_norm.weight"))
        hidden = hidden + (_experts(layer, part, normed) if layer.experts else _dense(layer, part, normed))
        advance()
    return _norm(model, hidden, read("lm_head.norm.weight")) @ read("lm_head.w_out.weight").T


def _norm(model: TrainingModel, hidden: Tensor, weight: Tensor) -> Tensor:
    return weight * hidden * (hidden.square().mean(-1, keepdim=True) + model.norm_eps).rsqrt()


def _attention(model: TrainingModel, part: Callable[[str], Tensor], hidden: Tensor) -> Tensor:
    batch, positions, width = hidden.shape
    size = width // model.heads

    def heads(name: str, count: int) -> Tensor:
        return (hidden @ part(f"attention.{name}.weight").T).view(batch, positions, count, size).transpose(1, 2)

    query = _rotate(heads("w_q", model.heads), model.rope_theta)
    key = _rotate(heads("w_k", model.kv_heads), model.rope_theta)
    value = heads("w_v", model.kv_heads)
    mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=model.kv_heads != model.heads)
    return mixed.transpose(1, 2).reshape(batch, positions, width) @ part("attention.w_out.weight").T


def _rotate(heads: Tensor, theta: float) -> Tensor:
    """Rotary positions on (B, heads, S, size): the two halves of a head are the two coordinates that turn."""
    positions, size = heads.shape[-2:]
    frequencies = theta ** -(torch.arange(0, size, 2, dtype=torch.float32) / size)
    angles = torch.outer(torch.arange(positions, dtype=torch.float32), frequencies)
    cos, sin = (torch.cat([part, part], dim=-1) for part in (angles.cos(), angles.sin()))
    first, second = heads.chunk(2, dim=-1)
    return heads * cos + torch.cat([-second, first], dim=-1) * sin


def _dense(layer: Layer, part: Callable[[str], Tensor], hidden: Tensor) -> Tensor:
    def linear(name: str, values: Tensor) -> Tensor:
        bias = part(f"feed_forward.{name}.bias") if layer.bias else None
        return F.linear(values, part(f"feed_forward.{name}.weight"), bias)

    return linear("w2", F.silu(linear("w1", hidden)) * linear("w3", hidden))


def _experts(layer: Layer, part: Callable[[str], Tensor], hidden: Tensor) -> Tensor:
    """Routed experts by the top of a softmax over the routed, each shared expert with weight 1."""
    tokens = hidden.reshape(-1, hidden.shape[-1])
    routed = layer.experts - layer.shared
    weights = _weights(layer, tokens @ part("feed_forward_moe.router.weight").view(layer.experts, -1)[:routed].T)
    weights = torch.cat([weights, weights.new_ones(len(tokens), layer.shared)], dim=-1)
    w1, w3 = (_of_experts(layer, part(f"feed_forward_moe.experts.mlp.{name}")) for name in ("w1", "w3"))
    w2 = part("feed_forward_moe.experts.mlp.w2").view(layer.experts, layer.width, -1)
    mixed = torch.zeros_like(tokens)
    for expert in range(layer.experts):
        chosen = weights[:, expert].nonzero().view(-1)
        values = tokens[chosen]
        output = (F.silu(values @ w1[expert]) * (values @ w3[expert])) @ w2[expert]
        mixed.index_add_(0, chosen, output * weights[chosen, expert, None])
    return mixed.view(hidden.shape)


def _weights(layer: Layer, logits: Tensor) -> Tensor:
    """Routed logits (T, R) → weights (T, R): the probability of an expert that is chosen, 0 of the others."""
    scores = logits.softmax(dim=-1)
    active = list(layer.always_active)
    others = scores.clone()
    others[:, active] = -1
    chosen = others.topk(layer.top_k - layer.shared - len(active), dim=-1).indices
    used = torch.zeros_like(scores).scatter(1, chosen, 1.0)
    used[:, active] = 1
    return scores * used


def _of_experts(layer: Layer, tensor: Tensor) -> Tensor:
    """w1 or w3 as (E, D, I), whichever way the trainer's class stores it."""
    if layer.dropless:
        return tensor.view(layer.experts, layer.width, -1).transpose(1, 2)
    return tensor.view(layer.experts, -1, layer.width)


def released_logits(checkpoint: Checkpoint, ids: Tensor, advance: Callable[[], None] = lambda: None) -> Tensor:
    """Token numbers (B, S) → logits (B, S, V) of the released model, layer by layer, by this package's classes."""
    import_models()
    config, rotary, norm, layer_class = _classes(checkpoint)
    hidden = checkpoint.read("model.embed_tokens.weight").float()[ids]
    positions = torch.arange(ids.shape[1])[None]
    tables = rotary(hidden, positions)
    mask = torch.full((ids.shape[1], ids.shape[1]), float("-inf")).triu(1)[None, None]
    for index in range(config.num_hidden_layers):
        with torch.device("meta"):
            layer = layer_class(config, index).eval()
        layer.load_state_dict(_layer_weights(checkpoint, index, sparse=isinstance(config, EmoConfig)), assign=True)
        hidden = layer(hidden, attention_mask=mask, position_ids=positions, position_embeddings=tables)
        advance()
    norm.load_state_dict({"weight": checkpoint.read("model.norm.weight").float()}, assign=True)
    return F.linear(norm(hidden), checkpoint.read("lm_head.weight").float())


def _classes(checkpoint: Checkpoint) -> tuple[Any, Any, Any, Any]:
    """Configuration, rotary tables, final norm and decoder layer class of the architecture."""
    from emo_select.models.dense import Olmo2NoQKNormPrenormDecoderLayer
    from emo_select.models.emo import EmoDecoderLayer, EmoRMSNorm, EmoRotaryEmbedding

    config = load_config(checkpoint)
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    sparse = isinstance(config, EmoConfig)
    return (config, EmoRotaryEmbedding(config), EmoRMSNorm(config.hidden_size, config.rms_norm_eps),
            EmoDecoderLayer if sparse else Olmo2NoQKNormPrenormDecoderLayer)


def _layer_weights(checkpoint: Checkpoint, index: int, *, sparse: bool) -> dict[str, Tensor]:
    prefix = f"model.layers.{index}."
    if sparse:
        found = {source.parameter: read_parameter(checkpoint, source) for source in layer_parameters(checkpoint, index)}
    else:
        found = {name: checkpoint.read(name) for name in checkpoint.layers[index]}
    return {name.removeprefix(prefix): value.float() for name, value in found.items()}
