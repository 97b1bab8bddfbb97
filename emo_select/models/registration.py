"""Makes the published architectures known to transformers' Auto classes, without importing transformers for it.

transformers keeps its own architectures as names, in tables that import a class when it is asked for. `install` adds
our names to these tables as soon as a program imports them. Adding classes instead would mean importing them there
and then, often in the middle of an import of the very modules that they derive from.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

PACKAGE = "emo_select.models"  # loads the classes below on first use
# model_type → (configuration, base model, model with a language-modelling head)
ARCHITECTURES = {
    "emo": ("EmoConfig", "EmoModel", "EmoForCausalLM"),
    "flex_olmo_noqknorm_prenorm": (
        "FlexOlmoNoQKNormPrenormConfig", "FlexOlmoNoQKNormPrenormModel", "FlexOlmoNoQKNormPrenormForCausalLM"),
    "olmo2_noqknorm_prenorm": (
        "Olmo2NoQKNormPrenormConfig", "Olmo2NoQKNormPrenormModel", "Olmo2NoQKNormPrenormForCausalLM"),
}


def register() -> None:
    """Import transformers' Auto classes with our architectures in them; calling it again changes nothing."""
    install()
    for name in _TABLES:
        importlib.import_module(name)


def install() -> None:
    """Add our names to the tables of transformers that are imported, and to the others when they will be."""
    for name, add in _TABLES.items():
        if name in sys.modules:
            add(sys.modules[name])
    if not any(isinstance(finder, _TableFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _TableFinder())


def _add_configs(table: ModuleType) -> None:
    for model_type, (config, _, _) in ARCHITECTURES.items():
        table.CONFIG_MAPPING_NAMES[model_type] = config
        table.CONFIG_MAPPING._modules[model_type] = sys.modules[PACKAGE]


def _add_models(table: ModuleType) -> None:
    for model_type, (config, base, causal) in ARCHITECTURES.items():
        for mapping, model in ((table.MODEL_MAPPING, base), (table.MODEL_FOR_CAUSAL_LM_MAPPING, causal)):
            mapping._reverse_config_mapping[config] = model_type
            mapping._model_mapping[model_type] = model
            mapping._modules[model_type] = sys.modules[PACKAGE]


_TABLES: dict[str, Callable[[ModuleType], None]] = {
    "transformers.models.auto.configuration_auto": _add_configs,
    "transformers.models.auto.modeling_auto": _add_models,
}


class _TableFinder(importlib.abc.MetaPathFinder):
    """Finds the modules with the tables as usual, and has our names added once they are executed."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _TABLES:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenAdd(spec.loader, _TABLES[fullname])
        return spec


class _ThenAdd(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader, add: Callable[[ModuleType], None]) -> None:
        self._loader, self._add = loader, add

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        self._add(module)
