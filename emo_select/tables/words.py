"""A run's settings in words that read well: in the setting column, in legends and in the report."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from emo_select.spec import RunSpec

_WORDLESS = {  # what has a column or word of its own
    "calibration": {"num_examples", "num_shots", "seed"}, "evaluation": {"num_shots"},
    "training": {"batch_size", "learning_rate", "epochs"},
}
_PHRASES: Mapping[str, str] = {
    "score": "ranked by {}", "num_shared": "{} shared kept", "calibration.file": "texts of {}",
    "calibration.leave_out_shots": "without shot rows", "calibration.max_length": "texts of {} tokens",
    "training.freeze": "freeze {}", "training.packing": "packed", "training.file": "trained on {}",
    "training.weight_decay": "weight decay {}", "training.clip": "clip {}", "training.warmup": "warm-up {}",
    "training.seed": "training seed {}", "training.max_length": "trained on {} tokens",
    "training.checkpoints": "{} checkpoints", "evaluation.limit": "first {} documents",
    "evaluation.max_length": "inputs of {} tokens",
}


def other_settings(spec: RunSpec) -> str | None:
    """What differs from the defaults and has no column or word of its own, such as `LoRA rank 8, freeze routed`."""
    changed = spec.model_dump(mode="json", exclude_defaults=True,
                              exclude={"model", "task", "keep_k", "method", "selects", "model_path", "model_folder"})
    words = [_phrase(name, value) for name, value in changed.items() if name not in _WORDLESS]
    for part, shown in _WORDLESS.items():
        own = changed.get(part, {})
        if part == "calibration" and spec.method == "random":  # it sees no texts; training still may
            own = {name: value for name, value in own.items() if name == "leave_out_shots"}
        words += [_phrase(f"{part}.{name}", value) for name, value in own.items() if name not in shown]
    return ", ".join(words) or None


def _phrase(name: str, value: Any) -> str:
    if name == "training.lora":
        return _lora(value)
    text = PurePath(str(value)).name if name.endswith(".file") else _plain(value)
    return _PHRASES.get(name, name.replace(".", " ").replace("_", " ") + " {}").format(text)


def _lora(changed: Mapping[str, Any]) -> str:
    """`LoRA`, and what differs from its defaults."""
    flags = {"router": "with router", "shared": "with shared experts", "merge": "merged"}
    words = [flags[name] if name in flags else f"{name} {_plain(value)}" for name, value in changed.items()]
    return " ".join(["LoRA", *words])


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return "+".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value).replace("_", " ")
