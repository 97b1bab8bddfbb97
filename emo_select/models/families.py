"""What the rest of the package asks of an architecture: where its experts are, in memory, on disk and in config.json.

A `Family` says this for one configuration. It is found out from transformers itself (`derive.py`) and remembered;
only what transformers does not know is written down here: our own architecture, and how the routers of the first
supported families score. docs/families.md says how it is found out and what happens where it cannot be.

- **On disk** a tensor of a layer belongs to one expert (`{e}` in its name), or has entries of every expert along one
  axis (`Rows`), or neither. Names are relative to a layer; the layers may lie below several prefixes.
- **In memory** experts are stacked on axis 0 of a few parameters (`Fused`). Which disk tensors a parameter is made of
  is what transformers' own conversion says.
- **In config.json** some keys count experts, others say how many a token uses; nested configurations have them in a
  section.

Nothing here imports torch before a family has to be found out or `read_parameter` is called.

Legend: L layer, E experts of a layer (shared ones included where the router lists them), e expert index.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, Literal

from emo_select.errors import CheckpointError, ModelError

if TYPE_CHECKING:
    import torch

    from emo_select.checkpoint import Checkpoint

Config = Mapping[str, Any]
Scoring = Literal["softmax", "sigmoid", "softmax_of_top_k", "recorded"]
NUMBERED = re.compile(r"(.+)\.(\d+)\.(.+)")
# Any of these that a config happens to have is kept in step with the count, so that no stale twin wins on loading.
COUNT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts")
FLOATING = ("F64", "F32", "F16", "BF16")
DENSE_TYPES = ("llama", "olmo", "olmo2", "olmo3", "olmo2_noqknorm_prenorm", "qwen2", "qwen3", "mistral", "gemma2")
# Criteria on router probabilities are computed from logits alone for these; of others, what the router itself says
# while it runs is recorded.
SCORING: Mapping[str, Scoring] = {
    "emo": "softmax", "olmoe": "softmax", "flex_olmo": "softmax", "mixtral": "softmax", "qwen2_moe": "softmax",
    "qwen3_moe": "softmax", "deepseek_v2": "softmax", "deepseek_v3": "sigmoid", "glm4_moe": "sigmoid",
    "gpt_oss": "softmax_of_top_k",
}


@dataclass(frozen=True)
class Rows:
    """Where the experts are in a tensor that has entries of all of them."""

    axis: int = 0
    each: int = 1
    """Entries per expert."""
    tail: int = 0
    """Entries behind those of the experts, which always stay: zero experts, shared ones that the router lists."""

    def entries(self, experts: Sequence[int], count: int) -> tuple[int, ...]:
        """Positions along the axis of these of `count` experts, and of the tail."""
        own = [e * self.each + i for e in experts for i in range(self.each)]
        return (*own, *range(count * self.each, count * self.each + self.tail))


@dataclass(frozen=True)
class Fused:
    """A parameter of a layer in memory that holds all of its experts on axis 0, and its sources on disk.

    `parts` with `{e}` are one tensor per expert each; an expert's parts are joined along axis 0 in this order and the
    experts stacked on a new axis 0. Without `{e}` there is one part, which holds all experts on disk already. Where
    that is not all (a transposition, interleaved halves), the parameter is `converted` by transformers' own rules.
    """

    parameter: str
    parts: tuple[str, ...]
    converted: bool = False
    rows: Rows = Rows()

    @property
    def per_expert(self) -> bool:
        """Whether the disk has one tensor per expert."""
        return "{e}" in self.parts[0]


@dataclass(frozen=True)
class Stored:
    """Another parameter or buffer, of a layer or of the whole decoder: the tensors on disk that it is made of."""

    parts: tuple[str, ...]
    converted: bool = False


@dataclass(frozen=True)
class Role:
    """What a tensor on disk is to pruning: `kind` and, for kind "expert", the expert it belongs to."""

    kind: Literal["expert", "rows", "other"]  # "rows": it has entries of all of the layer's experts
    layer: int | None = None
    expert: int | None = None
    suffix: str = ""  # the name within the layer, `{e}` in place of the expert
    prefix: str = ""  # what comes before it, the layer's number and a dot included
    rows: Rows = Rows()

    def renamed(self, expert: int) -> str:
        """The name of this tensor for another expert."""
        return self.prefix + self.suffix.replace("{e}", str(expert))


@dataclass(frozen=True)
class Family:
    """An architecture as one configuration describes it; see the module's text."""

    name: str
    layer_classes: tuple[str, ...]  # of decoder layers
    experts: tuple[Fused, ...]
    router: tuple[str, ...]  # disk tensors with entries of every expert that are not expert weights
    counts: tuple[int, ...]  # E of each layer, 0 for dense ones
    count_keys: tuple[str, ...] = ("num_experts",)  # in `section`; all are written, the first is the class's own
    top_k_keys: tuple[str, ...] = ("num_experts_per_tok",)
    section: str = ""  # the nested part of the configuration that has these keys; "": the top
    defaults: Mapping[str, Any] = field(default_factory=dict)  # of absent config keys, as the architecture's class
    listed_shared: bool = False  # the last num_shared_experts rows of the router are shared experts
    separate_shared: tuple[str, ...] = ()  # submodules of always-on experts that the router does not list
    layers: str = "model.layers"  # where the model in memory has its decoder layers
    disk_layers: tuple[str, ...] = ("model.layers",)  # where they may be on disk, the usual place first
    moe_module: str = "mlp"
    router_module: str = "mlp.gate"
    experts_module: str = "mlp.experts"
    scoring: Scoring = "softmax"
    groups: int = 1  # equal groups of experts that the router picks among
    groups_per_token: int = 1
    per_layer_keys: bool = False  # the config can give each layer its own count
    pruned_config: Mapping[str, Any] = field(default_factory=dict)  # what published pruned checkpoints set besides
    extra_layers_key: str | None = None  # counts prediction layers behind the decoder, which pruning leaves out
    rows: Mapping[str, Rows] = field(default_factory=dict)  # of disk tensors that are not laid out as `Rows()`
    router_rows: Mapping[str, Rows] = field(default_factory=dict)  # in memory: where experts are in what is no expert
    tails: Mapping[str, int] = field(default_factory=dict)  # `{e}` names that go on behind the experts, and how far
    stored: Mapping[str, Stored] = field(default_factory=dict)  # other parameters of layers; empty: as on disk
    outside: Mapping[str, Stored] = field(default_factory=dict)  # parameters of the decoder outside its layers
    kinds: tuple[Mapping[str, tuple[int, ...]], ...] = ()  # shapes of a layer's tensors on disk, per kind of layer
    whole: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # shapes on disk of what is outside of layers
    kind_of: tuple[int, ...] = ()  # the kind of each layer; empty: shapes are not known

    @cached_property
    def expert_parts(self) -> frozenset[str]:
        """Layer-relative disk names of one expert's tensors, with `{e}`."""
        return frozenset(part for fused in self.experts for part in fused.parts if fused.per_expert)

    @cached_property
    def expert_prefixes(self) -> frozenset[str]:
        """Layer-relative disk names up to one expert, with `{e}`: whatever lies below belongs to that expert."""
        return frozenset(part[:part.index("{e}") + 3] for part in self.expert_parts)

    @cached_property
    def row_names(self) -> frozenset[str]:
        """Layer-relative disk names with entries of all experts; all may be stored as in memory."""
        return self.expert_names | set(self.router) | self.router_rows.keys()

    @cached_property
    def expert_names(self) -> frozenset[str]:
        """Layer-relative disk names of expert weights that hold all experts."""
        return frozenset({f.parts[0] for f in self.experts if not f.per_expert} | {f.parameter for f in self.experts})

    @cached_property
    def _memory_names(self) -> dict[str, str]:
        return {part: name for name, stored in self.stored.items() for part in stored.parts}

    @cached_property
    def _on_disk(self) -> re.Pattern[str]:
        prefixes = "|".join(re.escape(prefix) for prefix in self.disk_layers)
        return re.compile(rf"((?:{prefixes})\.(\d+)\.)(.+)")

    @cached_property
    def _in_memory(self) -> re.Pattern[str]:
        return re.compile(rf"{re.escape(self.layers)}\.(\d+)\.(.+)")

    def value(self, config: Config, key: str) -> Any:
        """A config value; absent or null means the architecture's default."""
        part = config.get(self.section) if self.section else config
        found = part.get(key) if isinstance(part, Mapping) else None
        return self.defaults.get(key) if found is None else found

    def number(self, config: Config, key: str) -> int:
        """A config value that must be a whole number of things; CheckpointError if it is not."""
        return whole(self.value(config, key), key)

    def changed(self, config: Config, values: Mapping[str, Any]) -> dict[str, Any]:
        """`config` with new values in the section that counts experts."""
        if not self.section:
            return {**config, **values}
        return {**config, self.section: {**(config.get(self.section) or {}), **values}}

    def role(self, name: str) -> Role:
        """What the disk tensor `name` is."""
        match = self._on_disk.fullmatch(name)
        if not match:
            return Role("other")
        prefix, layer, rest = match[1], int(match[2]), match[3]
        if rest in self.row_names:
            return Role("rows", layer, suffix=rest, prefix=prefix, rows=self.rows.get(rest, Rows()))
        if (found := NUMBERED.fullmatch(rest)) and f"{found[1]}.{{e}}" in self.expert_prefixes:
            return Role("expert", layer, int(found[2]), f"{found[1]}.{{e}}.{found[3]}", prefix)
        return Role("other", layer, suffix=rest, prefix=prefix)

    def in_layer(self, parameter: str) -> tuple[int, str] | None:
        """Layer and layer-relative name of a parameter in memory; None outside the decoder's layers."""
        match = self._in_memory.fullmatch(parameter)
        return (int(match[1]), match[2]) if match else None

    def in_memory(self, name: str) -> str:
        """In-memory name of a disk tensor that is no expert weight (the first one that it is a part of)."""
        role = self.role(name)
        if role.layer is None:
            return next((memory for memory, stored in self.outside.items() if name in stored.parts), name)
        return f"{self.layers}.{role.layer}.{self._memory_names.get(role.suffix, role.suffix)}"


def whole(value: Any, key: str) -> int:
    """`value` if it is a whole number; CheckpointError naming `key` if not."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise CheckpointError(f"{key} in config.json must be a whole number, not {value!r}.")
    return value


def _swiglu(experts: str) -> tuple[Fused, ...]:
    return (Fused("mlp.experts.gate_up_proj", (f"{experts}.{{e}}.gate_proj.weight", f"{experts}.{{e}}.up_proj.weight")),
            Fused("mlp.experts.down_proj", (f"{experts}.{{e}}.down_proj.weight",)))


EMO_TYPES = ("emo", "flex_olmo_noqknorm_prenorm")
EMO_DEFAULTS = {"num_experts": 7, "num_experts_per_tok": 5, "num_shared_experts": 0, "num_hidden_layers": 32,
                "hidden_size": 4096}


def _emo(config: Config) -> Family:
    """Our own architecture: every layer may have its own count, and some of the listed experts are shared.

    It is written down because layers of different size cannot be told from one count that moves.
    """
    counts = _per_layer(config, "num_experts_per_layer", _layers_of(config)) or [
        whole(_or_default(config, "num_experts"), "num_experts")] * _layers_of(config)
    return Family("emo", ("EmoDecoderLayer",), _swiglu("mlp.experts"), ("mlp.gate.weight",), tuple(counts),
                  defaults=EMO_DEFAULTS, listed_shared=True, per_layer_keys=True,
                  router_rows={"mlp.gate.weight": Rows()}, pruned_config={"output_router_logits": True})


def _layers_of(config: Config) -> int:
    return whole(_or_default(config, "num_hidden_layers"), "num_hidden_layers")


def _or_default(config: Config, key: str) -> Any:
    return EMO_DEFAULTS[key] if config.get(key) is None else config[key]


def _per_layer(config: Config, key: str, layers: int) -> list[int] | None:
    listed = config.get(key)
    if not listed:
        return None
    if not isinstance(listed, list) or len(listed) != layers:
        raise CheckpointError(f"{key} in config.json must list one number for each of the {layers} layers.")
    return [whole(count, key) for count in listed]


def family_of(config: Config) -> Family:
    """What a configuration says of its experts.

    The first question about a family that is not our own takes a second or more: the model is built without weights,
    by transformers. The answer is remembered, in this process and in the cache folder.

    Raises:
        ModelError: dense model, a family that transformers does not know or whose experts cannot be pruned, by name.
        CheckpointError: the configuration contradicts itself.
    """
    model_type = config.get("model_type")
    _refuse_hashing(config)
    if model_type in EMO_TYPES:
        return _emo(config)
    if model_type in DENSE_TYPES or not counts_experts(config):
        raise ModelError(f"A {model_type} model is dense: it has no experts to select, so a run with it skips "
                         "selection; leave out select and prune.")
    return _derived(json.dumps(dict(config), sort_keys=True))


@lru_cache(maxsize=32)
def _derived(config: str) -> Family:
    from emo_select.models.derived import derived_family

    return derived_family(json.loads(config))


def counts_experts(config: Config) -> bool:
    """Whether a configuration, or a part of it, speaks of experts in any number but none."""
    return any("expert" in str(key) and value not in (None, 0, False, []) for part in (config, *_parts(config))
               for key, value in part.items())


def _parts(config: Config) -> Iterator[Config]:
    return (value for value in config.values() if isinstance(value, Mapping))


def is_moe(config: Config) -> bool:
    """Whether a config belongs to a supported MoE family (dense and unsupported ones: False)."""
    if config.get("model_type") in EMO_TYPES:
        return True
    if config.get("model_type") in DENSE_TYPES or not counts_experts(config):
        return False
    try:
        family_of(config)
    except ModelError:
        return False
    return True


def experts_per_layer(config: Config) -> list[int]:
    """Number of experts that the router of each layer lists, listed shared ones included; 0 for dense layers."""
    return list(family_of(config).counts)


def shared_per_layer(config: Config) -> list[int]:
    """How many of `experts_per_layer` are shared: the last ones. Separate shared experts do not count (always 0)."""
    family = family_of(config)
    if not family.listed_shared:
        return [0] * len(family.counts)
    listed = config.get("num_experts_per_layer") and _per_layer(config, "num_shared_experts_per_layer",
                                                                len(family.counts))
    shared = listed or [family.number(config, "num_shared_experts")] * len(family.counts)
    return [min(s, e) for s, e in zip(shared, family.counts, strict=True)]


def always_active_per_layer(config: Config) -> list[list[int]]:
    """Experts per layer that every token uses and that must be kept, in the config's order (emo only)."""
    counts = experts_per_layer(config)
    listed = config.get("always_active_experts_per_layer")
    rows = listed or [config.get("always_active_experts") or []] * len(counts)
    if len(rows) != len(counts):
        raise CheckpointError(f"always_active_experts_per_layer in config.json must have a list for each of the "
                              f"{len(counts)} layers.")
    active = [[int(e) for e in (row or [])] if count else [] for row, count in zip(rows, counts, strict=True)]
    for layer, (row, count) in enumerate(zip(active, counts, strict=True)):
        if beyond := [e for e in row if e >= count]:
            raise CheckpointError(f"config.json makes expert {beyond[0]} of layer {layer} always active, but that "
                                  f"layer has {count} experts.")
    return active


def top_k(config: Config) -> int:
    """Experts per token, listed shared ones included."""
    family = family_of(config)
    return family.number(config, family.top_k_keys[0])


def num_groups(config: Config) -> int:
    """Equal groups that each layer's experts are divided into (1: none)."""
    return family_of(config).groups


def groups_per_token(config: Config) -> int:
    """How many of those groups a token's experts may come from."""
    return family_of(config).groups_per_token


def layer_names(checkpoint: Checkpoint) -> dict[int, list[str]]:
    """Names on disk of the tensors of each decoder layer."""
    family, names = family_of(checkpoint.config), dict[int, list[str]]()
    for name in checkpoint.tensors:
        if (layer := family.role(name).layer) is not None:
            names.setdefault(layer, []).append(name)
    return names


@dataclass(frozen=True)
class ParameterSource:
    """Where one in-memory parameter comes from.

    `parameter` is the full in-memory name. `blocks` has one entry per expert: the disk tensors to join along axis 0;
    the entries are stacked. A parameter stored as one tensor has `tensor` instead, and `rows` of it (positions along
    axis 0) if not None. Where `conversion` is there, transformers makes the parameter of these tensors: it lists the
    names under which they enter, and `config` is the configuration, as JSON.
    """

    parameter: str
    tensor: str | None = None
    rows: tuple[int, ...] | None = None
    blocks: tuple[tuple[str, ...], ...] = ()
    is_experts: bool = False
    conversion: tuple[str, ...] = ()
    config: str = ""

    @property
    def names(self) -> list[str]:
        """All tensors that are read."""
        return [self.tensor] if self.tensor is not None else [name for block in self.blocks for name in block]


def layer_parameters(checkpoint: Checkpoint, layer: int, experts: Sequence[int] | None = None
                     ) -> list[ParameterSource]:
    """Sources of every parameter and buffer of decoder layer `layer`, expert weights last.

    `experts` restricts the expert weights to those indices, in that order ([] leaves them out); the router always
    comes whole. Read them with `read_parameter`.

    Raises:
        CheckpointError: a tensor of the layer is missing.
    """
    family = family_of(checkpoint.config)
    count = family.counts[layer]
    kept = range(count) if experts is None else experts
    return _plain_parameters(checkpoint, family, layer) + (
        expert_parameters(checkpoint, layer, kept) if count else [])


def _plain_parameters(checkpoint: Checkpoint, family: Family, layer: int) -> list[ParameterSource]:
    if not family.kind_of:
        own = {fused.parameter for fused in family.experts}
        return [ParameterSource(family.in_memory(name), name) for name in checkpoint.layers.get(layer, ())
                if (role := family.role(name)).kind != "expert" and role.suffix not in own]
    place, kind = _place(checkpoint, family, layer), family.kinds[family.kind_of[layer]]
    return [_source(checkpoint, family, f"{family.layers}.{layer}.{name}", stored, place,
                    f"{family.disk_layers[0]}.{layer}.", f"{place}{name}")
            for name, stored in family.stored.items() if stored.parts[0] in kind] + [
            source for source in _outside(checkpoint, family) if family.in_layer(source.parameter) == (
                layer, source.parameter.removeprefix(f"{family.layers}.{layer}."))]


def _source(checkpoint: Checkpoint, family: Family, parameter: str, stored: Stored, place: str, usual: str, own: str
            ) -> ParameterSource:
    """A parameter from the tensors at `place` that it is made of, else from the one that has its own name."""
    names = tuple(place + part for part in stored.parts)
    if own in checkpoint.tensors and not all(name in checkpoint.tensors for name in names):
        return ParameterSource(parameter, own)
    if not stored.converted:
        return ParameterSource(parameter, names[0])
    return ParameterSource(parameter, blocks=(names,), conversion=tuple(usual + part for part in stored.parts),
                           config=_frozen(checkpoint.config))


def _place(checkpoint: Checkpoint, family: Family, layer: int) -> str:
    """What the names of a layer's tensors begin with in this checkpoint."""
    known = {part for names in (family.kinds[family.kind_of[layer]], family.stored) for part in names}
    known |= {fused.parameter for fused in family.experts}
    for prefix in family.disk_layers:
        place = f"{prefix}.{layer}."
        if any(place + name.replace("{e}", "0") in checkpoint.tensors for name in known):
            return place
    raise CheckpointError(f"{checkpoint.directory} has no tensors of layer {layer}, but its config.json counts "
                          f"{len(family.counts)} layers.")


def model_parameters(checkpoint: Checkpoint) -> list[ParameterSource]:
    """Sources of what the decoder has outside its layers: embeddings, norms; not the head."""
    family = family_of(checkpoint.config)
    if not family.kind_of:
        return [ParameterSource(name, name) for name in checkpoint.tensors
                if name.startswith("model.") and family.role(name).layer is None]
    return [source for source in _outside(checkpoint, family) if family.in_layer(source.parameter) is None]


def _outside(checkpoint: Checkpoint, family: Family) -> list[ParameterSource]:
    usual = family.disk_layers[0].rpartition(".")[0]
    actual = _place(checkpoint, family, 0).split(".0.")[0].rpartition(".")[0]
    sources = []
    for name, stored in family.outside.items():
        parts = tuple(part.removeprefix(usual + ".") for part in stored.parts)
        place = actual + "." if all(part != old for part, old in zip(parts, stored.parts, strict=True)) else ""
        sources.append(_source(checkpoint, family, name, Stored(parts, stored.converted), place,
                               usual + "." if place else "", name))
    return sources


def expert_parameters(checkpoint: Checkpoint, layer: int, experts: Sequence[int]) -> list[ParameterSource]:
    """Sources of the expert weights of decoder layer `layer`, of these experts in that order."""
    family = family_of(checkpoint.config)
    if not len(experts):
        return []
    place = _place(checkpoint, family, layer) if family.kind_of else f"{family.disk_layers[0]}.{layer}."
    return [_fused_source(checkpoint, family, fused, layer, place, experts) for fused in family.experts]


def _fused_source(checkpoint: Checkpoint, family: Family, fused: Fused, layer: int, place: str,
                  kept: Sequence[int]) -> ParameterSource:
    name, count, usual = f"{family.layers}.{layer}.{fused.parameter}", family.counts[layer], family.disk_layers[0]
    own = place + fused.parameter
    if own in checkpoint.tensors and place + fused.parts[0].replace("{e}", "0") not in checkpoint.tensors:
        return ParameterSource(name, own, fused.rows.entries(kept, count), is_experts=True)
    # some rules look whether shapes fit the model, so they are those of a model of just these experts
    fewer = family.changed(checkpoint.config, dict.fromkeys(family.count_keys, len(kept)))
    config = _frozen(fewer if len(kept) != count else checkpoint.config) if fused.converted else ""
    if not fused.per_expert:
        rows = family.rows.get(fused.parts[0], Rows()).entries(kept, count)
        entering = [f"{usual}.{layer}.{fused.parts[0]}"] if fused.converted else []
        return ParameterSource(name, place + fused.parts[0], rows, (), True, tuple(entering), config)
    chosen = [*kept, *range(count, count + family.tails.get(fused.parts[0], 0))]
    blocks = tuple(tuple(place + part.replace("{e}", str(e)) for part in fused.parts) for e in chosen)
    entering = [f"{usual}.{layer}.{part.replace('{e}', str(at))}" for at in range(len(chosen))
                for part in fused.parts] if fused.converted else []
    return ParameterSource(name, blocks=blocks, is_experts=True, conversion=tuple(entering), config=config)


def _frozen(config: Config) -> str:
    return json.dumps(dict(config), sort_keys=True)


def parameter_shape(checkpoint: Checkpoint, source: ParameterSource) -> tuple[tuple[int, ...], str]:
    """Shape that `read_parameter` gives, and the safetensors dtype on disk."""
    if source.conversion:
        import torch

        inputs = [torch.empty(shape, device="meta") for shape in _input_shapes(checkpoint, source)]
        return tuple(_convert(source, inputs).shape), checkpoint.info(source.names[0]).dtype
    if source.tensor is not None:
        return _input_shapes(checkpoint, source)[0], checkpoint.info(source.tensor).dtype
    infos = [checkpoint.info(name) for name in source.blocks[0]]
    return (len(source.blocks), sum(info.shape[0] for info in infos), *infos[0].shape[1:]), infos[0].dtype


def _input_shapes(checkpoint: Checkpoint, source: ParameterSource) -> list[tuple[int, ...]]:
    shapes = [checkpoint.info(name).shape for name in source.names]
    return shapes if source.rows is None else [(len(source.rows), *shape[1:]) for shape in shapes]


def read_parameter(checkpoint: Checkpoint, source: ParameterSource, out: torch.Tensor | None = None) -> torch.Tensor:
    """The parameter in its stored dtype on the CPU; `out` (contiguous, that shape and dtype) is reused."""
    import torch

    from emo_select.checkpoint.header import DTYPES

    if source.conversion:
        made = _convert(source, [checkpoint.read(name, source.rows) for name in source.names])
        return made.contiguous() if out is None else out.copy_(made)
    shape, dtype = parameter_shape(checkpoint, source)
    if out is None:
        out = torch.empty(shape, dtype=getattr(torch, DTYPES[dtype][1]))
    if source.tensor is not None:
        checkpoint.read_into(source.tensor, out, source.rows)
    for e, block in enumerate(source.blocks):
        at = 0
        for name in block:
            end = at + checkpoint.info(name).shape[0]
            checkpoint.read_into(name, out[e, at:end])
            at = end
    return out


def _convert(source: ParameterSource, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    from emo_select.models.conversion import Conversion

    made = Conversion.of(source.config).to_memory(dict(zip(source.conversion, tensors, strict=True)))
    return made[source.parameter]


def check_layout(checkpoint: Checkpoint) -> Family:
    """Compare config and tensor shapes: every layer's router and experts are there, and only those.

    Raises:
        ModelError: not a supported MoE. CheckpointError: names the first tensor that does not fit the config.
    """
    family = family_of(checkpoint.config)
    names = layer_names(checkpoint)
    extra = sorted(layer for layer in names if layer >= len(family.counts))
    if extra and not family.extra_layers_key:
        raise CheckpointError(f"{checkpoint.directory} has a layer {extra[0]}, but its config.json counts "
                              f"{len(family.counts)} layers.")
    for layer in range(len(family.counts)):
        _check_layer(checkpoint, family, layer, names.get(layer, ()))
    return family


def _check_layer(checkpoint: Checkpoint, family: Family, layer: int, names: Sequence[str]) -> None:
    count = family.counts[layer]
    for name in names:
        role = family.role(name)
        if role.expert is not None and role.expert >= count + family.tails.get(role.suffix, 0):
            raise CheckpointError(f"{name} is expert {role.expert} of layer {layer}, but config.json gives that layer "
                                  f"{count} experts.")
    first: dict[str, tuple[tuple[int, ...], str]] = {}
    for name, suffix in _expert_names(checkpoint, family, layer).items():
        info, rows = checkpoint.info(name), family.role(name).rows
        if first.setdefault(suffix, (info.shape, info.dtype)) != (info.shape, info.dtype):
            raise CheckpointError(f"{name} has shape {list(info.shape)} ({info.dtype}), its neighbours have "
                                  f"{list(first[suffix][0])} ({first[suffix][1]}).")
        entries = count * rows.each + rows.tail
        if "{e}" not in suffix and (len(info.shape) <= rows.axis or info.shape[rows.axis] != entries):
            raise CheckpointError(f"{name} has shape {list(info.shape)}, but config.json counts {count} experts in "
                                  f"layer {layer}.")


def _expert_names(checkpoint: Checkpoint, family: Family, layer: int) -> dict[str, str]:
    """Disk name → suffix of every router and expert tensor that a layer must have."""
    count = family.counts[layer]
    if not count:
        return {}
    place = _place(checkpoint, family, layer) if family.kind_of else f"{family.disk_layers[0]}.{layer}."
    memory = {part: name for name, stored in family.stored.items() for part in stored.parts}
    names = {_either(checkpoint, place + suffix, place + memory.get(suffix, suffix)): suffix
             for suffix in family.router}
    for fused in family.experts:
        if place + fused.parameter in checkpoint.tensors:
            names[place + fused.parameter] = fused.parameter
            continue
        for part in fused.parts:
            experts = range(count + family.tails.get(part, 0)) if fused.per_expert else range(1)
            names |= {place + part.replace("{e}", str(e)): part for e in experts}
    return names


def _either(checkpoint: Checkpoint, first: str, second: str) -> str:
    return second if first not in checkpoint.tensors and second in checkpoint.tensors else first


def tensors_of_layer(checkpoint: Checkpoint, family: Family, layer: int, kind: Mapping[str, tuple[int, ...]]
                     ) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes that a layer's tensors should have in this checkpoint, without those of an expert.

    What is not stored as transformers stores it may be stored as it is in memory, where shapes are not known here;
    experts are compared with each other by `check_layout`, and with the configuration by their first one.
    """
    place = _place(checkpoint, family, layer)
    memory = {part: name for name, stored in family.stored.items() for part in stored.parts}
    memory |= {part: fused.parameter for fused in family.experts for part in fused.parts}
    turned = {part for fused in family.experts if fused.converted for part in fused.parts}
    for own, shape in kind.items():
        name = place + own.replace("{e}", "0")
        if own in turned and name in checkpoint.tensors and sorted(checkpoint.info(name).shape) == sorted(shape):
            continue  # transformers transposes where a shape asks for it
        if name in checkpoint.tensors or place + memory.get(own, own) not in checkpoint.tensors:
            yield name, shape


def _refuse_hashing(config: Config) -> None:
    for part in (config, *_parts(config)):
        layers = part.get("num_hash_layers") or (part.get("mlp_layer_types") or []).count("hash_moe")
        if layers:
            raise ModelError(f"{layers} layers route by token hash, so their experts cannot be pruned.")
