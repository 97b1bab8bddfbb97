"""What finetuning changed in models pruned from one full model: tensor by tensor or, where a tensor has a row per
expert, row by row. A block of a tensor is in memory at a time, of each model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from emo_select.checkpoint import Checkpoint
from emo_select.errors import CheckpointError, NumericError
from emo_select.experts.prune import Copy
from emo_select.finetune.freezing import routed_per_layer
from emo_select.finetune.members import Member
from emo_select.finetune.merge import Group, group_of, torch_dtype
from emo_select.models.families import family_of
from emo_select.progress import track

if TYPE_CHECKING:
    import torch

BLOCK_BYTES = 1 << 24


@dataclass(frozen=True)
class Place:
    """A tensor on disk, or one row of it."""

    tensor: str
    row: int | None = None


@dataclass(frozen=True)
class Unit:
    """What collides as a whole: a tensor of the new model, or the row of one expert in it."""

    target: Place
    source: Place
    """Where the full model has it."""
    group: Group
    what: str
    """For people: "expert 3 of layer 0"."""
    candidates: tuple[tuple[Member, Place], ...]
    """The members that have it, and where."""


@dataclass(frozen=True)
class Change:
    """A unit, and those of its candidates that differ from the full model (one at least)."""

    unit: Unit
    by: tuple[tuple[Member, Place], ...]


Changes = Mapping[Place, Change]  # by target


def changes_in(full: Checkpoint, members: Sequence[Member], copies: Sequence[Copy]) -> dict[Place, Change]:
    """All that differs from the full model, of what a plan copies; every model is read once.

    Raises `CheckpointError` where shapes differ.
    """
    found = {}
    with track("Comparing (GB)", sum(copy.spec.bytes for copy in copies) / 1e9) as bar:
        for copy in copies:
            for unit in _units(full, members, copy):
                by = tuple((member, place) for member, place in unit.candidates
                           if _differs(full, unit.source, member.checkpoint, place))
                if by:
                    found[unit.target] = Change(unit, by)
            bar.advance(copy.spec.bytes / 1e9)
    return found


def changed_pieces(full: Checkpoint, copy: Copy, changes: Changes) -> Iterator[memoryview]:
    """The bytes of a tensor of the new model, with what was changed in it; several changes become their mean.

    Raises `NumericError` for NaN and infinite values.
    """
    import torch

    name, rows = copy.spec.name, copy.rows
    targets = [(Place(name), Place(copy.source))] if rows is None else [
        (Place(name, at), Place(copy.source, row)) for at, row in enumerate(rows)]
    for target, source in targets:
        by = changes[target].by if target in changes else ()
        for block in _blocks(full, source):
            value = _mean(full, source, by, block)
            if not torch.isfinite(value).all():
                raise NumericError(f"{name} would hold NaN or infinite values; look at the models that it comes from.")
            yield value.contiguous().view(-1).view(torch.uint8).numpy().data


def _units(full: Checkpoint, members: Sequence[Member], copy: Copy) -> Iterator[Unit]:
    family, routed = family_of(full.config), routed_per_layer(full.config)
    name, role = copy.source, family.role(copy.source)
    if role.layer is None or role.kind == "other":
        group = group_of(family, name, None, routed)
        yield Unit(Place(copy.spec.name), Place(name), group, name, tuple((each, Place(name)) for each in members))
        return
    experts = [role.expert] if copy.rows is None else copy.rows
    for at, expert in enumerate(experts):
        if expert is None:
            continue
        having = [(each, list(each.kept[role.layer]).index(expert)) for each in members
                  if expert in each.kept[role.layer]]
        group, what = group_of(family, name, expert, routed), f"expert {expert} of layer {role.layer}"
        if copy.rows is not None:
            places = tuple((each, Place(name, row)) for each, row in having)
            yield Unit(Place(copy.spec.name, at), Place(name, expert), group, what, places)
        else:
            pattern = role.prefix + role.suffix
            places = tuple((each, Place(pattern.replace("{e}", str(number)))) for each, number in having)
            yield Unit(Place(copy.spec.name), Place(name), group, what, places)


def _differs(full: Checkpoint, source: Place, child: Checkpoint, place: Place) -> bool:
    """Whether values differ, in the child's precision: casting is no change."""
    import torch

    start = 0 if source.row is None else 1
    old, new = full.info(source.tensor).shape, child.info(place.tensor).shape
    if old[start:] != new[start:]:
        raise CheckpointError(f"{place.tensor} is {list(new)} in {child.directory} and {list(old)} in the full model.")
    dtype = torch_dtype(child.info(place.tensor).dtype)
    return any(not torch.equal(_read(full, source, block).to(dtype), _read(child, place, block))
               for block in _blocks(full, source))


def _blocks(full: Checkpoint, source: Place) -> Iterator[Sequence[int] | None]:
    """Rows that are read together; None: everything at once."""
    info = full.info(source.tensor)
    if source.row is not None or not info.shape or info.bytes <= BLOCK_BYTES:
        yield None
        return
    step = max(1, BLOCK_BYTES * info.shape[0] // info.bytes)
    yield from (range(first, min(first + step, info.shape[0])) for first in range(0, info.shape[0], step))


def _read(checkpoint: Checkpoint, place: Place, block: Sequence[int] | None) -> torch.Tensor:
    return checkpoint.read(place.tensor, block if place.row is None else [place.row])


def _mean(full: Checkpoint, source: Place, by: Sequence[tuple[Member, Place]], block: Sequence[int] | None
          ) -> torch.Tensor:
    """The mean of what members made of it, with at least float32 arithmetic; the full model's value where none did."""
    import torch

    dtype = torch_dtype(full.info(source.tensor).dtype)
    if not by:
        return _read(full, source, block)
    values = [_read(member.checkpoint, place, block) for member, place in by]
    if len(values) == 1:
        return values[0].to(dtype)
    exact = torch.promote_types(dtype, torch.float32)
    return torch.stack([value.to(exact) for value in values]).mean(0).to(dtype)
