"""What tables, the report and comparisons need of a run's keep set: read fast, without checking the scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic_core import from_json

from emo_select.tree import RunPaths


@dataclass(frozen=True)
class Kept:
    """Experts kept per layer, ascending, None for dense layers; and how many the largest unpruned layer has."""

    kept: list[list[int] | None]
    experts: int


def keep_set_of(directory: Path) -> Kept | None:
    """The keep set of a run directory; None where there is no readable selection.json.

    The number of experts is that of the scores, else one more than the highest kept index.
    """
    try:
        content = from_json(RunPaths(directory).selection.read_bytes())
        kept = [None if layer is None else [int(expert) for expert in layer] for layer in content["experts"]]
        scored = [len(layer) for layer in content.get("scores") or () if layer]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return Kept(kept, max([*scored, *(max(layer) + 1 for layer in kept if layer)], default=0))


def as_bits(kept: Sequence[int], total: int) -> str:
    """Kept indices as hexadecimal digits, expert 0 in the highest bit of the first digit."""
    width = -(-total // 4)
    number = sum(1 << (4 * width - 1 - index) for index in kept)
    return f"{number:0{width}x}"
