"""EMO as a GGUF file that llama.cpp runs with operations it has: as its `glm4moe`, which computes the very same.

That graph is x + attention(norm(x)), then x + routed(norm(x)) + shared(norm(x)), with optional query/key norms (EMO
has none), rotary embeddings in halves, a softmax over the routed experts whose top-k is or is not renormalised, and a
bias that is added for the choice of experts only. So one shared expert, whose softmax over itself is 1, is its shared
expert; without one a shared expert of zeros is written. Always-active experts get a bias above every probability. What
cannot be expressed is refused: several shared experts (their softmax has no place), layers of different size, dense
layers behind others, biases, scaled rotary embeddings.

Shapes: E experts of a layer (R routed), D hidden, I width of an expert, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, cast, get_args

from emo_select.checkpoint import Checkpoint, open_checkpoint
from emo_select.checkpoint.card import CARD, front_matter
from emo_select.convert.hf import cast as in_dtype
from emo_select.errors import ModelError, UsageError
from emo_select.export.vocabulary import Vocabulary, read_vocabulary
from emo_select.faults import translated
from emo_select.models.preflight import check_weights
from emo_select.progress import track
from emo_select.spec import digest
from emo_select.storage import output_directory

if TYPE_CHECKING:
    from torch import Tensor

    from emo_select.models import EmoConfig

Stored = Literal["f32", "f16", "bf16", "q8_0"]
ARCHITECTURE = "glm4moe"
FILE = "model.gguf"
OLDEST_GGUF = (0, 18)
KINDS = ("emo", "flex_olmo_noqknorm_prenorm")
AS_STORED: dict[str, Stored] = {"F32": "f32", "F16": "f16", "BF16": "bf16"}
TYPES = {"f32": ("F32", "ALL_F32", "float32"), "f16": ("F16", "MOSTLY_F16", "float16"),
         "bf16": ("BF16", "MOSTLY_BF16", "bfloat16"), "q8_0": ("Q8_0", "MOSTLY_Q8_0", "float32")}  # in gguf, in torch
BLOCK, BLOCK_BYTES = 32, 34  # q8_0: values of a row that share a scale
ALIGNMENT = 32
ALWAYS = 2.0  # added to probabilities, which are at most 1
LAYER_NAMES = {"pre_attention_layernorm": "attn_norm", "pre_feedforward_layernorm": "post_attention_norm",
               "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
               "self_attn.o_proj": "attn_output"}
MATRICES = ("gate", "up", "down")  # of a SwiGLU


@dataclass(frozen=True)
class Entry:
    """A tensor of the file: its values come in pieces, joined along a new or the first axis."""

    name: str
    shape: tuple[int, ...]
    stored: Stored
    pieces: Callable[[Checkpoint], Iterator[Tensor]]

    @property
    def bytes(self) -> int:
        """Bytes in the file, without the padding."""
        values = math.prod(self.shape)
        return values // BLOCK * BLOCK_BYTES if self.stored == "q8_0" else values * (4 if self.stored == "f32" else 2)


@dataclass(frozen=True)
class GgufPlan:
    """All that will be written, decided from headers and configuration alone."""

    source: Path
    fingerprint: str
    config: EmoConfig
    entries: tuple[Entry, ...]
    stored: Stored
    vocabulary: Vocabulary

    @property
    def bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.bytes for entry in self.entries)


@translated()
def export_gguf(model: str | Path, out: Path, *, dtype: str = "auto", tokenizer_pre: str | None = None) -> GgufPlan:
    """Write `out`/model.gguf; the folder appears by rename. Needs the package gguf and the memory of one tensor.

    `dtype` is auto (as stored), f32, f16, bf16 or q8_0; norms and routers stay f32. `tokenizer_pre` is llama.cpp's name
    for how texts are split, where tokenizer.json does not tell.

    Raises:
        ModelError: llama.cpp has no operation for what this model or its tokenizer does. UsageError: gguf is not
        installed, or the dtype is none of these.
    """
    plan = plan_gguf(model, dtype=dtype, tokenizer_pre=tokenizer_pre)
    require_gguf()
    key = digest([plan.fingerprint, plan.stored, plan.vocabulary.pre])
    with output_directory(out, key, "GGUF file", plan.bytes, [plan.source]) as folder:
        _write(plan, folder / FILE)
    return plan


def plan_gguf(model: str | Path, *, dtype: str = "auto", tokenizer_pre: str | None = None,
              download: bool = True) -> GgufPlan:
    """Check everything that can be checked without reading a tensor, and decide what will be written."""
    with open_checkpoint(str(model), download=download) as checkpoint:
        config = _expressible(checkpoint.config)
        stored = _stored(checkpoint, dtype)
        vocabulary = read_vocabulary(checkpoint.directory, config.vocab_size, tokenizer_pre)
        check_weights(checkpoint)
        return GgufPlan(checkpoint.directory, checkpoint.fingerprint, config, tuple(_entries(config, stored)), stored,
                        vocabulary)


def _stored(checkpoint: Checkpoint, dtype: str) -> Stored:
    if dtype == "auto":
        return AS_STORED[checkpoint.info("model.embed_tokens.weight").dtype]
    for known in get_args(Stored):
        if dtype == known:
            return cast(Stored, known)
    raise UsageError(f"A GGUF file cannot be written as {dtype!r}; choose auto, {', '.join(get_args(Stored))}.")


def require_gguf() -> None:
    """Raise `UsageError` where the package that writes the format is missing or too old."""
    try:
        found = version("gguf")
    except PackageNotFoundError:
        raise UsageError("Writing GGUF files needs the package gguf: pip install 'emo-select[gguf]'.") from None
    if tuple(map(int, found.split(".")[:2])) < OLDEST_GGUF:
        oldest = ".".join(map(str, OLDEST_GGUF))
        raise UsageError(f"gguf {found} is too old; {oldest} or later is needed: pip install -U gguf.")


def _expressible(values: Mapping[str, Any]) -> EmoConfig:
    """The configuration, if llama.cpp has every operation that it asks for."""
    from emo_select.models import EmoConfig

    kind = values.get("model_type")
    if kind not in KINDS:
        raise ModelError(f"Only EMO is exported here; {kind} is for llama.cpp's own convert_hf_to_gguf.py, if it knows "
                         "that.")
    config: EmoConfig = EmoConfig.from_dict(dict(values))
    config.check_experts()
    if reason := next(_obstacles(config), None):
        raise ModelError(f"llama.cpp cannot run this model: {reason}.")
    return config


def _obstacles(config: EmoConfig) -> Iterator[str]:
    """Why llama.cpp's graph is not this model."""
    sparse = config.moe_layers()
    if not sparse:
        yield "it has no layer with experts"
        return
    shapes = {(config.experts_in(layer), config.shared_in(layer), len(config.always_active_in(layer)))
              for layer in sparse}
    experts, shared, active = max(shapes)
    if len(shapes) > 1:
        yield "its layers have different numbers of experts"
    if sparse != list(range(sparse[0], config.num_hidden_layers)):
        yield "a layer without experts follows one that has some"
    if shared > 1 and not active:
        yield (f"its {shared} shared experts are weighted by a softmax of their own, and llama.cpp adds shared experts "
               "as they are")
    if not active and min(config.num_experts_per_tok, experts) == shared:
        yield "its tokens use shared experts only"
    if config.attention_bias or (config.dense_mlp_bias and len(sparse) < config.num_hidden_layers):
        yield "it has biases that llama.cpp's layers do not have"
    if (config.rope_parameters or {}).get("rope_type", "default") != "default":
        yield "its rotary embeddings are scaled"
    if config.hidden_act != "silu":
        yield f"its activation is {config.hidden_act}, not silu"


def _routed(config: EmoConfig) -> tuple[int, int]:
    """Experts that llama.cpp routes among, and how many a token uses. With always-active ones EMO shares none."""
    layer = config.moe_layers()[0]
    shared = 0 if config.always_active_in(layer) else config.shared_in(layer)
    experts = config.experts_in(layer)
    return experts - shared, min(config.num_experts_per_tok, experts) - shared


def _entries(config: EmoConfig, stored: Stored) -> Iterator[Entry]:
    hidden, vocabulary = config.hidden_size, config.vocab_size
    yield _matrix("token_embd", "model.embed_tokens", (vocabulary, hidden), stored)
    for layer in range(config.num_hidden_layers):
        yield from _attention(config, layer, stored)
        yield from _experts(config, layer, stored) if config.experts_in(layer) else _dense(config, layer, stored)
    yield _matrix("output_norm", "model.norm", (hidden,), stored)
    if not config.tie_word_embeddings:
        yield _matrix("output", "lm_head", (vocabulary, hidden), stored)


def _attention(config: EmoConfig, layer: int, stored: Stored) -> Iterator[Entry]:
    hidden, heads = config.hidden_size, config.num_attention_heads
    narrow = hidden // heads * (config.num_key_value_heads or heads)
    for ours, theirs in LAYER_NAMES.items():
        shape = (narrow if theirs in ("attn_k", "attn_v") else hidden, hidden)
        yield _matrix(f"blk.{layer}.{theirs}", f"model.layers.{layer}.{ours}",
                      (hidden,) if theirs.endswith("norm") else shape, stored)


def _dense(config: EmoConfig, layer: int, stored: Stored) -> Iterator[Entry]:
    width, hidden = config.dense_intermediate_size or 0, config.hidden_size
    for name in MATRICES:
        shape = (hidden, width) if name == "down" else (width, hidden)
        yield _matrix(f"blk.{layer}.ffn_{name}", f"model.layers.{layer}.mlp.{name}_proj", shape, stored)


def _experts(config: EmoConfig, layer: int, stored: Stored) -> Iterator[Entry]:
    import torch

    routed, _ = _routed(config)
    hidden, width = config.hidden_size, config.intermediate_size
    here, at = f"blk.{layer}", f"model.layers.{layer}.mlp"
    yield Entry(f"{here}.ffn_gate_inp.weight", (routed, hidden), "f32", _rows(f"{at}.gate.weight", range(routed)))
    bias = torch.zeros(routed)
    bias[config.always_active_in(layer)] = ALWAYS
    yield Entry(f"{here}.exp_probs_b.bias", (routed,), "f32", _constant(bias))
    for name in MATRICES:
        shape = (hidden, width) if name == "down" else (width, hidden)
        of = [f"{at}.experts.{expert}.{name}_proj.weight" for expert in range(config.experts_in(layer))]
        kind = _type_of(shape, stored)
        yield Entry(f"{here}.ffn_{name}_exps.weight", (routed, *shape), kind, _several(of[:routed]))
        shared = _several(of[routed:]) if of[routed:] else _constant(torch.zeros(shape))
        yield Entry(f"{here}.ffn_{name}_shexp.weight", shape, kind, shared)


def _matrix(theirs: str, ours: str, shape: tuple[int, ...], stored: Stored) -> Entry:
    return Entry(f"{theirs}.weight", shape, _type_of(shape, stored), _several([f"{ours}.weight"]))


def _type_of(shape: tuple[int, ...], stored: Stored) -> Stored:
    """Norms are kept exactly, and rows that do not split into blocks in half precision, as llama.cpp's tools do."""
    if len(shape) == 1:
        return "f32"
    return "f16" if stored == "q8_0" and shape[-1] % BLOCK else stored


def _several(names: list[str]) -> Callable[[Checkpoint], Iterator[Tensor]]:
    return lambda checkpoint: (checkpoint.read(name) for name in names)


def _rows(name: str, rows: range) -> Callable[[Checkpoint], Iterator[Tensor]]:
    return lambda checkpoint: iter([checkpoint.read(name, rows)])


def _constant(value: Tensor) -> Callable[[Checkpoint], Iterator[Tensor]]:
    return lambda checkpoint: iter([value])


def _write(plan: GgufPlan, path: Path) -> None:
    _write_head(plan, path)
    with (open_checkpoint(plan.source) as checkpoint, path.open("ab") as file,
          track("Writing (GB)", plan.bytes / 1e9) as bar):
        _pad(file)
        for entry in plan.entries:
            for piece in entry.pieces(checkpoint):
                file.write(_encoded(entry, piece))
            _pad(file)
            bar.advance(entry.bytes / 1e9, entry.name)


def _pad(file: BinaryIO) -> None:
    file.write(bytes(-file.tell() % ALIGNMENT))


def _encoded(entry: Entry, values: Tensor) -> memoryview:
    """The bytes of a piece in the type of its tensor."""
    import torch
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    changed = in_dtype(entry.name, values, TYPES[entry.stored][2]).contiguous()
    if entry.stored == "q8_0":
        return memoryview(quantize(changed.numpy(), GGMLQuantizationType.Q8_0)).cast("B")
    return changed.view(-1).view(torch.uint8).numpy().data


def _write_head(plan: GgufPlan, path: Path) -> None:
    """Everything before the values: what the model is, its tokenizer, and the list of tensors."""
    import numpy
    from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType

    writer = GGUFWriter(path, ARCHITECTURE)
    writer.add_type("model")
    writer.add_file_type(LlamaFileType[TYPES[plan.stored][1]])
    writer.add_quantization_version(2)
    _describe(plan, writer)
    plan.vocabulary.add_to(writer)
    for entry in plan.entries:
        writer.add_tensor_info(entry.name, entry.shape, numpy.dtype("float32"), entry.bytes,
                               GGMLQuantizationType[TYPES[entry.stored][0]])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()


def _describe(plan: GgufPlan, writer: Any) -> None:
    from gguf import ExpertGatingFuncType

    config, above = plan.config, front_matter(plan.source / CARD)
    routed, used = _routed(config)
    head, first = config.hidden_size // config.num_attention_heads, config.moe_layers()[0]
    writer.add_name(plan.source.name)
    if isinstance(above.get("license"), str):
        writer.add_license(above["license"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.dense_intermediate_size or config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads or config.num_attention_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(float((config.rope_parameters or {})["rope_theta"]))
    writer.add_leading_dense_block_count(first)
    writer.add_expert_count(routed)
    writer.add_expert_used_count(used)
    writer.add_expert_shared_count(1)
    writer.add_expert_feed_forward_length(config.intermediate_size)
    writer.add_expert_weights_norm(bool(config.norm_topk_prob))
    writer.add_expert_gating_func(ExpertGatingFuncType.SOFTMAX)
