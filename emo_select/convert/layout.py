"""Which tensors of a released checkpoint make up which tensor of a training checkpoint, and how.

Names, shapes and transpositions are those of the published converter (facts of its layout: docs/convert.md).
Shapes: V tokens, D hidden, E experts, I width of an expert.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from emo_select.convert.experiment import Layer, TrainingModel

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Form = Literal["same", "flat", "rows", "transposed"]
PREFIX = "model."  # of weights among the names of a training checkpoint


@dataclass(frozen=True)
class Group:
    """One training tensor and its released tensors, all of the shape `part`.

    `form` says how they hang together: "same"; "flat", the training's is flattened; "rows", they are its consecutive
    blocks of rows; "transposed", they are these blocks transposed.
    """

    training: str
    released: tuple[str, ...]
    shape: tuple[int, ...]
    part: tuple[int, ...]
    form: Form = "same"
    vocabulary: bool = False  # rows are tokens

    @property
    def stored(self) -> str:
        """Its name in a training checkpoint."""
        return PREFIX + self.training


def groups(model: TrainingModel) -> Iterator[Group]:
    """Every tensor of the model, in the order of the training's modules."""
    table, norm = (model.vocabulary, model.hidden), (model.hidden,)
    yield Group("embeddings.weight", ("model.embed_tokens.weight",), table, table, vocabulary=True)
    for index, layer in enumerate(model.layers):
        yield from _block(model, index, layer)
    yield Group("lm_head.norm.weight", ("model.norm.weight",), norm, norm)
    yield Group("lm_head.w_out.weight", ("lm_head.weight",), table, table, vocabulary=True)


def _block(model: TrainingModel, index: int, layer: Layer) -> Iterator[Group]:
    block, released = f"blocks.{index}", f"model.layers.{index}"
    hidden, kv = model.hidden, model.hidden // model.heads * model.kv_heads
    for ours, theirs, rows in (("w_q", "q_proj", hidden), ("w_k", "k_proj", kv), ("w_v", "v_proj", kv),
                               ("w_out", "o_proj", hidden)):
        yield _same(f"{block}.attention.{ours}.weight", f"{released}.self_attn.{theirs}.weight", (rows, hidden))
    yield _same(f"{block}.attention_norm.weight", f"{released}.pre_attention_layernorm.weight", (hidden,))
    yield from (_experts if layer.experts else _dense)(model, layer, block, released)
    yield _same(f"{block}.feed_forward_norm.weight", f"{released}.pre_feedforward_layernorm.weight", (hidden,))


def _same(training: str, released: str, shape: tuple[int, ...]) -> Group:
    return Group(training, (released,), shape, shape)


def _dense(model: TrainingModel, layer: Layer, block: str, released: str) -> Iterator[Group]:
    for ours, theirs, shape in (("w1", "gate_proj", (layer.width, model.hidden)),
                                ("w2", "down_proj", (model.hidden, layer.width)),
                                ("w3", "up_proj", (layer.width, model.hidden))):
        yield _same(f"{block}.feed_forward.{ours}.weight", f"{released}.mlp.{theirs}.weight", shape)
        if layer.bias:
            yield _same(f"{block}.feed_forward.{ours}.bias", f"{released}.mlp.{theirs}.bias", shape[:1])


def _experts(model: TrainingModel, layer: Layer, block: str, released: str) -> Iterator[Group]:
    count, width, hidden = layer.experts, layer.width, model.hidden
    router = (count, hidden)
    yield Group(f"{block}.feed_forward_moe.router.weight", (f"{released}.mlp.gate.weight",), (count * hidden,), router,
                "flat")
    stored: tuple[Form, tuple[int, int]] = (
        ("rows", (count * width, hidden)) if layer.dropless else ("transposed", (count * hidden, width)))
    for ours, theirs, (form, shape), part in (
            ("w1", "gate_proj", stored, (width, hidden)), ("w3", "up_proj", stored, (width, hidden)),
            ("w2", "down_proj", ("transposed", (count * width, hidden)), (hidden, width))):
        names = tuple(f"{released}.mlp.experts.{expert}.{theirs}.weight" for expert in range(count))
        yield Group(f"{block}.feed_forward_moe.experts.mlp.{ours}", names, shape, part, form)


def split(group: Group, tensor: Tensor) -> Iterator[Tensor]:
    """The released tensors of a training tensor, in the order of their names; views where that is possible."""
    if group.form in ("same", "flat"):
        yield tensor.view(group.part)
        return
    for block in tensor.view(len(group.released), -1, group.shape[1]):
        yield block if group.form == "rows" else block.T


def join(group: Group, tensors: Iterable[Tensor], dtype: torch.dtype) -> Tensor:
    """The training tensor of released tensors that come in the order of their names; the inverse of `split`.

    A table of tokens may have more rows than what comes: the others are zero.
    """
    import torch

    whole = torch.zeros(group.shape, dtype=dtype) if group.vocabulary else torch.empty(group.shape, dtype=dtype)
    if group.form in ("rows", "transposed"):
        for block, tensor in zip(whole.view(len(group.released), -1, group.shape[1]), tensors, strict=True):
            block.copy_(tensor if group.form == "rows" else tensor.T)
        return whole
    for tensor in tensors:
        whole.view(group.part)[:len(tensor)].copy_(tensor)
    return whole
