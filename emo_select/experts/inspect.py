"""Looking at keep sets: how much of the routing they cover, and how much they have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emo_select.errors import SpecError
from emo_select.experts.keepset import KeepSet

SELECTION = "selection.json"


@dataclass(frozen=True)
class LayerView:
    """One MoE layer of a keep set.

    `coverage` is the part of the layer's routed score that the kept routed experts hold (1.0 if all are kept), for
    router probability the probability mass that stays; None without scores.
    """

    layer: int
    experts: int | None
    kept: int
    coverage: float | None
    best: int | None
    """The routed expert with the highest score."""


@dataclass(frozen=True)
class Overlap:
    """Two keep sets of one model: mean Jaccard index of their routed experts over the MoE layers, and per layer."""

    first: str
    second: str
    mean: float
    layers: tuple[float | None, ...]


def find_selections(paths: Sequence[Path]) -> dict[str, KeepSet]:
    """Every selection.json named by or below `paths`, by a label that tells them apart.

    Raises:
        SpecError: there is none. CheckpointError: one is damaged.
    """
    found = [file for path in paths for file in ([path] if path.is_file() else sorted(path.rglob(SELECTION)))]
    files = list(dict.fromkeys(file.resolve() for file in found if not file.parent.name.startswith(".")))
    if not files:
        raise SpecError(f"There is no {SELECTION} in {', '.join(map(str, paths)) or '.'}; select experts first.")
    return {_label(file, files): KeepSet.load(file) for file in files}


def layer_views(keep_set: KeepSet) -> list[LayerView]:
    """What each MoE layer keeps."""
    return [_view(keep_set, layer, kept) for layer, kept in enumerate(keep_set.experts) if kept is not None]


def mean_coverage(keep_set: KeepSet) -> float | None:
    """Coverage averaged over the MoE layers; None without scores."""
    found = [view.coverage for view in layer_views(keep_set) if view.coverage is not None]
    return sum(found) / len(found) if found else None


def jaccard(first: KeepSet, second: KeepSet) -> list[float | None]:
    """|A ∩ B| / |A ∪ B| of the routed experts that two keep sets keep in each layer, None for dense layers.

    Shared experts are left out: every keep set has them, so they would only raise the figure.
    """
    rows = zip(first.experts, second.experts, strict=True)
    return [None if a is None or b is None else _index(_routed(first, a), _routed(second, b)) for a, b in rows]


def overlaps(selections: Mapping[str, KeepSet]) -> list[Overlap]:
    """Every pair of keep sets that belong to models of the same shape."""
    names = list(selections)
    pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1:] if _comparable(selections[a], selections[b])]
    return [_overlap(a, b, jaccard(selections[a], selections[b])) for a, b in pairs]


def as_data(selections: Mapping[str, KeepSet]) -> dict[str, Any]:
    """All of the above as plain data."""
    return {
        "selections": [{
            "name": name, "model": keep_set.model, "task": keep_set.task, "method": keep_set.method,
            "score": keep_set.score, "keep_k": keep_set.keep_k, "num_examples": keep_set.num_examples,
            "coverage": mean_coverage(keep_set), "layers": [vars(view) for view in layer_views(keep_set)],
        } for name, keep_set in selections.items()],
        "overlaps": [vars(overlap) for overlap in overlaps(selections)],
    }


def _view(keep_set: KeepSet, layer: int, kept: Sequence[int]) -> LayerView:
    scores = keep_set.scores[layer] if keep_set.scores else None
    if scores is None:
        return LayerView(layer, None, len(kept), None, None)
    routed = range(len(scores) - _shared(keep_set, kept, len(scores)))
    total = sum(scores[expert] for expert in routed)
    covered = sum(scores[expert] for expert in kept if expert in routed) / total if total else None
    return LayerView(layer, len(scores), len(kept), covered, max(routed, key=scores.__getitem__))


def _shared(keep_set: KeepSet, kept: Sequence[int], experts: int) -> int:
    """Shared experts among `kept`: the last ones, as many as the keep set says a layer keeps at most."""
    last = [expert for expert in kept if expert >= experts - keep_set.num_shared]
    return len(last)


def _routed(keep_set: KeepSet, kept: Sequence[int]) -> set[int]:
    return set(kept[:len(kept) - keep_set.num_shared] if keep_set.num_shared else kept)


def _index(a: set[int], b: set[int]) -> float:
    return len(a & b) / len(a | b) if a | b else 1.0


def _comparable(a: KeepSet, b: KeepSet) -> bool:
    return [kept is None for kept in a.experts] == [kept is None for kept in b.experts]


def _overlap(first: str, second: str, layers: list[float | None]) -> Overlap:
    found = [value for value in layers if value is not None]
    return Overlap(first, second, sum(found) / len(found), tuple(layers))


def _label(file: Path, files: Sequence[Path]) -> str:
    """The folder, below what all files have in common."""
    folders = [other.parent for other in files]
    if len(set(folders)) == 1:
        return file.parent.name
    common = Path(*_common_parts([folder.parts for folder in folders]))
    return str(file.parent.relative_to(common))


def _common_parts(parts: Sequence[tuple[str, ...]]) -> list[str]:
    same = []
    for column in zip(*parts, strict=False):
        if len(set(column)) > 1:
            break
        same.append(column[0])
    return same
