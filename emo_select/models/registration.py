"""Makes the published architectures known to transformers' Auto classes, without importing transformers for it.

`install` waits for the modules that hold the Auto registries; when a program imports them, the classes are added.
Configurations and models are separate steps because transformers imports the first registry while its own model
machinery is still half loaded.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType


def register() -> None:
    """Register configurations, models and weight conversions now; calling it again changes nothing."""
    _register_configs()
    _register_models()


def install() -> None:
    """Register as soon as transformers' Auto modules are imported, or now if they are."""
    pending = {name: action for name, action in _ACTIONS.items() if name not in sys.modules}
    for name in _ACTIONS.keys() - pending.keys():
        _ACTIONS[name]()
    if pending and not any(isinstance(finder, _AutoModules) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AutoModules())


def _register_configs() -> None:
    from transformers.models.auto.configuration_auto import AutoConfig

    from emo_select.models import config

    for cls in (config.EmoConfig, config.FlexOlmoNoQKNormPrenormConfig, config.Olmo2NoQKNormPrenormConfig):
        AutoConfig.register(cls.model_type, cls, exist_ok=True)


def _register_models() -> None:
    from transformers.conversion_mapping import (
        get_checkpoint_conversion_mapping,
        register_checkpoint_conversion_mapping,
    )
    from transformers.models.auto.modeling_auto import AutoModel, AutoModelForCausalLM

    from emo_select.models import config, dense, emo

    per_expert_on_disk = get_checkpoint_conversion_mapping("olmoe")
    for cls in (config.EmoConfig, config.FlexOlmoNoQKNormPrenormConfig):
        register_checkpoint_conversion_mapping(cls.model_type, per_expert_on_disk, overwrite=True)
    for config_class, base, causal in (
        (config.EmoConfig, emo.EmoModel, emo.EmoForCausalLM),
        (config.FlexOlmoNoQKNormPrenormConfig, emo.FlexOlmoNoQKNormPrenormModel,
         emo.FlexOlmoNoQKNormPrenormForCausalLM),
        (config.Olmo2NoQKNormPrenormConfig, dense.Olmo2NoQKNormPrenormModel, dense.Olmo2NoQKNormPrenormForCausalLM),
    ):
        AutoModel.register(config_class, base, exist_ok=True)
        AutoModelForCausalLM.register(config_class, causal, exist_ok=True)


_ACTIONS: dict[str, Callable[[], None]] = {
    "transformers.models.auto.configuration_auto": _register_configs,
    "transformers.models.auto.modeling_auto": _register_models,
}


class _AutoModules(importlib.abc.MetaPathFinder):
    """Lets the ordinary finders find the Auto modules, and runs the registration after each has been executed."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _ACTIONS:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenRegister(spec.loader, _ACTIONS[fullname])
        return spec


class _ThenRegister(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader, action: Callable[[], None]) -> None:
        self._loader, self._action = loader, action

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        self._action()
