"""Whether layers run one at a time give what the whole model gives, tried on a small copy of the architecture.

The copy has random weights and every kind of layer that the model has. transformers runs it whole; `layers.py` runs it
layer by layer, from the states that transformers had there. A kind of layer whose halves give the same is split; other
kinds run whole. Where even that differs, nothing that we could select would mean anything, so the model is refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from emo_select.errors import EmoSelectError, ModelError
from emo_select.experts.batches import Batch, pack
from emo_select.experts.frame import Texts, first_of
from emo_select.experts.kinds import Kinds, LayerKind, kind_of, mixers_of, returned
from emo_select.experts.layers import Embedded, Skeleton
from emo_select.experts.prefixes import Segment
from emo_select.experts.routers import choice
from emo_select.experts.stream import Reader
from emo_select.models.conversion import built_config, meta_model
from emo_select.models.families import Family, experts_per_layer, family_of
from emo_select.models.memory import ModelInMemory
from emo_select.models.tiny import SMALL, every_key, tiny_config

TOLERANCE = 1e-4  # of the largest value; halves that are not independent differ by a tenth
LENGTHS = (11, 6, 6, 3)  # of the texts: above the small copy's windows, of equal length, and padded
PREFIX, CONTINUED = 4, (4, 3)  # a shared prefix and what continues it, within the windows
FAILURES = (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError, AssertionError,
            NotImplementedError, EmoSelectError)


@dataclass(frozen=True)
class Probe:
    """What the small copy showed.

    `kinds`: of layers, by `kind_of`. `shares_prefixes`: whether tokens of several texts can stand in one row, behind a
    prefix that they share, with a mask between them.
    """

    kinds: Kinds
    shares_prefixes: bool


def probe(config: Mapping[str, Any]) -> Probe:
    """Try a configuration out; once per process and architecture.

    Raises:
        ModelError: layers one at a time do not give what the model gives.
    """
    return _probe(json.dumps(config, sort_keys=True, default=str))


@lru_cache(maxsize=64)
def _probe(content: str) -> Probe:
    config = text_part(json.loads(content))
    model = small_copy(config)
    family = family_of(config)
    seen = _Seen(model, family)
    texts = seen.texts(LENGTHS)
    expected = [seen.run(segment.tokens) for segment in texts]
    checkpoint = ModelInMemory(model)
    names = [kind_of(layer) for layer in model.get_submodule(family.layers)]
    whole = _Trial(checkpoint, texts, seen.kinds)
    wrong = whole.first(expected) or next(filter(None, (whole.layer(i, expected) for i in range(len(names)))), None)
    if wrong is not None:
        raise ModelError(f"A small copy of this {config['model_type']} model gives other numbers layer by layer than "
                         f"whole ({wrong}), so its experts cannot be selected; docs/families.md says what to do.")
    split = _Trial(checkpoint, texts, {name: replace(kind, split=True) for name, kind in seen.kinds.items()})
    apart = {name for index, name in enumerate(names) if split.layer(index, expected) is not None}
    kinds = {name: replace(kind, split=name not in apart) for name, kind in seen.kinds.items()}
    return Probe(kinds, _shares_prefixes(seen, checkpoint, kinds))


def small_copy(config: Mapping[str, Any]) -> Any:
    """A random model with every kind of layer that a configuration has, in evaluation mode, on the CPU.

    Raises:
        ModelError: it cannot be built.
    """
    large = meta_model(built_config(config)).eval()
    if sum(parameter.numel() for parameter in large.parameters()) > SMALL:
        kinds = [kind_of(layer) for layer in large.get_submodule(family_of(config).layers)]
        # a layer behind another one shows whether it takes more from there than hidden states
        config = tiny_config(config, 1 + max((kinds[1:].index(kind) + 1 for kind in kinds[1:]), default=0))
    built = built_config(every_key(config, max(LENGTHS)))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            model = type(large)(built).eval()
        except FAILURES as error:
            raise ModelError(f"No small copy of this {config['model_type']} model can be built to try it out "
                             f"({error}); docs/families.md says what to do.") from error
        with torch.no_grad():
            for name, tensor in model.state_dict().items():
                if tensor.is_floating_point():  # norms around one, as the neutral element would hide a missing norm
                    tensor.normal_(mean=1.0 if "norm" in name else 0.0, std=0.3)
    return model


def text_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The language model's part of a multimodal configuration, if transformers has a model for it alone."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    inner = config.get("text_config")
    alone = isinstance(inner, dict) and inner.get("model_type") in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return inner if alone and isinstance(inner, dict) else config


class _Text:
    """What the whole model computed of one text: per layer its input and output (S, width) and dense gates (S, E)."""

    def __init__(self, layers: int) -> None:
        self.inputs: list[Tensor] = [torch.empty(0)] * layers
        self.outputs: list[Tensor] = [torch.empty(0)] * layers
        self.gates: list[Tensor | None] = [None] * layers

    def cut(self, rows: slice) -> _Text:
        """Some of the tokens."""
        found = _Text(len(self.inputs))
        found.inputs, found.outputs = [x[rows] for x in self.inputs], [x[rows] for x in self.outputs]
        found.gates = [None if gates is None else gates[rows] for gates in self.gates]
        return found


class _Seen:
    """The whole model, which notes what its layers are given and give."""

    def __init__(self, model: Any, family: Family) -> None:
        self._model, self._family = model, family
        self._layers: Any = model.get_submodule(family.layers)
        self._experts = experts_per_layer(json.loads(model.config.to_json_string(use_diff=False)))
        self.kinds: dict[str, LayerKind] = {}
        self._text, self._router_said = _Text(0), None

    @torch.no_grad()
    def texts(self, lengths: Sequence[int]) -> list[Segment]:
        """Texts of random tokens that the model knows, the special ones at the front of many vocabularies left out."""
        known = min(40, self._model.get_input_embeddings().num_embeddings)
        draw = torch.Generator().manual_seed(1)
        return [Segment(torch.randint(min(3, known - 1), known, (length,), generator=draw).numpy(), ((0, 1),))
                for length in lengths]

    def run(self, ids: Any) -> _Text:
        """What it computes of a text."""
        self._text = _Text(len(self._layers))
        hooks = [hook for index, layer in enumerate(self._layers) for hook in self._attach(index, layer)]
        try:
            self._model(input_ids=torch.from_numpy(ids)[None], use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        return self._text

    def _attach(self, index: int, layer: nn.Module) -> list[Any]:
        family, arity = self._family, dict[str, int]()

        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            self._text.inputs[index] = (args[0] if args else kwargs["hidden_states"])[0].flatten(1).clone()

        def after(module: nn.Module, args: Any, output: Any) -> None:
            self._text.outputs[index] = first_of(output)[0].flatten(1).clone()
            mixers = {name: arity[name] for name in mixers_of(layer) if name in arity}
            self.kinds[kind_of(layer)] = LayerKind(returned(output), arity.get(family.moe_module, 0), mixers)

        def note(name: str) -> Callable[..., None]:
            return lambda module, args, output: arity.update({name: returned(output)})

        def asked(module: nn.Module, args: Any, output: Any) -> None:
            self._router_said = output

        def chosen(module: nn.Module, args: Any) -> None:
            self._text.gates[index] = dense(*choice(self._router_said, *args), self._experts[index])

        hooks = [layer.register_forward_pre_hook(before, with_kwargs=True), layer.register_forward_hook(after)]
        parts = [name for name in (*mixers_of(layer), family.moe_module) if name and has(layer, name)]
        hooks += [layer.get_submodule(name).register_forward_hook(note(name)) for name in parts]
        if self._experts[index]:
            hooks += [layer.get_submodule(family.router_module).register_forward_hook(asked),
                      layer.get_submodule(family.experts_module).register_forward_pre_hook(chosen)]
        return hooks


class _Trial:
    """The same texts layer by layer, each layer from the states that the whole model had there."""

    def __init__(self, checkpoint: ModelInMemory, segments: Sequence[Segment], kinds: Kinds) -> None:
        self._reader = Reader(checkpoint, torch.device("cpu"), torch.float32)
        self._skeleton = Skeleton(self._reader, kinds)
        self._skeleton.take(Texts(segments))
        self._segments, self._batches = segments, pack(segments, 2 * LENGTHS[0])
        self._experts = experts_per_layer(checkpoint.config)

    def first(self, expected: Sequence[_Text]) -> str | None:
        """What is wrong before the first layer, if anything."""
        for batch in self._batches:
            apart = _apart(Embedded(self._skeleton).read(batch), _packed(batch, [text.inputs[0] for text in expected]))
            if apart is not None:
                return f"the embedding: {apart}"
        return None

    def layer(self, index: int, expected: Sequence[_Text]) -> str | None:
        """What is wrong with a layer, if anything."""
        try:
            with torch.inference_mode():
                return self._layer(index, expected)
        except FAILURES as error:
            return f"layer {index}: {type(error).__name__}: {' '.join(str(error).split())[:200]}"

    def _layer(self, index: int, expected: Sequence[_Text]) -> str | None:
        count, shell = self._experts[index], self._reader.read_shell(index)
        weights = self._reader.read_experts(index, range(count)) if count else {}
        front, back = self._skeleton.front(shell), self._skeleton.back(shell, weights)
        for batch in self._batches:
            states = _packed(batch, [text.inputs[index] for text in expected])
            between = front(batch, states)
            if count:
                routing = front.route(batch)
                gates = _packed(batch, [text.gates[index] for text in expected])
                apart = _apart(dense(routing.gates, routing.index, count), gates)
                if apart is not None:
                    return f"the routing of layer {index}: {apart}"
            apart = _apart(back(batch, between), _packed(batch, [text.outputs[index] for text in expected]))
            if apart is not None:
                return f"layer {index}: {apart}"
        return None


def _shares_prefixes(seen: _Seen, checkpoint: ModelInMemory, kinds: Kinds) -> bool:
    """Whether texts behind one prefix can be run as tokens of one row."""
    texts = seen.texts((PREFIX, *CONTINUED))
    prefix = replace(texts[0], weights=((0, len(CONTINUED)),))
    segments = [prefix, *(replace(text, parent=0) for text in texts[1:])]
    whole = [seen.run(prefix.tokens), *(seen.run(_joined(prefix, text)).cut(slice(PREFIX, None)) for text in texts[1:])]
    trial = _Trial(checkpoint, segments, kinds)
    return all(trial.layer(index, whole) is None for index in range(len(whole[0].inputs)))


def dense(gates: Tensor, index: Tensor, experts: int) -> Tensor:
    """Gates of the chosen experts (T, K) → of all experts (T, E); chosen ones beyond E are left out."""
    found = gates.new_zeros(len(index), experts + 1, dtype=torch.float32)
    return found.scatter_(1, index.clamp(max=experts), gates.float())[:, :experts]


def has(layer: nn.Module, name: str) -> bool:
    """Whether a layer has a submodule of that name."""
    return any(found == name for found, _ in layer.named_modules())


def _apart(found: Tensor, expected: Tensor) -> str | None:
    if found.shape != expected.shape:
        return f"shape {list(found.shape)} in place of {list(expected.shape)}"
    found, expected = found.detach(), expected.detach()
    worst = float((found - expected).abs().max()) / max(float(expected.abs().max()), 1e-6)
    return None if worst <= TOLERANCE else f"{worst:.0e} apart"


def _packed(batch: Batch, by_segment: Sequence[Any]) -> Tensor:
    return torch.cat([by_segment[number] for number in batch.segments])


def _joined(a: Segment, b: Segment) -> Any:
    return np.concatenate([a.tokens, b.tokens])
