"""transformers' own rules between the tensors on disk and the parameters in memory, applied in both directions.

Works on real tensors and on those of the meta device, where only shapes are known.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from copy import deepcopy
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from emo_select.errors import ModelError
from emo_select.models.startup import import_models

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

Tensors = Mapping[str, "torch.Tensor"]


def built_config(config: Mapping[str, Any]) -> PreTrainedConfig:
    """The configuration as transformers' class for it.

    Raises:
        ModelError: transformers does not know the architecture, or a value is not valid.
    """
    from huggingface_hub.errors import StrictDataclassError

    from emo_select.models.registration import register

    register()
    from transformers import CONFIG_MAPPING

    model_type = config.get("model_type")
    if model_type not in CONFIG_MAPPING:
        raise ModelError(f"The installed transformers does not know model_type {model_type!r}; a newer release may "
                         "(pip install -U transformers).")
    values = {key: value for key, value in config.items() if key != "quantization_config"}
    try:
        return CONFIG_MAPPING[model_type].from_dict(_plain(values))
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, StrictDataclassError) as error:
        raise ModelError(f"The configuration cannot be used: {_sentence(error)}") from error


def auto_class(config: PreTrainedConfig) -> Any:
    """transformers' automatic class that builds language models of this kind: of some, only with their image part."""
    import_models()
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    only_with_images = (type(config) in AutoModelForImageTextToText._model_mapping
                        and type(config) not in AutoModelForCausalLM._model_mapping)
    return AutoModelForImageTextToText if only_with_images else AutoModelForCausalLM


def meta_model(config: PreTrainedConfig) -> PreTrainedModel:
    """The language model of a configuration, without weights.

    Raises:
        ModelError: transformers has no language model for it, or it cannot be built.
    """
    import torch

    try:
        with torch.device("meta"):
            return auto_class(config).from_config(config, trust_remote_code=False)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, ZeroDivisionError) as error:
        raise ModelError(f"The configuration cannot be built: {_sentence(error)}") from error


class Conversion:
    """The rules that transformers has for a model."""

    def __init__(self, model: PreTrainedModel) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        rules = get_model_conversion_mapping(model)
        self.model, self._names = model, model.state_dict()
        self._renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        self._converters = [rule for rule in rules if isinstance(rule, WeightConverter)]

    @classmethod
    def of(cls, config: str) -> Conversion:
        """The rules for a configuration, given as JSON."""
        return _conversion(config)

    def to_disk(self, parameters: Tensors) -> dict[str, torch.Tensor]:
        """What transformers saves of these parameters."""
        from transformers.core_model_loading import revert_weight_conversion

        tensors: dict[str, torch.Tensor] = revert_weight_conversion(self.model, dict(parameters))
        return tensors

    def grouped(self, tensors: Tensors) -> list[tuple[Any, str, list[str]]]:
        """Rules as (converter holding its tensors, first target, names on disk): what transformers does on loading."""
        from transformers.core_model_loading import WeightRenaming, dot_natural_key

        by_pattern = {pattern: rule for rule in self._converters for pattern in rule.source_patterns}
        renamings = deepcopy(self._renamings)  # some remember what they have seen
        groups: dict[str, tuple[Any, list[str]]] = {}
        for name in sorted(tensors, key=dot_natural_key):
            target, pattern = self._target(name, renamings)
            fresh = deepcopy(by_pattern[pattern]) if pattern is not None else WeightRenaming(name, target)
            rule, names = groups.setdefault(target, (fresh, []))
            rule.add_tensor(target, name, name if pattern is None else pattern, tensors[name])
            names.append(name)
        return [(rule, target, names) for target, (rule, names) in groups.items()]

    def target(self, name: str) -> tuple[str, str | None]:
        """The first parameter that a tensor on disk goes to, and the pattern of its converter, if it has one."""
        return self._target(name, deepcopy(self._renamings))

    def _target(self, name: str, renamings: list[Any]) -> tuple[str, str | None]:
        from transformers.core_model_loading import rename_source_key

        prefix = self.model.base_model_prefix
        found = rename_source_key(name, renamings, self._converters, prefix, self._names)
        if found[0] not in self._names and name in self._names:
            found = rename_source_key(name, [], [], prefix, self._names)
        target, pattern = found
        return target, pattern

    def to_memory(self, tensors: Tensors) -> dict[str, torch.Tensor]:
        """The parameters that transformers makes of these tensors."""
        made: dict[str, torch.Tensor] = {}
        for rule, target, _ in self.grouped(tensors):
            for name, value in rule.convert(target, model=self.model, config=self.model.config).items():
                made[name] = value[0] if isinstance(value, list) else value
        return made


@lru_cache(maxsize=4)
def _conversion(config: str) -> Conversion:
    return Conversion(meta_model(built_config(json.loads(config))))


def _plain(value: Any) -> Any:
    """A copy, with the numbers that JSON has no sign for as numbers: transformers writes {"__float__": "Infinity"}."""
    if isinstance(value, Mapping):
        return float(value["__float__"]) if set(value) == {"__float__"} else {k: _plain(v) for k, v in value.items()}
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else value


def _sentence(error: BaseException) -> str:
    return " ".join((str(error) or type(error).__name__).split())[:300]
