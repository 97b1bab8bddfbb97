"""What can be known of a model without its weights: the names, shapes and bytes of its tensors, from config.json alone.

Of the released models the configurations are shipped (`released.json`), so that a plan needs nothing of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from emo_select.checkpoint import Checkpoint, TensorInfo, here, is_whole, open_checkpoint, read_config, split_revision
from emo_select.checkpoint.header import SAFETENSORS_DTYPE, tensor_bytes
from emo_select.errors import CheckpointError, ModelError
from emo_select.models.families import experts_per_layer, is_moe

Shape = tuple[int, ...]
EMO_TYPES = ("emo", "flex_olmo_noqknorm_prenorm")
DENSE_TYPE = "olmo2_noqknorm_prenorm"


class Outline(Checkpoint):
    """A checkpoint of which only the configuration is here: shapes and sizes, nothing to read."""

    has_weights = False

    def file(self, shard: str) -> int:
        """There is no file. Raises `ModelError`."""
        raise ModelError(f"The weights of {self.directory} are not on this machine.")


def config_of(model: str, data_dir: str | None = None) -> dict[str, Any] | None:
    """The model's configuration: its own, if it is on this machine, else the shipped one of a released model."""
    folder = here(model, data_dir)
    return read_config(folder) if folder is not None else released(split_revision(model)[0])


def experts_of(model: str, data_dir: str | None = None) -> int | None:
    """Experts of a full layer, shared ones included; None of a dense model, or of one that is not known here."""
    config = config_of(model, data_dir)
    return max(experts_per_layer(config)) if config is not None and is_moe(config) else None


def open_or_outline(model: str, data_dir: str | None = None) -> Checkpoint | None:
    """The checkpoint if it is on this machine, else its shapes; None where neither is known. Downloads nothing."""
    folder = here(model, data_dir)
    if folder is not None and is_whole(folder):
        return open_checkpoint(folder)
    config = read_config(folder) if folder is not None else released(split_revision(model)[0])
    return None if config is None else outline(config, Path(model))


def outline(config: dict[str, Any], name: Path) -> Outline:
    """The tensors that a checkpoint of this configuration has.

    Raises:
        ModelError, CheckpointError: the configuration cannot be built.
    """
    stored = SAFETENSORS_DTYPE.get(str(config.get("dtype") or config.get("torch_dtype") or "float32"), "F32")
    tensors = {tensor: TensorInfo(stored, shape, "", 0, tensor_bytes(stored, shape))
               for tensor, shape in _shapes(config)}
    return Outline(name, config, tensors)


def released(name: str) -> dict[str, Any] | None:
    """The configuration of a released model, as far as shapes and routing depend on it."""
    known = _released()
    shape = known["models"].get(name)
    return None if shape is None else dict(known["shapes"][shape])


@cache
def _released() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path(__file__).with_name("released.json").read_text(encoding="utf-8"))
    return found


def _shapes(config: dict[str, Any]) -> Iterator[tuple[str, Shape]]:
    native = config.get("model_type") in (*EMO_TYPES, DENSE_TYPE)
    if native and not config.get("attention_bias") and not config.get("dense_mlp_bias"):
        try:
            yield from _native(config)
        except KeyError as error:
            raise CheckpointError(f"config.json does not say {error.args[0]}.") from None
        return
    from emo_select.models.loading import tensors_of  # builds the model without memory, which takes torch

    yield from tensors_of(config)


def _native(config: dict[str, Any]) -> Iterator[tuple[str, Shape]]:
    """Tensors of the two published architectures."""
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    yield "model.embed_tokens.weight", (vocabulary, hidden)
    counts = experts_per_layer(config) if config["model_type"] in EMO_TYPES else [0] * config["num_hidden_layers"]
    for layer, experts in enumerate(counts):
        for name, shape in (*_attention(config), *_feed_forward(config, experts)):
            yield f"model.layers.{layer}.{name}", shape
    yield "model.norm.weight", (hidden,)
    if not config.get("tie_word_embeddings"):
        yield "lm_head.weight", (vocabulary, hidden)


def _attention(config: dict[str, Any]) -> Sequence[tuple[str, Shape]]:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    size = config.get("head_dim") or hidden // heads
    values = (config.get("num_key_value_heads") or heads) * size
    return [("self_attn.q_proj.weight", (heads * size, hidden)), ("self_attn.k_proj.weight", (values, hidden)),
            ("self_attn.v_proj.weight", (values, hidden)), ("self_attn.o_proj.weight", (hidden, heads * size)),
            ("pre_attention_layernorm.weight", (hidden,)), ("pre_feedforward_layernorm.weight", (hidden,))]


def _feed_forward(config: dict[str, Any], experts: int) -> Iterator[tuple[str, Shape]]:
    hidden = config["hidden_size"]
    if not experts:
        is_moe_model = config["model_type"] in EMO_TYPES
        yield from _swiglu("mlp", hidden, config["dense_intermediate_size" if is_moe_model else "intermediate_size"])
        return
    yield "mlp.gate.weight", (experts, hidden)
    for expert in range(experts):
        yield from _swiglu(f"mlp.experts.{expert}", hidden, config["intermediate_size"])


def _swiglu(prefix: str, hidden: int, width: int) -> Sequence[tuple[str, Shape]]:
    return [(f"{prefix}.gate_proj.weight", (width, hidden)), (f"{prefix}.up_proj.weight", (width, hidden)),
            (f"{prefix}.down_proj.weight", (hidden, width))]
