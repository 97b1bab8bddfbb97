"""Finds out what a family is: builds the model twice without weights, with E and with 2·E experts, and compares.

What grows with E in memory are experts and routers. Sent through transformers' own conversion to the disk and back,
the same comparison says which stored tensor belongs to one expert, which has entries of all, along which axis, and
which ones a parameter is made of. Layers where nothing grows are dense. Which key counts experts, and which says how
many a token uses, is seen by changing it.

Legend: E experts; names within a layer are "own" names.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from emo_select.errors import ModelError
from emo_select.models.conversion import Conversion, built_config, meta_model
from emo_select.models.families import SCORING, Config, Family, Fused, Rows, Stored

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedConfig, PreTrainedModel

Shape = tuple[int, ...]
NUMBER = re.compile(r"(.*?)\.(\d+)\.(.+)")
COUNTS = re.compile(r"expert")
NO_COUNT = re.compile(r"shared|per_tok|top_?k|size|group|layer|period|offset|zero|hidden|_k$|dim|rank")
CHOSEN = re.compile(r"(?:tok(?:en)?|top_?k|top_k_experts|_k)$")
NO_CHOICE = re.compile(r"group|index|_id|norm")
PREDICTION_KEYS = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers")
# Where people have the decoder of a model that transformers also knows as a part of a larger one.
OTHER_PLACES = ("model.layers", "model.language_model.layers", "language_model.model.layers", "layers")
CONFIG_DEFAULTS = ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size", "n_group", "topk_group")


def derive(config: Config) -> Family:
    """The family of a configuration that counts experts.

    Raises:
        ModelError: transformers cannot build it, or its experts cannot be pruned one by one; says why.
    """
    return _Derivation(config).family()


@dataclass(frozen=True)
class _Count:
    """The key that counts experts: the nested part of the configuration that has it, its names there, its value."""

    section: str
    keys: tuple[str, ...]
    experts: int

    def set(self, config: Config, experts: int) -> dict[str, Any]:
        values = dict.fromkeys(self.keys, experts)
        if not self.section:
            return {**config, **values}
        return {**config, self.section: {**(config.get(self.section) or {}), **values}}


class _Derivation:
    """A configuration, its model, and the same with twice as many experts."""

    def __init__(self, config: Config) -> None:
        self.config, self.name = config, str(config.get("model_type"))
        self.built = built_config(config)
        self.model = meta_model(self.built)
        self.count, self.larger = self._counted()
        self.grown = _grown(self.model.state_dict(), self.larger.state_dict(), self.count.experts, self.name)
        if not self.grown:
            raise ModelError(f"No tensor of {self.name} grows with its number of experts: there is nothing to prune.")

    def family(self) -> Family:
        """What all this says."""
        counts = tuple(self.count.experts if layer in self.moe_layers else 0 for layer in range(self.depth))
        shared = tuple(name for name in self._children() if "shared" in name)
        groups, per_token = self._groups()
        return Family(
            self.name, self._classes(), self.fused, tuple(self.router), counts,
            count_keys=self.count.keys, top_k_keys=self._chosen, section=self.count.section,
            defaults=self._defaults(), separate_shared=shared, layers=self.layers, disk_layers=self._disk_layers(),
            moe_module=self.block, router_module=self.router_module, experts_module=self.experts_module,
            scoring=SCORING.get(self.name, "recorded"), groups=groups, groups_per_token=per_token,
            extra_layers_key=next((key for key in PREDICTION_KEYS if hasattr(self.part, key)), None),
            router_rows={name: rows for name, rows in self.grown_own.items() if not self._is_expert(name)},
            rows={name: rows for name, rows in self.disk.rows.items() if rows != Rows()}, tails=self.disk.tails,
            stored=self.stored, outside=self.outside, whole=self._whole(), kinds=tuple(self.disk.kinds.values()),
            kind_of=tuple(list(self.disk.kinds).index(kind) for kind in self.kinds))

    @property
    def part(self) -> PreTrainedConfig:
        """The part of the configuration that counts experts."""
        part: PreTrainedConfig = getattr(self.built, self.count.section) if self.count.section else self.built
        return part

    def _counted(self) -> tuple[_Count, PreTrainedModel]:
        """The key that makes parameters grow, and the model with twice its value."""
        for count in _candidates(self.built):
            try:
                larger = meta_model(built_config(count.set(self.config, 2 * count.experts)))
            except ModelError:
                continue
            if _differs(self.model, larger):
                return count, larger
        raise ModelError(f"No key of the configuration of {self.name} was found that counts its experts; "
                         "docs/families.md says how one is looked for.")

    @cached_property
    def layers(self) -> str:
        """Where the model has its decoder layers."""
        places = {match[1] for name in self.grown if (match := NUMBER.fullmatch(name))}
        if len(places) != 1 or any(not NUMBER.fullmatch(name) for name in self.grown):
            raise ModelError(f"{self.name} has experts in more places than its decoder layers "
                             f"({', '.join(sorted(places))}); they cannot be selected.")
        return places.pop()

    @cached_property
    def depth(self) -> int:
        """Number of decoder layers."""
        return sum(1 for _ in self.model.get_submodule(self.layers).children())

    def _classes(self) -> tuple[str, ...]:
        layers = self.model.get_submodule(self.layers).children()
        return tuple(dict.fromkeys(type(layer).__name__ for layer in layers))

    @cached_property
    def moe_layers(self) -> list[int]:
        return sorted({int(match[2]) for name in self.grown if (match := NUMBER.fullmatch(name))})

    @cached_property
    def layer(self) -> nn.Module:
        """The first layer with experts."""
        layer: nn.Module = self.model.get_submodule(f"{self.layers}.{self.moe_layers[0]}")
        return layer

    @cached_property
    def grown_own(self) -> dict[str, Rows]:
        """Own names of what grows in any layer."""
        return {match[3]: rows for name, rows in self.grown.items() if (match := NUMBER.fullmatch(name))}

    @cached_property
    def expert_weights(self) -> list[str]:
        """Own names of expert weights: one matrix per expert, or, where none is stacked, what takes most room."""
        shapes = {name: self.layer.state_dict()[name].shape for name in self.grown_own if name in self._own_state}
        stacked = [name for name, shape in shapes.items() if len(shape) > 2]
        most = max(shape.numel() for shape in shapes.values())
        return stacked or [name for name, shape in shapes.items() if shape.numel() == most]

    @cached_property
    def _own_state(self) -> Mapping[str, Tensor]:
        return self.layer.state_dict()

    @cached_property
    def _holder(self) -> str:
        """The module that holds all expert weights of a layer."""
        holder = _common([name.rpartition(".")[0] for name in self.expert_weights])
        if not holder:
            raise ModelError(f"{self.name} counts several sets of experts in one layer by one key "
                             f"({', '.join(self.expert_weights[:4])}), so they cannot be selected apart.")
        return holder

    def _is_expert(self, name: str) -> bool:
        return name.startswith(self._holder + ".")

    @cached_property
    def router_module(self) -> str:
        """What transformers records router logits from, else the module beside the experts with most router rows."""
        recorded = set(_router_classes(self.model))
        found: list[str] = [name for name, module in self.layer.named_modules() if type(module) in recorded]
        if len(found) == 1:
            return found[0]
        names = [name for name in self.grown_own if not self._is_expert(name) and name in self._own_state]
        if not names:
            raise ModelError(f"{self.name} has experts but no router that grows with them, so it cannot be pruned.")
        largest = max(names, key=lambda name: self._own_state[name].numel())
        return _below(_common([largest, self._holder]), largest)

    @cached_property
    def block(self) -> str:
        """The deepest module that holds router and experts; "" for the layer itself."""
        return _common([self.router_module, self._holder])

    @cached_property
    def experts_module(self) -> str:
        return _below(self.block, self._holder)

    def _children(self) -> Iterator[str]:
        """Modules of the experts' block and of the layer, own names."""
        places = dict.fromkeys((self.block, ""))
        for place in places:
            for name, _ in self.layer.get_submodule(place).named_children():
                yield f"{place}.{name}" if place else name

    @cached_property
    def kinds(self) -> list[tuple[Any, ...]]:
        """Of each layer, what tells its kind: names and shapes of its parameters."""
        found: list[dict[str, Shape]] = [{} for _ in range(self.depth)]
        for name, tensor in self.model.state_dict().items():
            if (match := NUMBER.fullmatch(name)) and match[1] == self.layers:
                found[int(match[2])][match[3]] = tuple(tensor.shape)
        return [tuple(sorted(own.items())) for own in found]

    @cached_property
    def disk(self) -> _Disk:
        """How one layer of each kind is stored, and how that grows."""
        return _Disk(self)

    @cached_property
    def router(self) -> list[str]:
        """Own names on disk that have entries of all experts and are no expert weights."""
        experts = {part for fused in self.fused for part in fused.parts}
        return sorted(name for name in self.disk.rows if name not in experts)

    @cached_property
    def fused(self) -> tuple[Fused, ...]:
        """Parameters of the experts."""
        found = {name: self.disk.sources[name] for name in self.disk.sources if self._is_expert(name)}
        return tuple(Fused(name, stored.parts, stored.converted, self.grown_own.get(name, Rows()))
                     for name, stored in found.items())

    @cached_property
    def stored(self) -> dict[str, Stored]:
        return {name: stored for name, stored in self.disk.sources.items() if not self._is_expert(name)}

    @cached_property
    def outside(self) -> dict[str, Stored]:
        """Parameters of the decoder that no layer has, or that are stored apart from their layer."""
        root, apart = self.layers.rpartition(".")[0], self.disk.apart
        own = {name: tensor for name, tensor in self.model.state_dict().items() if name.startswith(root + ".")
               and (not (match := NUMBER.fullmatch(name)) or match[1] != self.layers or match[3] in apart)}
        return _sources(self.disk.conversion, self.disk.conversion.to_disk(own), own, lambda name: name)

    def _disk_layers(self) -> tuple[str, ...]:
        """Prefixes from which transformers finds a layer's tensors, that of its own layout first."""
        usual, layer = self.disk.place, self.moe_layers[0]
        own = next(iter(self.disk.kinds[self.kinds[layer]])).replace("{e}", "0")
        wanted = self.disk.conversion.target(f"{usual}.{layer}.{own}")
        places = dict.fromkeys((usual, self.layers, *OTHER_PLACES))
        return tuple(place for place in places
                     if place == self.layers or self.disk.conversion.target(f"{place}.{layer}.{own}") == wanted)

    def _groups(self) -> tuple[int, int]:
        """Groups that the router divides experts into, and of how many a token's experts may come."""
        if getattr(self.part, "topk_method", None) == "greedy":  # deepseek_v2 then ignores its groups
            return 1, 1
        groups, per_token = (getattr(self.part, key, None) for key in ("n_group", "topk_group"))
        block = self.layer.get_submodule(self.block)
        used = any("group" in name and value == groups for module in block.modules()
                   for name, value in vars(module).items())
        return (groups, per_token or groups) if used and groups and groups > 1 else (1, 1)

    def _defaults(self) -> dict[str, Any]:
        """Of the keys that are asked for, those that the class itself has."""
        own = vars(self.part)
        aliases = dict.fromkeys(self.count.keys, self.count.experts) | dict.fromkeys(self._chosen, own[self._chosen[0]])
        return {key: own[key] for key in (*CONFIG_DEFAULTS, *PREDICTION_KEYS) if own.get(key) is not None} | aliases

    def _whole(self) -> dict[str, Shape]:
        """What is stored of the decoder outside of its layers, and its head; not what is tied to something else."""
        root, tied = self.layers.rpartition(".")[0], self.model.all_tied_weights_keys
        own = {name: tensor for name, tensor in self.model.state_dict().items() if name not in tied
               and (name.startswith((root + ".", "lm_head.")) and not name.startswith(self.layers + "."))}
        return {name: tuple(tensor.shape) for name, tensor in self.disk.conversion.to_disk(own).items()}

    @cached_property
    def _chosen(self) -> tuple[str, ...]:
        """The key that says how many experts a token uses: the experts' block has its value, and follows it."""
        found = [key for key, value in vars(self.part).items() if CHOSEN.search(key) and not NO_CHOICE.search(key)
                 and isinstance(value, int) and not isinstance(value, bool) and 0 < value <= self.count.experts]
        followed = [key for key in found if self._follows(key, getattr(self.part, key))]
        if not (followed or len(found) == 1):
            raise ModelError(f"No key of the configuration of {self.name} was found that says how many experts a token "
                             "uses; docs/families.md says how one is looked for.")
        return _names_of(self.part, (followed or found)[0])

    def _follows(self, key: str, value: int) -> bool:
        """Whether some number of the experts' block changes with the key."""
        other = value - 1 if value > 1 else value + 1
        count = _Count(self.count.section, _names_of(self.part, key), 0)
        try:
            model = meta_model(built_config(count.set(self.config, other)))
        except ModelError:
            return False
        place = ".".join(filter(None, (self.layers, str(self.moe_layers[0]), self.block)))
        pairs = zip(self.model.get_submodule(place).modules(), model.get_submodule(place).modules(), strict=False)
        return any(vars(a).get(name) == value and vars(b).get(name) == other
                   for a, b in pairs for name in vars(a) if type(vars(a)[name]) is int)


class _Disk:
    """Layers of each kind as transformers stores them, with E and with 2·E experts."""

    def __init__(self, derivation: _Derivation) -> None:
        self._d = derivation
        self.conversion = Conversion(derivation.model)
        first = {kind: derivation.kinds.index(kind) for kind in derivation.kinds}
        self.kinds: dict[tuple[Any, ...], dict[str, Shape]] = {}
        self.sources: dict[str, Stored] = {}
        self.rows: dict[str, Rows] = {}
        self.tails: dict[str, int] = {}
        self.place = ""
        self.apart: set[str] = set()  # own names in memory of what is not stored with its layer
        larger = Conversion(derivation.larger)
        for kind, layer in first.items():
            self._add(kind, layer, larger)

    def _add(self, kind: tuple[Any, ...], layer: int, larger: Conversion) -> None:
        prefix = f"{self._d.layers}.{layer}."
        mine = {name: tensor for name, tensor in self.conversion.model.state_dict().items() if name.startswith(prefix)}
        theirs = {name: tensor for name, tensor in larger.model.state_dict().items() if name.startswith(prefix)}
        stored, more = self.conversion.to_disk(mine), larger.to_disk(theirs)
        for name in self._apart(stored, layer):
            self.apart.add(name.removeprefix(prefix))
            for parameters in (mine, theirs):
                del parameters[name]
            stored, more = self.conversion.to_disk(mine), larger.to_disk(theirs)
        own, shapes = self._own(stored, layer), self._own(more, layer)
        numbered = _numbered(own, shapes)
        self.kinds[kind] = {_template(name, numbered): tuple(stored[full].shape) for name, full in own.items()}
        for template in numbered:
            before, after = (sum(_template(name, {template}) == template for name in names) for names in (own, shapes))
            if tail := before - (after - before):
                self.tails[template] = tail
        for name, full in own.items():
            if (twin := shapes.get(name)) and (rows := _rows(stored[full].shape, more[twin].shape, self._d)):
                self.rows[name] = rows
        self.sources |= _sources(self.conversion, stored, mine, lambda name: self._name(name, layer, numbered))

    def _own(self, stored: Mapping[str, Tensor], layer: int) -> dict[str, str]:
        """Own name → whole name of the tensors of a layer, which lie below one prefix that has its number."""
        matches = {name: match for name in stored if (match := NUMBER.fullmatch(name)) and int(match[2]) == layer}
        self.place = self.place or Counter(match[1] for match in matches.values()).most_common(1)[0][0]
        return {match[3]: name for name, match in matches.items() if match[1] == self.place}

    def _apart(self, stored: Mapping[str, Tensor], layer: int) -> list[str]:
        """Parameters that are stored elsewhere; ModelError if experts are among them."""
        own = set(self._own(stored, layer).values())
        found = [target for _, target, names in self.conversion.grouped(stored) if not own.issuperset(names)]
        if grown := self._d.grown.keys() & found:
            raise ModelError(f"{self._d.name} stores {min(grown)} apart from its layer, which cannot be pruned here.")
        return found

    def _name(self, name: str, layer: int, numbered: set[str]) -> str:
        return _template(name.removeprefix(f"{self.place}.{layer}.").removeprefix(f"{self._d.layers}.{layer}."),
                         numbered)


def _sources(conversion: Conversion, stored: Mapping[str, Tensor], wanted: Mapping[str, Tensor], own: Any
             ) -> dict[str, Stored]:
    """Which of the stored tensors each wanted parameter is made of, under the names that `own` gives."""
    found: dict[str, Stored] = {}
    for rule, target, names in conversion.grouped(stored):
        parts = tuple(dict.fromkeys(own(name) for name in names))
        made = rule.convert(target, model=conversion.model, config=conversion.model.config)
        for name, value in made.items():
            shape = (value[0] if isinstance(value, list) else value).shape
            if name not in wanted or shape != wanted[name].shape:
                raise ModelError(f"transformers stores {name} of {conversion.model.config.model_type} in a way that "
                                 "its own rules do not read back.")
            found[own(name)] = _made_of(rule, parts)
    if missing := wanted.keys() - {name for name in wanted if own(name) in found}:
        raise ModelError(f"transformers does not store {min(missing)} of {conversion.model.config.model_type}.")
    return found


def _made_of(rule: Any, parts: tuple[str, ...]) -> Stored:
    """Whether stacking experts, their parts joined along axis 0, is all that the rule does; parts in its order."""
    operations = [(type(op).__name__, getattr(op, "dim", None)) for op in getattr(rule, "operations", ())]
    if not operations:
        return Stored(parts)
    ordered = tuple(sorted(parts, key=lambda part: _place_in(rule.source_patterns, part)))
    plain = operations in ([("MergeModulelist", 0)], [("MergeModulelist", 0), ("Concatenate", 1)])
    return Stored(ordered, not (plain and all("{e}" in part for part in parts)))


def _place_in(patterns: list[str], part: str) -> int:
    return next((at for at, pattern in enumerate(patterns)
                 if part.endswith(pattern.replace("\\", "").rpartition("*")[2].removesuffix("$"))), len(patterns))


def _numbered(own: Mapping[str, str], more: Mapping[str, str]) -> set[str]:
    """Names with `{e}` of which there are more when there are more experts."""
    numbers: dict[str, list[set[str]]] = {}
    for at, names in enumerate((own, more)):
        for name in names:
            for template, number in _templates(name):
                numbers.setdefault(template, [set(), set()])[at].add(number)
    return {template for template, (before, after) in numbers.items() if len(after) > len(before) > 0}


def _templates(name: str) -> Iterator[tuple[str, str]]:
    parts = name.split(".")
    for at, part in enumerate(parts):
        if part.isdigit():
            yield ".".join([*parts[:at], "{e}", *parts[at + 1:]]), part


def _template(name: str, numbered: set[str]) -> str:
    return next((template for template, _ in _templates(name) if template in numbered), name)


def _grown(mine: Mapping[str, Tensor], larger: Mapping[str, Tensor], experts: int, name: str) -> dict[str, Rows]:
    """Of every parameter that grows with E, how."""
    if mine.keys() != larger.keys():
        raise ModelError(f"{name} has one module per expert in memory, which is not supported.")
    found = {}
    for key, tensor in mine.items():
        if rows := _growth(tensor.shape, larger[key].shape, experts, f"{key} of {name}"):
            found[key] = rows
    return found


def _rows(mine: Shape, larger: Shape, derivation: _Derivation) -> Rows | None:
    return _growth(mine, larger, derivation.count.experts, f"A stored tensor of {derivation.name}")


def _growth(mine: Shape, larger: Shape, experts: int, name: str) -> Rows | None:
    """One axis of a·E + t entries; None if nothing differs."""
    axes = [axis for axis, (a, b) in enumerate(zip(mine, larger, strict=True)) if a != b]
    if not axes:
        return None
    each, rest = divmod(larger[axes[0]] - mine[axes[0]], experts)
    tail = mine[axes[0]] - each * experts
    if len(axes) > 1 or rest or each < 1 or tail < 0:
        raise ModelError(f"{name} grows with the number of experts otherwise than by entries of each expert, so "
                         "experts cannot be dropped one by one.")
    return Rows(axes[0], each, tail)


def _differs(mine: PreTrainedModel, larger: PreTrainedModel) -> bool:
    other = larger.state_dict()
    return any(name not in other or tensor.shape != other[name].shape for name, tensor in mine.state_dict().items())


def _candidates(config: PreTrainedConfig) -> Iterator[_Count]:
    """Keys that may count the experts of the language model, in it and in its nested parts."""
    nested = [(name, getattr(config, name)) for name in config.sub_configs
              if not re.search("vision|audio|image|speech", name)]
    for section, part in [*reversed(nested), ("", config)]:
        for key, value in vars(part).items() if part is not None else ():
            if type(value) is int and value > 1 and COUNTS.search(key) and not NO_COUNT.search(key):
                yield _Count(section, _names_of(part, key), value)


def _names_of(part: PreTrainedConfig, key: str) -> tuple[str, ...]:
    """The key, and other names that the class has for it."""
    return (key, *(alias for alias, own in part.attribute_map.items() if own == key))


def _router_classes(model: PreTrainedModel) -> Iterator[type]:
    """Classes whose outputs transformers records as router logits."""
    for module in model.modules():
        recorders = (getattr(module, "_can_record_outputs", None) or {}).get("router_logits", [])
        for recorder in recorders if isinstance(recorders, list | tuple) else [recorders]:
            kind = getattr(recorder, "target_class", recorder)
            if isinstance(kind, type):
                yield kind


def _common(names: list[str]) -> str:
    """The longest module path that all names are below."""
    shared: list[str] = []
    for parts in zip(*(name.split(".") for name in names), strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared)


def _below(place: str, name: str) -> str:
    """The module of `place` that `name` is in."""
    depth = len(place.split(".")) if place else 0
    return ".".join(name.split(".")[:depth + 1])
