"""One checkpoint from several pruned models: the union of the experts that they keep, in their original order.

The experts come from the model that all of them were pruned from or, where that is asked, from the finetuned ones:
what one of them changed is taken from it, what several changed is a collision. All is known before the first write.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from emo_select import ownership
from emo_select.checkpoint import Checkpoint, ShardedWriter, assign_shards, open_checkpoint
from emo_select.checkpoint.card import write_card
from emo_select.checkpoint.companions import companions, copy_companions
from emo_select.checkpoint.sources import passed_on
from emo_select.errors import SpecError
from emo_select.experts.keepset import KeepSet
from emo_select.experts.provenance import METADATA, provenance_files
from emo_select.experts.prune import REPLACED, PrunePlan, describe_plan, finite_pieces, parse_size, plan_prune
from emo_select.faults import translated
from emo_select.finetune.changes import Changes, changed_pieces, changes_in
from emo_select.finetune.members import Member, open_member, union_of
from emo_select.finetune.merge import Group
from emo_select.progress import say, track
from emo_select.spec import digest
from emo_select.storage import require_space, staged_directory

NAMES: Mapping[Group, str] = {"routed": "routed experts", "router": "router rows", "shared": "shared experts",
                              "rest": "attention, norms, embeddings or head"}


@dataclass(frozen=True)
class ComposeOptions:
    """What is taken from finetuned models, and what becomes of collisions."""

    finetuned: bool = False
    """Take the routed experts that finetuning changed."""
    router: bool = False
    """Their router rows, too."""
    shared: bool = False
    """Shared experts, too."""
    rest: bool = False
    """Attention, norms, embeddings, head and dense layers, too."""
    collisions: Literal["refuse", "average"] = "refuse"
    """What several models changed is refused, or the mean of their values is taken."""
    uniform: bool = False
    """Fill every layer up to the largest one, with the experts that the selections ranked next."""
    max_shard_size: str | int | None = None
    """As of `prune_checkpoint`."""

    @property
    def wanted(self) -> set[Group]:
        """Groups whose finetuned values are taken."""
        more: set[Group] = {group for group in ("router", "shared", "rest") if getattr(self, group)}
        return {"routed", *more} if self.finetuned else set()


@translated()
def compose(children: Sequence[str | Path], model: str, out_dir: Path, options: ComposeOptions = ComposeOptions(), *,
            dry_run: bool = False) -> dict[str, Any]:
    """Write the union of `children`, each a run directory or a checkpoint pruned from `model`; returns a summary.

    A run's last checkpoint counts. Without `finetuned` the result is `model` pruned to the union, byte for byte. An
    interrupted call goes on with the shard it was in.

    Raises, before anything is written: `ModelError` or `CheckpointError` where a child was not pruned from `model`,
    `SpecError` for collisions that are refused, `KeepKError`, `OwnershipError`, `DiskSpaceError`.
    """
    _check(children, options)
    with ExitStack() as opened:
        stored = opened.enter_context(open_checkpoint(model))
        full = stored.plain() if options.finetuned else stored  # what was trained has plain numbers
        members = [open_member(Path(child), full, model, opened) for child in children]
        sources = [full.directory, *(member.checkpoint.directory for member in members)]
        ownership.require_replaceable(out_dir, *sources)
        companions(full.directory)  # refuses links
        keep_set = union_of(full, members, model, uniform=options.uniform)
        plan = plan_prune(full, keep_set, allow_nonuniform=True)
        changes = changes_in(full, members, plan.copies) if options.finetuned else {}
        taken = _taken(changes, options)
        _say_what_stays(changes, members, options)
        record = _record(members, taken, options)
        if not dry_run:
            require_space(out_dir.parent, plan.total_bytes, "The composed model")
            key = digest([full.fingerprint, [member.checkpoint.fingerprint for member in members], record])
            with staged_directory(out_dir, key, ownership.COMPOSED, sources) as folder:
                _write(full, plan, taken, options, folder)
                _describe(full, plan, provenance_files(full, keep_set, model), record, folder)
        return {**describe_plan(full, plan), **_sizes(keep_set), **record}


def _check(children: Sequence[str | Path], options: ComposeOptions) -> None:
    if len({Path(child).resolve() for child in children}) < max(2, len(children)):
        raise SpecError("Name two or more models to compose, each once.")
    if (options.router or options.shared or options.rest) and not options.finetuned:
        raise SpecError("--router, --shared and --rest add to finetuned experts; pass --finetuned, too.")


def _taken(changes: Changes, options: ComposeOptions) -> Changes:
    """The changes that are asked for. Raises `SpecError` for collisions among them that are to be refused."""
    taken = {target: change for target, change in changes.items() if change.unit.group in options.wanted}
    colliding = [change.unit for change in taken.values() if len(change.by) > 1]
    if colliding and options.collisions == "refuse":
        groups = " and ".join(NAMES[group] for group in NAMES if any(unit.group == group for unit in colliding))
        places = list(dict.fromkeys(unit.what for unit in colliding))
        raise SpecError(f"Several of them changed the same {groups}: {places[0]}"
                        + (f" and {len(places) - 1} more" if places[1:] else "")
                        + "; pass --collisions average to take the mean, or leave out what collides.")
    return taken


def _say_what_stays(changes: Changes, members: Sequence[Member], options: ComposeOptions) -> None:
    """Name what finetuning changed and the composed model does not take."""
    stays = [group for group in NAMES if any(change.unit.group == group for change in changes.values())
             and group not in options.wanted]
    if stays:
        say(f"Finetuning also changed {'; '.join(NAMES[group] for group in stays)}. They stay as in the full model; "
            f"{', '.join(f'--{group}' for group in stays)} would take them along.")
    elif not options.finetuned and any(member.finetuned for member in members):
        say("The experts are those of the full model; --finetuned takes what finetuning made of them.")


def _record(members: Sequence[Member], taken: Changes, options: ComposeOptions) -> dict[str, Any]:
    """What pruning_metadata.json says about a composed model beside what it says about a pruned one."""
    averaged = Counter(change.unit.group for change in taken.values() if len(change.by) > 1)
    return {"composed_from": [_member_record(member, taken) for member in members], "compose_options": asdict(options),
            "collisions_averaged": dict(averaged)}


def _member_record(member: Member, taken: Changes) -> dict[str, Any]:
    tensors = Counter(change.unit.group for change in taken.values() if any(each is member for each, _ in change.by))
    about = {key: member.metadata.get(key) for key in ("task", "pruning_method", "prune_keep_k")}
    return {"model": passed_on(member.name), **about, "weights_fingerprint": member.checkpoint.content.weights,
            "experts_kept_per_layer": [list(kept) or None for kept in member.kept], "changes_taken": dict(tensors)}


def _sizes(keep_set: KeepSet) -> dict[str, int]:
    sizes = [len(kept) for kept in keep_set.experts if kept]
    return {"smallest_layer": min(sizes), "largest_layer": max(sizes)}


def _write(full: Checkpoint, plan: PrunePlan, taken: Changes, options: ComposeOptions, folder: Path) -> None:
    changed, copies = {target.tensor for target in taken}, {copy.spec.name: copy for copy in plan.copies}
    shards = assign_shards((copy.spec for copy in plan.copies), parse_size(options.max_shard_size))
    with ShardedWriter(folder, shards) as out, track("Writing experts (GB)", plan.total_bytes / 1e9) as bar:
        for name in out.missing():
            copy = copies[name]
            out.write_bytes(name, changed_pieces(full, copy, taken) if name in changed else finite_pieces(full, copy))
            bar.advance(copy.spec.bytes / 1e9)


def _describe(full: Checkpoint, plan: PrunePlan, files: dict[str, Any], record: Mapping[str, Any], folder: Path
              ) -> None:
    """Everything beside the weights."""
    copy_companions(full.directory, folder, without=REPLACED)
    files[METADATA] |= record
    files["config.json"] = plan.config
    for name, value in files.items():  # the folder is flushed as a whole before it appears
        (folder / name).write_text(json.dumps(value, indent=1) + "\n")
    write_card(folder, full.directory)
