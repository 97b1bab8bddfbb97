"""One row per MoE family: all that the rest of the package needs to know about an architecture.

A row (`Family`) says, for one `model_type`:

- **on disk** which tensors of a decoder layer belong to one expert (`{e}` in a name), which have one row per expert
  (router weight, biases, tensors that already hold all experts), always along axis 0;
- **in memory** (transformers 5) which fused parameter the expert tensors are stacked into, `[experts, …]`, and how the
  other names differ; which submodules are router, experts and always-on shared experts; the decoder layer's class;
- **in config.json** which keys count experts, which layers are dense, how many of the listed experts are shared, what
  may differ from layer to layer, and what the architecture assumes when a key is absent;
- **in the router** how logits become scores, and whether experts come in equal groups.

Names are relative to `model.layers.<layer>.`, which all families use. docs/families.md says how to add a row.
Nothing here imports torch before `read_parameter` is called.

Legend: L layer, E experts of a layer (shared ones included where the router lists them), e expert index.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from emo_select.errors import CheckpointError, ModelError

if TYPE_CHECKING:
    import torch

    from emo_select.checkpoint import Checkpoint

Config = Mapping[str, Any]
Scoring = Literal["softmax", "sigmoid", "softmax_of_top_k"]
LAYER_NAME = re.compile(r"model\.layers\.(\d+)\.(.+)")
NUMBERED = re.compile(r"(.+)\.(\d+)\.(.+)")
# Any of these that a config happens to have is kept in step with the count, so that no stale twin wins on loading.
COUNT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts")
FLOATING = ("F64", "F32", "F16", "BF16")
DENSE_TYPES = ("llama", "olmo", "olmo2", "olmo3", "olmo2_noqknorm_prenorm", "qwen2", "qwen3", "mistral", "gemma2")


@dataclass(frozen=True)
class Fused:
    """An in-memory parameter that holds all experts of a layer, and its sources on disk.

    `parts` with `{e}` are one tensor per expert each; an expert's parts are joined along axis 0 in this order and the
    experts stacked on a new axis 0. Without `{e}` there is one part, which is fused on disk already.
    """

    parameter: str
    parts: tuple[str, ...]

    @property
    def per_expert(self) -> bool:
        """Whether the disk has one tensor per expert."""
        return "{e}" in self.parts[0]


@dataclass(frozen=True)
class Role:
    """What a tensor on disk is to pruning: `kind` and, for kind "expert", the expert it belongs to."""

    kind: Literal["expert", "rows", "other"]  # "rows": axis 0 runs over the layer's experts
    layer: int | None = None
    expert: int | None = None
    suffix: str = ""  # the name within the layer, `{e}` in place of the expert


@dataclass(frozen=True)
class Family:
    """A row of the table; see the module's text."""

    name: str
    layer_class: str
    experts: tuple[Fused, ...]
    router: tuple[str, ...]  # disk tensors with one row (or entry) per expert that are not expert weights
    layer_counts: Callable[[Config, Family], list[int]]  # E of each layer, 0 for dense ones
    count_keys: tuple[str, ...] = ("num_experts",)  # the first one present is believed; all are written
    width_key: str = "intermediate_size"  # config key of an expert's width
    defaults: Mapping[str, Any] = field(default_factory=dict)  # of absent config keys, as the architecture's class
    aliases: tuple[str, ...] = ()  # other model_type values of the same architecture
    listed_shared: bool = False  # the last num_shared_experts rows of the router are shared experts
    separate_shared: tuple[str, ...] = ()  # submodules of always-on experts that the router does not list
    renames: tuple[tuple[str, str], ...] = ()  # disk → memory, for names that are no expert tensors
    layers: str = "model.layers"  # where the model in memory has its decoder layers
    moe_module: str = "mlp"
    router_module: str = "mlp.gate"
    experts_module: str = "mlp.experts"
    scoring: Scoring = "softmax"
    groups: bool = False  # config n_group/topk_group limit routing to some groups of experts
    per_layer_keys: bool = False  # the config can give each layer its own count
    pruned_config: Mapping[str, Any] = field(default_factory=dict)  # what published pruned checkpoints set besides
    extra_layers_key: str | None = None  # counts prediction layers behind the decoder, which pruning leaves out

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
        """Layer-relative disk names whose axis 0 runs over experts."""
        return frozenset(self.router) | {f.parts[0] for f in self.experts if not f.per_expert}

    def value(self, config: Config, key: str) -> Any:
        """A config value; absent or null means the architecture's default."""
        found = config.get(key)
        return self.defaults.get(key) if found is None else found

    def number(self, config: Config, key: str) -> int:
        """A config value that must be a whole number of things; CheckpointError if it is not."""
        return _whole(self.value(config, key), key)

    def role(self, name: str) -> Role:
        """What the disk tensor `name` is."""
        match = LAYER_NAME.fullmatch(name)
        if not match:
            return Role("other")
        layer, rest = int(match[1]), match[2]
        if rest in self.row_names:
            return Role("rows", layer, suffix=rest)
        if (found := NUMBERED.fullmatch(rest)) and f"{found[1]}.{{e}}" in self.expert_prefixes:
            return Role("expert", layer, int(found[2]), f"{found[1]}.{{e}}.{found[3]}")
        return Role("other", layer, suffix=rest)

    def in_memory(self, name: str) -> str:
        """In-memory name of a disk tensor that is no expert weight."""
        for old, new in self.renames:
            name = name.replace(old, new)
        return name


def _uniform(config: Config, family: Family) -> list[int]:
    return [_count(config, family)] * _layers(config, family)


def _dense_first(config: Config, family: Family) -> list[int]:
    dense = family.number(config, "first_k_dense_replace") if family.value(config, "first_k_dense_replace") else 0
    return [0 if layer < dense else _count(config, family) for layer in range(_layers(config, family))]


def _sparse_step(config: Config, family: Family) -> list[int]:
    step, dense = family.number(config, "decoder_sparse_step"), config.get("mlp_only_layers") or []
    return [0 if layer in dense or (layer + 1) % step else _count(config, family)
            for layer in range(_layers(config, family))]


def _listed(config: Config, family: Family) -> list[int]:
    return _per_layer(config, family, "num_experts_per_layer") or _uniform(config, family)


def _layers(config: Config, family: Family) -> int:
    return family.number(config, "num_hidden_layers")


def _count(config: Config, family: Family) -> int:
    present = [key for key in family.count_keys if config.get(key) is not None]
    return family.number(config, (present or family.count_keys)[0])


def _per_layer(config: Config, family: Family, key: str) -> list[int] | None:
    listed = config.get(key)
    if not listed:
        return None
    if not isinstance(listed, list) or len(listed) != _layers(config, family):
        raise CheckpointError(f"{key} in config.json must list one number for each of the {_layers(config, family)} "
                              "layers.")
    return [_whole(count, key) for count in listed]


def _whole(value: Any, key: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise CheckpointError(f"{key} in config.json must be a whole number, not {value!r}.")
    return value


def _swiglu(experts: str, gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj") -> tuple[Fused, ...]:
    return (Fused("mlp.experts.gate_up_proj", (f"{experts}.{{e}}.{gate}.weight", f"{experts}.{{e}}.{up}.weight")),
            Fused("mlp.experts.down_proj", (f"{experts}.{{e}}.{down}.weight",)))


_CORRECTED_ROUTER = ("mlp.gate.weight", "mlp.gate.e_score_correction_bias")

FAMILIES: tuple[Family, ...] = (
    Family("emo", "EmoDecoderLayer", _swiglu("mlp.experts"), ("mlp.gate.weight",), _listed,
           defaults={"num_experts": 7, "num_experts_per_tok": 5, "num_shared_experts": 0, "num_hidden_layers": 32,
                     "hidden_size": 4096},
           aliases=("flex_olmo_noqknorm_prenorm",), listed_shared=True, per_layer_keys=True,
           pruned_config={"output_router_logits": True}),
    Family("olmoe", "OlmoeDecoderLayer", _swiglu("mlp.experts"), ("mlp.gate.weight",), _uniform,
           defaults={"num_experts": 64, "num_experts_per_tok": 8, "num_hidden_layers": 16, "hidden_size": 2048}),
    Family("flex_olmo", "FlexOlmoDecoderLayer", _swiglu("mlp.experts"), ("mlp.gate.weight",), _uniform,
           defaults={"num_experts": 7, "num_experts_per_tok": 5, "num_hidden_layers": 32, "hidden_size": 4096}),
    Family("mixtral", "MixtralDecoderLayer", _swiglu("block_sparse_moe.experts", "w1", "w3", "w2"),
           ("block_sparse_moe.gate.weight",), _uniform, count_keys=("num_local_experts",),
           renames=((".block_sparse_moe.", ".mlp."),),
           defaults={"num_local_experts": 8, "num_experts_per_tok": 2, "num_hidden_layers": 32, "hidden_size": 4096}),
    Family("qwen2_moe", "Qwen2MoeDecoderLayer", _swiglu("mlp.experts"), ("mlp.gate.weight",), _sparse_step,
           separate_shared=("mlp.shared_expert", "mlp.shared_expert_gate"),
           width_key="moe_intermediate_size",
           defaults={"decoder_sparse_step": 1, "num_experts": 60, "num_experts_per_tok": 4, "num_hidden_layers": 24,
                     "hidden_size": 2048}),
    # transformers 4.57 and vLLM read num_experts; transformers 5 reads and saves num_local_experts.
    Family("qwen3_moe", "Qwen3MoeDecoderLayer", _swiglu("mlp.experts"), ("mlp.gate.weight",), _sparse_step,
           count_keys=("num_experts", "num_local_experts"),
           width_key="moe_intermediate_size",
           defaults={"decoder_sparse_step": 1, "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 24,
                     "hidden_size": 2048}),
    Family("deepseek_v2", "DeepseekV2DecoderLayer", _swiglu("mlp.experts"), ("mlp.gate.weight",), _dense_first,
           count_keys=("n_routed_experts",), separate_shared=("mlp.shared_experts",), groups=True,
           width_key="moe_intermediate_size",
           defaults={"n_routed_experts": 64, "num_hidden_layers": 32, "hidden_size": 4096, "topk_method": "greedy"}),
    Family("deepseek_v3", "DeepseekV3DecoderLayer", _swiglu("mlp.experts"), _CORRECTED_ROUTER, _dense_first,
           count_keys=("n_routed_experts",), separate_shared=("mlp.shared_experts",), scoring="sigmoid", groups=True,
           extra_layers_key="num_nextn_predict_layers",
           width_key="moe_intermediate_size",
           defaults={"n_routed_experts": 256, "num_experts_per_tok": 8, "num_hidden_layers": 61, "hidden_size": 7168,
                     "first_k_dense_replace": 3, "n_group": 8, "topk_group": 4}),
    Family("glm4_moe", "Glm4MoeDecoderLayer", _swiglu("mlp.experts"), _CORRECTED_ROUTER, _dense_first,
           count_keys=("n_routed_experts",), separate_shared=("mlp.shared_experts",), scoring="sigmoid", groups=True,
           extra_layers_key="num_nextn_predict_layers",
           width_key="moe_intermediate_size",
           defaults={"n_routed_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 46, "hidden_size": 4096,
                     "first_k_dense_replace": 1}),
    Family("gpt_oss", "GptOssDecoderLayer",
           tuple(Fused(name, (name,)) for name in ("mlp.experts.gate_up_proj", "mlp.experts.gate_up_proj_bias",
                                                   "mlp.experts.down_proj", "mlp.experts.down_proj_bias")),
           ("mlp.router.weight", "mlp.router.bias"), _uniform, count_keys=("num_local_experts",),
           router_module="mlp.router", scoring="softmax_of_top_k",
           defaults={"num_local_experts": 128, "num_experts_per_tok": 4, "num_hidden_layers": 36,
                     "hidden_size": 2880}),
)


def family_of(config: Config) -> Family:
    """The row for a config.

    Raises:
        ModelError: dense model, unknown family or hash-routed layers.
    """
    model_type = config.get("model_type")
    for family in FAMILIES:
        if model_type in (family.name, *family.aliases):
            _refuse_unsupported(config)
            return family
    if model_type in DENSE_TYPES:
        raise ModelError(f"A {model_type} model is dense: it has no experts to select, so a run with it skips "
                         "selection; leave out select and prune.")
    known = ", ".join(family.name for family in FAMILIES)
    raise ModelError(f"No row for model_type {model_type!r}; supported MoE families: {known}; "
                     "docs/families.md says how to add one.")


def is_moe(config: Config) -> bool:
    """Whether a config belongs to a supported MoE family (dense and unknown ones: False)."""
    return any(config.get("model_type") in (family.name, *family.aliases) for family in FAMILIES)


def experts_per_layer(config: Config) -> list[int]:
    """Number of experts that the router of each layer lists, listed shared ones included; 0 for dense layers."""
    family = family_of(config)
    return family.layer_counts(config, family)


def shared_per_layer(config: Config) -> list[int]:
    """How many of `experts_per_layer` are shared: the last ones. Separate shared experts do not count (always 0)."""
    family, counts = family_of(config), experts_per_layer(config)
    if not family.listed_shared:
        return [0] * len(counts)
    listed = config.get("num_experts_per_layer") and _per_layer(config, family, "num_shared_experts_per_layer")
    shared = listed or [family.number(config, "num_shared_experts")] * len(counts)
    return [min(s, e) for s, e in zip(shared, counts, strict=True)]


def always_active_per_layer(config: Config) -> list[list[int]]:
    """Experts per layer that every token uses and that must be kept, in the config's order (emo only)."""
    counts = experts_per_layer(config)
    listed = config.get("always_active_experts_per_layer")
    rows = listed or [config.get("always_active_experts") or []] * len(counts)
    if len(rows) != len(counts):
        raise CheckpointError(f"always_active_experts_per_layer in config.json must have a list for each of the "
                              f"{len(counts)} layers.")
    return [[int(e) for e in (row or [])] if count else [] for row, count in zip(rows, counts, strict=True)]


def top_k(config: Config) -> int:
    """Experts per token, listed shared ones included."""
    return family_of(config).number(config, "num_experts_per_tok")


def num_groups(config: Config) -> int:
    """Equal groups that each layer's experts are divided into (1: none)."""
    family = family_of(config)
    grouped = family.groups and family.value(config, "topk_method") != "greedy"
    return int(family.value(config, "n_group") or 1) if grouped else 1


def groups_per_token(config: Config) -> int:
    """How many of those groups a token's experts may come from."""
    return int(family_of(config).value(config, "topk_group") or num_groups(config))


@dataclass(frozen=True)
class ParameterSource:
    """Where one in-memory parameter comes from.

    `parameter` is the full in-memory name. `blocks` has one entry per expert: the disk tensors to join along axis 0;
    the entries are stacked. A parameter stored as one tensor has `tensor` instead, and `rows` of it if not None.
    """

    parameter: str
    tensor: str | None = None
    rows: tuple[int, ...] | None = None
    blocks: tuple[tuple[str, ...], ...] = ()

    @property
    def is_experts(self) -> bool:
        """Whether this is expert weights stacked over experts on axis 0."""
        return bool(self.blocks) or self.rows is not None


def layer_parameters(checkpoint: Checkpoint, layer: int, experts: Sequence[int] | None = None
                     ) -> list[ParameterSource]:
    """Sources of every parameter and buffer of decoder layer `layer`, expert weights last.

    `experts` restricts the expert weights to those indices, in that order ([] leaves them out); the router always
    comes whole. Read them with `read_parameter`.
    """
    family = family_of(checkpoint.config)
    count = experts_per_layer(checkpoint.config)[layer]
    kept = range(count) if experts is None else experts
    expert_names = {f.parts[0] for f in family.experts}
    plain = [ParameterSource(family.in_memory(name), name) for name in checkpoint.layers.get(layer, ())
             if (role := family.role(name)).kind != "expert" and role.suffix not in expert_names]
    return plain + (expert_parameters(family, layer, kept) if count else [])


def model_parameters(checkpoint: Checkpoint) -> list[ParameterSource]:
    """Sources of what the decoder has outside its layers: embeddings, norms; not the head."""
    family = family_of(checkpoint.config)
    decoder = family.layers.rpartition(".")[0] + "."
    return [ParameterSource(family.in_memory(name), name) for name in checkpoint.tensors
            if name.startswith(decoder) and not LAYER_NAME.fullmatch(name)]


def expert_parameters(family: Family, layer: int, experts: Sequence[int]) -> list[ParameterSource]:
    """Sources of the expert weights of decoder layer `layer`, of these experts in that order."""
    prefix = f"model.layers.{layer}."
    return [_fused_source(fused, prefix, experts) for fused in family.experts] if len(experts) else []


def _fused_source(fused: Fused, prefix: str, kept: Sequence[int]) -> ParameterSource:
    name = prefix + fused.parameter
    if not fused.per_expert:
        return ParameterSource(name, prefix + fused.parts[0], tuple(kept))
    return ParameterSource(name, blocks=tuple(tuple(prefix + part.replace("{e}", str(e)) for part in fused.parts)
                                              for e in kept))


def parameter_shape(checkpoint: Checkpoint, source: ParameterSource) -> tuple[tuple[int, ...], str]:
    """Shape that `read_parameter` gives, and the safetensors dtype on disk."""
    if source.tensor is not None:
        info = checkpoint.info(source.tensor)
        head = info.shape[:1] if source.rows is None else (len(source.rows),)
        return (*head, *info.shape[1:]), info.dtype
    infos = [checkpoint.info(name) for name in source.blocks[0]]
    return (len(source.blocks), sum(info.shape[0] for info in infos), *infos[0].shape[1:]), infos[0].dtype


def read_parameter(checkpoint: Checkpoint, source: ParameterSource, out: torch.Tensor | None = None) -> torch.Tensor:
    """The parameter in its stored dtype on the CPU; `out` (contiguous, that shape and dtype) is reused."""
    import torch

    from emo_select.checkpoint.header import DTYPES

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


def check_layout(checkpoint: Checkpoint) -> Family:
    """Compare config and tensor shapes: every layer's router and experts are there, and only those.

    Raises:
        ModelError: not a supported MoE. CheckpointError: names the first tensor that does not fit the config.
    """
    family = family_of(checkpoint.config)
    counts = experts_per_layer(checkpoint.config)
    hidden = family.number(checkpoint.config, "hidden_size")
    extra = sorted(layer for layer in checkpoint.layers if layer >= len(counts))
    if extra and not family.extra_layers_key:
        raise CheckpointError(f"{checkpoint.directory} has a layer {extra[0]}, but its config.json counts "
                              f"{len(counts)} layers.")
    for layer, count in enumerate(counts):
        _check_layer(checkpoint, family, layer, count, hidden)
    return family


def _check_layer(checkpoint: Checkpoint, family: Family, layer: int, count: int, hidden: int) -> None:
    prefix = f"model.layers.{layer}."
    expected = _expert_names(family, prefix, count) if count else {}
    for name in checkpoint.layers.get(layer, ()):
        if (role := family.role(name)).expert is not None and role.expert >= count:
            raise CheckpointError(f"{name} is expert {role.expert} of layer {layer}, but config.json gives that layer "
                                  f"{count} experts.")
    first: dict[str, tuple[tuple[int, ...], str]] = {}
    for name, suffix in expected.items():
        info = checkpoint.info(name)
        if first.setdefault(suffix, (info.shape, info.dtype)) != (info.shape, info.dtype):
            raise CheckpointError(f"{name} has shape {list(info.shape)} ({info.dtype}), its neighbours have "
                                  f"{list(first[suffix][0])} ({first[suffix][1]}).")
        if suffix in family.row_names and info.shape[:1] != (count,):
            raise CheckpointError(f"{name} has shape {list(info.shape)}, but config.json counts {count} experts in "
                                  f"layer {layer}.")
        if "bias" not in suffix and hidden not in info.shape:
            raise CheckpointError(f"{name} has shape {list(info.shape)}, but config.json says hidden_size {hidden}.")


def _expert_names(family: Family, prefix: str, count: int) -> dict[str, str]:
    """Disk name → suffix of every router and expert tensor that a layer of `count` experts must have."""
    names = {prefix + suffix: suffix for suffix in family.row_names}
    for part in family.expert_parts:
        names |= {prefix + part.replace("{e}", str(e)): part for e in range(count)}
    return names


def _refuse_unsupported(config: Config) -> None:
    if config.get("num_hash_layers"):
        raise ModelError(f"{config['num_hash_layers']} layers route by token hash, so their experts cannot be pruned.")
