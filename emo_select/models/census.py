"""Which families were tested with this release, and what is special about each: a shipped record of the census.

`tests/census` does the testing, and holds `census.json` to what it finds.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from emo_select.models.families import Family

RECORD = Path(__file__).with_name("census.json")


@dataclass(frozen=True)
class Tested:
    """One family: what was tested with a tiny model of it (nothing: its experts cannot be pruned), and remarks."""

    family: str
    tested: tuple[str, ...]
    remarks: str


def census() -> tuple[str, list[Tested]]:
    """The release of transformers that was tested, and its families."""
    found = json.loads(RECORD.read_text(encoding="utf-8"))
    return found["transformers"], [Tested(name, tuple(one["tested"]), one["remarks"])
                                   for name, one in found["families"].items()]


def remarks(family: Family) -> str:
    """What sets a family apart, as far as its users may care."""
    parts = [
        "" if family.expert_parts else "experts fused on disk",
        f"in {family.disk_layers[0]}" if family.disk_layers[0] != "model.layers" else "",
        f"counted in {family.section}" if family.section else "",
        "not in all layers" if 0 in family.counts else "",
        "equal groups" if family.groups > 1 else "",
        "shared experts beside" if family.separate_shared else "",
        "zero or shared experts behind" if any(rows.tail for rows in family.router_rows.values()) else "",
        "may have prediction layers" if family.extra_layers_key else "",
    ]
    return ", ".join(filter(None, parts))
