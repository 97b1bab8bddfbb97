"""Models that were pruned from one full model, and the union of the experts that they keep.

Legend: all experts by their numbers in the full model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emo_select.checkpoint import Checkpoint, open_checkpoint
from emo_select.errors import KeepKError, ModelError
from emo_select.experts.keepset import KeepSet
from emo_select.experts.rules import LayerRules, layer_rules
from emo_select.finetune.merge import checked_kept, finetuned_checkpoint, kept_in
from emo_select.models.families import experts_per_layer, family_of, shared_per_layer
from emo_select.ownership import CHECKPOINT
from emo_select.progress import say
from emo_select.storage import read_json

METHOD = "composed"


@dataclass(frozen=True)
class Member:
    """One of the models, opened."""

    name: str
    checkpoint: Checkpoint
    metadata: Mapping[str, Any]
    kept: Sequence[Sequence[int]]
    """Per layer; empty for dense ones."""
    selection: KeepSet | None

    @property
    def finetuned(self) -> bool:
        """Whether it is a checkpoint of a training."""
        return bool(CHECKPOINT.fullmatch(self.checkpoint.directory.name)) and self.name.rpartition("-")[2] != "0"


def open_member(child: Path, full: Checkpoint, model: str, opened: ExitStack) -> Member:
    """A run directory's last checkpoint, or the checkpoint itself.

    Raises `ModelError` or `CheckpointError` where it was not pruned from `full`.
    """
    source, metadata_file = finetuned_checkpoint(child)
    stored, metadata = opened.enter_context(open_checkpoint(source)), read_json(metadata_file)
    checkpoint = stored if stored.formats.unread else stored.plain()
    kept = checked_kept(full, checkpoint, kept_in(full, metadata, model, str(child)))
    where = (folder / "selection.json" for folder in (child, child.parent, child.parent.parent))
    selection = next((KeepSet.load(path) for path in where if path.is_file()), None)
    return Member(_name_of(source), checkpoint, metadata, kept, selection)


def _name_of(source: Path) -> str:
    """How a record calls it: by the end of its path, the run included."""
    parts = source.resolve().parts
    inner = 2 if parts[-1] == "selected_model" else 3 if CHECKPOINT.fullmatch(parts[-1]) else 1
    return "/".join(parts[-inner:])


def union_of(full: Checkpoint, members: Sequence[Member], model: str, *, uniform: bool) -> KeepSet:
    """The experts of `full` that any member keeps; `uniform` fills every layer up to the largest one.

    Raises `KeepKError` where layers would differ and the family's config cannot say so, `ModelError` for a family whose
    experts are not one row each of what holds all of them.
    """
    family = family_of(full.config)
    if family.rows or family.tails:
        raise ModelError(f"Models of {family.name} cannot be composed: what holds all of its experts has not one row "
                         "for each.")
    union = [sorted({expert for kept in layers for expert in kept})
             for layers in zip(*(member.kept for member in members), strict=True)]
    if uniform:
        union = _filled(full, members, union)
    sizes = {len(kept) for kept in union if kept}
    if len(sizes) > 1 and not family.per_layer_keys:
        raise KeepKError(f"Together they keep {min(sizes)} to {max(sizes)} experts per layer, and a {family.name} "
                         "config cannot give layers different numbers; pass --uniform to fill the smaller ones up.")
    shared = zip(union, experts_per_layer(full.config), shared_per_layer(full.config), strict=True)
    return KeepSet(experts=tuple(tuple(kept) or None for kept in union), method=METHOD, keep_k=max(sizes), model=model,
                   fingerprint=full.forward_fingerprint, task=_tasks(members),
                   num_shared=max(sum(expert >= count - last for expert in kept) for kept, count, last in shared))


def _tasks(members: Sequence[Member]) -> str | None:
    found = [str(member.metadata["task"]) for member in members if member.metadata.get("task")]
    return " + ".join(dict.fromkeys(found)) or None


def _filled(full: Checkpoint, members: Sequence[Member], union: Sequence[Sequence[int]]) -> list[list[int]]:
    """Every group of every layer with as many routed experts as the largest one, by what the selections ranked next."""
    rules = layer_rules(full.config)
    goal = max(len(set(group) & set(kept)) for rule, kept in zip(rules, union, strict=True) if rule
               for group in _groups(rule))
    ranked = [member.selection for member in members
              if member.selection and member.selection.fingerprint == full.forward_fingerprint]
    if not any(selection.scores for selection in ranked):
        say("None of them has a selection.json with scores beside it; layers are filled up from the lowest number.")
    filled = []
    for layer, (rule, kept) in enumerate(zip(rules, union, strict=True)):
        chosen = set(kept)
        for group in _groups(rule) if rule else ():
            free = sorted(set(group) - chosen, key=lambda expert: (_rank(ranked, layer, expert), expert))
            chosen |= set(free[: goal - len(chosen & set(group))])
        filled.append(sorted(chosen))
    return filled


def _groups(rule: LayerRules) -> list[range]:
    size = rule.routed // rule.groups
    return [range(first, first + size) for first in range(0, rule.routed, size)]


def _rank(selections: Sequence[KeepSet], layer: int, expert: int) -> int:
    """How many experts of the layer were scored higher, summed over the selections that scored them."""
    scored = [scores for selection in selections if selection.scores and (scores := selection.scores[layer])]
    return sum(sum(score > scores[expert] for score in scores) for scores in scored)
