"""Tensors that a checkpoint has and that its model does not use: prediction layers, and what others left behind.

Prediction layers guess further tokens for speculative decoding. transformers does not build them; engines that do read
the number of their experts from the same configuration as everyone else. They lie behind the decoder's layers
(`model.layers.61.` where the configuration counts 61), or below a name of their own (`mtp.`, `model.mtp_layers.0.`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace

from emo_select.models.families import Family, Role

PREDICTION = re.compile(r"(?:mtp|nextn)(?:$|[_s])")
# Tables that are computed, masks of old attention, and scales of caches, activations and weights that are plain now.
LEFTOVER = re.compile(r"(?:^|\.)(?:inv_freq|masked_bias|attn\.bias|\w*_scale(?:_inv)?|scale|\w*zero_point|\w*_amax)$")


def prediction_role(family: Family, name: str) -> Role | None:
    """What a tensor of a prediction layer is, its experts being those of the last layer with experts; else None."""
    last = max(layer for layer, count in enumerate(family.counts) if count)
    role = family.role(name)
    if role.layer is not None:
        return replace(role, layer=last) if role.layer >= len(family.counts) else None
    parts = name.split(".")
    start = next((at for at, part in enumerate(parts) if PREDICTION.match(part)), None)
    if start is None:
        return None
    for cut in range(start + 1, len(parts)):
        role = family.role(".".join([family.disk_layers[0], str(last), *parts[cut:]]))
        if role.kind != "other":
            return replace(role, prefix=".".join(parts[:cut]) + ".")
    return Role("other")


def unused(family: Family | None, names: Iterable[str]) -> set[str]:
    """Of tensors that a model did not ask for, those that no model would miss."""
    return {name for name in names if LEFTOVER.search(name) or (family and prediction_role(family, name))}
