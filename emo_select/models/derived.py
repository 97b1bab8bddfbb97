"""Families that were found out, remembered in the cache folder so that the next command need not import torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from emo_select.errors import ModelError
from emo_select.models.families import Family, Fused, Rows, Stored
from emo_select.spec import digest
from emo_select.storage import cache_directory, write_bytes

LAYOUT = 2  # of a record; a new one is a new name
# Of a configuration, what no shape and no name depends on.
IDLE = ("architectures", "transformers_version", "torch_dtype", "dtype", "_name_or_path", "quantization_config",
        "initializer_range", "use_cache", "attention_dropout", "router_aux_loss_coef", "output_router_logits")


def derived_family(config: Mapping[str, Any]) -> Family:
    """The family of a configuration, from the record of an earlier question or found out now.

    Raises:
        ModelError: its experts cannot be pruned; says why. This is remembered, too.
    """
    path = _path(config)
    with suppress(OSError, ValueError, KeyError, TypeError):
        found = json.loads(path.read_text(encoding="utf-8"))
        if "refused" not in found:
            return _loaded(found)
        raise ModelError(found["refused"])
    from emo_select.models.derive import derive

    try:
        family = derive(config)
    except ModelError as error:
        _remember(path, {"refused": str(error)})
        raise
    _remember(path, asdict(family))
    return family


def _path(config: Mapping[str, Any]) -> Path:
    content = {key: value for key, value in config.items() if key not in IDLE}
    return cache_directory() / "families" / f"{digest([LAYOUT, version('transformers'), content])}.json"


def _remember(path: Path, content: Mapping[str, Any]) -> None:
    with suppress(OSError):  # nothing depends on it
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, json.dumps(content).encode())


def _loaded(found: dict[str, Any]) -> Family:
    """A family from its record."""
    tuples = ("layer_classes", "router", "counts", "count_keys", "top_k_keys", "separate_shared", "disk_layers",
              "kind_of")
    *kinds, whole = ({name: tuple(shape) for name, shape in kind.items()}
                     for kind in (*found["kinds"], found["whole"]))
    rows = {key: {name: Rows(**one) for name, one in found[key].items()} for key in ("rows", "router_rows")}
    stored = {key: {name: Stored(tuple(one["parts"]), one["converted"]) for name, one in found[key].items()}
              for key in ("stored", "outside")}
    experts = tuple(Fused(one["parameter"], tuple(one["parts"]), one["converted"], Rows(**one["rows"]))
                    for one in found["experts"])
    return Family(**{**found, **{key: tuple(found[key]) for key in tuples}, **rows, **stored, "experts": experts,
                     "kinds": tuple(kinds), "whole": whole})
