"""A checkpoint's configuration against all of its weights, from headers alone and without torch.

Select, prune, finetune and evaluate take hours; that a size does not fit is found here, before the first of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from emo_select.checkpoint import Checkpoint
from emo_select.checkpoint.header import TensorInfo
from emo_select.errors import CheckpointError
from emo_select.models.families import (
    DENSE_TYPES,
    FLOATING,
    Family,
    check_layout,
    experts_per_layer,
    family_of,
    is_moe,
    model_parameters,
    tensors_of_layer,
    top_k,
)

Shape = tuple[int | None, ...]  # None: not said in config.json
SIZES = ("hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size")
WIDTHS = ("intermediate_size", "moe_intermediate_size")
EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"


def check_weights(checkpoint: Checkpoint) -> None:
    """Compare config.json with the name, shape and type of every weight that it determines.

    Architectures that are neither a supported mixture nor one of the dense ones are left to transformers.

    Raises:
        ModelError: not supported. CheckpointError: names the first tensor or key that does not fit.
    """
    checkpoint = checkpoint.plain()
    family = check_layout(checkpoint) if is_moe(checkpoint.config) else None
    if family is not None:
        _check_top_k(checkpoint, family)
    if family is not None and family.kind_of:
        _check_derived(checkpoint, family)
    elif family is not None or checkpoint.config.get("model_type") in DENSE_TYPES:
        _check_written(checkpoint, family)


def _check_written(checkpoint: Checkpoint, family: Family | None) -> None:
    """Our own architectures and plain dense ones, by what their configuration says."""
    config, shapes = checkpoint.config, dict(_attention(checkpoint.config))
    _check_presence(checkpoint, SIZES, WIDTHS)
    _check_layers(checkpoint)
    _check_alike(checkpoint)
    for name, info in checkpoint.tensors.items():
        expected = _whole_model(config).get(name) or _in_layer(config, family, shapes, name)
        if expected is not None:
            _check_tensor(checkpoint, name, info, expected)


def _check_derived(checkpoint: Checkpoint, family: Family) -> None:
    """Every tensor of the decoder as the architecture has it, by the shapes that were found out with the family."""
    _check_presence(checkpoint, [key for key in SIZES if key in family.defaults and not family.section], ())
    expected = dict(family.whole)
    for layer, kind in enumerate(family.kind_of):
        for name, shape in tensors_of_layer(checkpoint, family, layer, family.kinds[kind]):
            expected[name] = shape
    needed = expected.keys() - family.whole.keys() | {
        name for source in model_parameters(checkpoint) for name in source.names}
    needed |= {name for name in family.whole if name.startswith("lm_head.") and family.disk_layers[0] == family.layers}
    for name in sorted(needed - checkpoint.tensors.keys()):
        raise CheckpointError(f"{checkpoint.directory} has no tensor {name}, which its config.json needs; download "
                              "or save it again.")
    for name, shape in expected.items():
        if name in checkpoint.tensors:
            _check_tensor(checkpoint, name, checkpoint.tensors[name], shape)


def _check_presence(checkpoint: Checkpoint, sizes: Sequence[str], widths: Sequence[str]) -> None:
    """Sizes that every architecture would fill in by a default of its own, which need not be this model's."""
    config = checkpoint.config
    lacking = [key for key in sizes if config.get(key) is None]
    if not lacking and widths and all(config.get(key) is None for key in widths):
        lacking = list(widths[:1])
    if lacking:
        raise CheckpointError(f"config.json of {checkpoint.directory} does not say {lacking[0]}; download or save it "
                              "again.")


def _check_top_k(checkpoint: Checkpoint, family: Family) -> None:
    counts, per_token = experts_per_layer(checkpoint.config), top_k(checkpoint.config)
    if per_token > max(counts):
        raise CheckpointError(f"config.json of {checkpoint.directory} has {per_token} experts per token "
                              f"({family.top_k_keys[0]}), but its layers have {max(counts)} experts.")


def _check_layers(checkpoint: Checkpoint) -> None:
    """Embedding, head, final norm, and as many layers as the configuration counts."""
    config = checkpoint.config
    count = config.get("num_hidden_layers")
    present = [layer for layer in checkpoint.layers if count is None or layer < count]
    if count is not None and len(present) != count:
        missing = next(layer for layer in range(count) if layer not in checkpoint.layers)
        raise CheckpointError(f"{checkpoint.directory} has no tensors of layer {missing}, but its config.json counts "
                              f"{count} layers.")
    for name in (EMBEDDING, NORM):
        checkpoint.info(name)
    if HEAD not in checkpoint.tensors and not config.get("tie_word_embeddings"):
        raise CheckpointError(f"{checkpoint.directory} has no {HEAD}, and its config.json does not say that the word "
                              "embeddings are used in its place (tie_word_embeddings).")


def _check_alike(checkpoint: Checkpoint) -> None:
    """Layers of one kind have the same tensors: what all others have, none may lack."""
    config = checkpoint.config
    counts = experts_per_layer(config) if is_moe(config) else []
    family = family_of(config) if is_moe(config) else None
    groups: dict[bool, dict[int, set[str]]] = {}
    for layer, names in checkpoint.layers.items():
        if layer < (config.get("num_hidden_layers") or len(checkpoint.layers)):
            plain = {name.split(".", 3)[3] for name in names if family is None or family.role(name).kind != "expert"}
            groups.setdefault(bool(counts and counts[layer]), {})[layer] = plain
    for layers in groups.values():
        seen = Counter(name for own in layers.values() for name in own)
        for layer, own in layers.items():
            lacking = sorted(name for name, count in seen.items() if count > len(layers) / 2 and name not in own)
            if lacking and "layer_types" not in config:
                raise CheckpointError(f"{checkpoint.directory} has no tensor model.layers.{layer}.{lacking[0]}, "
                                      "which its other layers have; download or save it again.")


def _check_tensor(checkpoint: Checkpoint, name: str, info: TensorInfo, expected: Shape) -> None:
    if info.dtype not in FLOATING:
        raise CheckpointError(f"{name} is stored as {info.dtype}; only floating-point weights can be used.")
    if len(expected) != len(info.shape) or any(size not in (None, found)
                                               for size, found in zip(expected, info.shape, strict=True)):
        shown = "[" + ", ".join("…" if size is None else str(size) for size in expected) + "]"
        raise CheckpointError(f"{name} in {checkpoint.directory} has shape {list(info.shape)}, but its config.json "
                              f"makes it {shown}.")


def _whole_model(config: Mapping[str, Any]) -> dict[str, Shape]:
    hidden, vocabulary = config.get("hidden_size"), config.get("vocab_size")
    return {EMBEDDING: (vocabulary, hidden), HEAD: (vocabulary, hidden), NORM: (hidden,)}


def _in_layer(config: Mapping[str, Any], family: Family | None, plain: Mapping[str, Shape], name: str) -> Shape | None:
    """The shape that the configuration gives a tensor of a layer; None where it is not determined here."""
    if not name.startswith("model.layers."):
        return None
    suffix = name.split(".", 3)[3]
    return plain[suffix] if suffix in plain else None if family is None else _expert(config, family, name)


def _attention(config: Mapping[str, Any]) -> Iterator[tuple[str, Shape]]:
    """Projections of plain attention. Attention over latent vectors names its own differently."""
    hidden, heads = config.get("hidden_size"), config.get("num_attention_heads")
    keys, width = config.get("num_key_value_heads") or heads, config.get("head_dim")
    if hidden is None or heads is None or config.get("kv_lora_rank") is not None:
        return
    width = width if width is not None else hidden // heads
    for name, count in (("q_proj", heads), ("k_proj", keys), ("v_proj", keys)):
        yield f"self_attn.{name}.weight", (count * width, hidden)
        yield f"self_attn.{name}.bias", (count * width,)
    yield "self_attn.o_proj.weight", (hidden, heads * width)


def _expert(config: Mapping[str, Any], family: Family, name: str) -> Shape | None:
    width = config.get("intermediate_size")
    role, hidden = family.role(name), config.get("hidden_size")
    if role.kind != "expert" or width is None:
        return None
    down = role.suffix.endswith("down_proj.weight")
    return (hidden, width) if down else (width, hidden)
