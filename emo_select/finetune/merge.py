"""Put finetuned experts back into the model they were pruned from, at their original indices.

A plan made from headers says for each tensor of the full model which of its rows come from where; then one tensor
after the other is copied, replaced or averaged. Neither model is ever in memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from emo_select import ownership
from emo_select.checkpoint import Checkpoint, ShardedWriter, TensorSpec, assign_shards, open_checkpoint
from emo_select.checkpoint.companions import companions, copy_companions
from emo_select.checkpoint.header import DTYPES, SAFETENSORS_DTYPE
from emo_select.checkpoint.quantised import without_quantization
from emo_select.checkpoint.sources import passed_on
from emo_select.errors import CheckpointError, ModelError, SpecError
from emo_select.faults import translated
from emo_select.finetune.freezing import memory_kind, routed_per_layer
from emo_select.models.families import Family, Role, experts_per_layer, family_of
from emo_select.progress import say, track
from emo_select.spec import digest
from emo_select.storage import read_json, require_space, staged_directory, write_json
from emo_select.tree import RunPaths

if TYPE_CHECKING:
    import torch

METADATA, MERGED = "pruning_metadata.json", "merge_metadata.json"
Group = Literal["routed", "shared", "router", "rest"]


@dataclass(frozen=True)
class MergeOptions:
    """What goes back beside the routed experts, and how."""

    router: bool = False
    """The router rows of all kept experts, shared ones included."""
    shared: bool = False
    rest: bool = False
    """Everything else: attention, norms, embeddings, head, dense layers."""
    average: float | None = None
    """None replaces; α writes (1 − α) · full + α · finetuned."""
    dtype: str | None = None
    """Cast both models ("bfloat16", …); None keeps each tensor's own dtype."""


@dataclass(frozen=True)
class Change:
    """Where the new values of one tensor of the full model come from; rows (along `axis`) of None mean all of them."""

    source: str
    rows: tuple[int, ...] | None = None
    targets: tuple[int, ...] | None = None
    axis: int = 0


@dataclass(frozen=True)
class MergePlan:
    """Changes by name of the full model's tensors, and how many experts, rows or tensors of each group they are."""

    changes: Mapping[str, Change]
    counts: Mapping[Group, int]


@translated()
def merge_back(child: str | Path, into: str, out_dir: Path, options: MergeOptions = MergeOptions()) -> dict[str, Any]:
    """Write the model `into` with the experts of `child` in place of its own; returns what merge_metadata.json says.

    `child` is a run directory (its last checkpoint is taken) or a checkpoint with pruning_metadata.json. An
    interrupted call goes on with the shard it was in.

    Raises, before anything is written: `ModelError` or `CheckpointError` where the two do not belong together,
    `SpecError` for an α outside 0 to 1, `DiskSpaceError`.
    """
    if options.average is not None and not 0 <= options.average <= 1:
        raise SpecError(f"The averaging weight {options.average:g} is not between 0 and 1.")
    source, metadata = finetuned_checkpoint(Path(child))
    with open_checkpoint(into) as stored, open_checkpoint(source) as child_stored:
        full, tuned = stored.plain(), child_stored.plain()
        if stored.formats.weights:
            say(f"The weights of {into} are quantised ({stored.formats.method}); the merged model has plain ones.")
        companions(full.directory)  # refuses links
        ownership.require_replaceable(out_dir, full.directory, tuned.directory)
        plan = plan_merge(full, tuned, kept_in(full, read_json(metadata), into, str(child)), options)
        require_space(out_dir, full.total_bytes, "The merged model")
        record = _record(plan, options, {"into": passed_on(into), "child": passed_on(str(source.absolute())),
                                         "metadata": f"{passed_on(str(metadata.absolute().parent))}/{metadata.name}"})
        key = digest([full.fingerprint, tuned.fingerprint, record])
        with staged_directory(out_dir, key, ownership.MERGED, [full.directory, tuned.directory]) as folder:
            _write(full, tuned, plan, options, folder)
            copy_companions(full.directory, folder)
            if options.dtype or stored.formats.method:
                dtype = {"dtype": options.dtype} if options.dtype else {}
                write_json(folder / "config.json", {**without_quantization(full.config), **dtype})
            write_json(folder / MERGED, record)
    return record


def plan_merge(
    full: Checkpoint, tuned: Checkpoint, kept: Sequence[Sequence[int] | None], options: MergeOptions
) -> MergePlan:
    """Decide from headers alone what changes; `kept` lists each layer's kept experts (null: dense, or all kept)."""
    family = family_of(full.config)
    kept = checked_kept(full, tuned, kept)
    routed = routed_per_layer(full.config)
    wanted: set[Group] = {"routed"}
    wanted |= {group for group in ("router", "shared", "rest") if getattr(options, group)}
    changes: dict[str, Change] = {}
    counts: Counter[Group] = Counter()
    parts: set[str] = set()
    for name in full.tensors:
        role = family.role(name)
        if role.layer is not None and role.layer >= len(kept):
            continue  # a prediction layer, which pruning leaves out
        group, change = _change(family, role, name, kept, routed, wanted)
        if change is not None:
            require_fit(full, tuned, name, change)
            changes[name] = change
            counts[group] += 1 if change.rows is None else len(change.rows) // role.rows.each
            if group == "routed":
                parts.add(role.suffix)
    experts = max(1, len(parts))
    for group in ("routed", "shared"):
        counts[group] //= experts  # an expert is several tensors
    return MergePlan(changes, counts)


def kept_in(full: Checkpoint, metadata: Mapping[str, Any], into: str, child: str) -> Sequence[Sequence[int] | None]:
    """The numbers that a pruned model's experts have in `full`, one of the models that it was pruned from.

    Raises `ModelError` naming those where `full` is none of them. Metadata without fingerprints is taken at its word.
    """
    ancestors = metadata.get("pruned_from") or [{**metadata, "weights_fingerprint": None}]
    for one in ancestors:
        if one["weights_fingerprint"] == full.content.weights:
            return one["experts_kept_per_layer"] or []
    for one in ancestors:
        if one["weights_fingerprint"] is None:
            say(f"{child} does not say which weights it was pruned from; only shapes can be compared with {into}.")
            return one.get("experts_kept_per_layer") or []
    known = ", which was pruned from ".join(str(one["model"]) for one in reversed(ancestors))
    raise ModelError(f"{child} was pruned from {known}; {into} has other weights, so give the model that was pruned.")


def group_of(family: Family, name: str, expert: int | None, routed: Sequence[int]) -> Group:
    """The group of a tensor on disk, or of the row of `expert` in one that has a row per expert."""
    role = family.role(name)
    if role.suffix in family.router:
        return "router"
    if role.layer is not None and expert is not None:
        return "routed" if expert < routed[role.layer] else "shared"
    return "shared" if memory_kind(family, family.in_memory(name)) == "shared" else "rest"


def _change(
    family: Family,
    role: Role,
    name: str,
    kept: Sequence[Sequence[int]],
    routed: Sequence[int],
    wanted: set[Group],
) -> tuple[Group, Change | None]:
    """The group of a tensor of the full model, and its change if that group is wanted."""
    if role.kind == "expert" and role.layer is not None and role.expert is not None:
        group = group_of(family, name, role.expert, routed)
        if group not in wanted or role.expert not in kept[role.layer]:
            return group, None
        suffix = role.suffix.replace("{e}", str(kept[role.layer].index(role.expert)))
        return group, Change(role.prefix + suffix)
    if role.kind == "rows" and role.layer is not None:
        return _row_change(family, role, name, kept[role.layer], routed[role.layer], wanted)
    group = group_of(family, name, None, routed)
    return group, Change(name) if group in wanted else None


def _row_change(
    family: Family, role: Role, name: str, kept: Sequence[int], routed: int, wanted: set[Group]
) -> tuple[Group, Change | None]:
    """Router rows, or experts that are one tensor on disk: the kept rows of it."""
    group: Group = "router" if role.suffix in family.router else "routed"
    every = group == "router" or "shared" in wanted
    chosen = [(row, target) for row, target in enumerate(kept) if every or target < routed]
    if group not in wanted or not chosen:
        return group, None
    each = role.rows.each
    pairs = [(row * each + at, target * each + at) for row, target in chosen for at in range(each)]
    if group == "router":  # what lies behind the experts was trained with them
        count = family.counts[role.layer or 0]
        pairs += [(len(kept) * each + at, count * each + at) for at in range(role.rows.tail)]
    rows, targets = zip(*pairs, strict=True)
    return group, Change(name, rows, targets, role.rows.axis)


def checked_kept(
    full: Checkpoint, tuned: Checkpoint, kept: Sequence[Sequence[int] | None]
) -> list[Sequence[int]]:
    """Kept experts per layer with nulls filled in, after the two configurations and the list have been compared."""
    if full.config.get("model_type") != tuned.config.get("model_type"):
        raise ModelError(
            f"{tuned.directory} is a {tuned.config.get('model_type')} model and {full.directory} a "
            f"{full.config.get('model_type')} model; give the model that was pruned."
        )
    counts, ours = experts_per_layer(full.config), experts_per_layer(tuned.config)
    if not len(kept) == len(counts) == len(ours):
        raise CheckpointError(f"{METADATA} lists {len(kept)} layers, {full.directory} has {len(counts)}.")
    filled: list[Sequence[int]] = []
    for layer, (listed, count, own) in enumerate(zip(kept, counts, ours, strict=True)):
        chosen = list(range(own)) if listed is None else listed
        if len(chosen) != own or any(not 0 <= expert < count for expert in chosen) or (listed is None and own != count):
            raise CheckpointError(
                f"{METADATA} keeps {len(chosen)} experts of layer {layer}, the finetuned model has {own} and the full "
                f"one {count}; give the model that was pruned."
            )
        filled.append(chosen)
    return filled


def require_fit(full: Checkpoint, tuned: Checkpoint, name: str, change: Change) -> None:
    """Raise `CheckpointError` unless the new values have the shape of the old ones."""
    old, new = list(full.info(name).shape), list(tuned.info(change.source).shape)
    if change.rows is not None:
        old[change.axis] = new[change.axis] = 0
    if old != new:
        raise CheckpointError(f"{name} is {list(full.info(name).shape)} in the full model and "
                              f"{list(tuned.info(change.source).shape)} in the finetuned one.")


def _write(full: Checkpoint, tuned: Checkpoint, plan: MergePlan, options: MergeOptions, folder: Path) -> None:
    specs = []
    for name, info in full.tensors.items():
        floating = options.dtype and info.dtype in ("F64", "F32", "F16", "BF16")
        specs.append(TensorSpec(name, SAFETENSORS_DTYPE[options.dtype] if floating else info.dtype, info.shape))  # type: ignore[index]
    with ShardedWriter(folder, assign_shards(specs)) as out, track("Merging", len(specs)) as bar:
        missing = set(out.missing())
        for spec in specs:
            if spec.name in missing:
                _write_tensor(full, tuned, plan.changes.get(spec.name), options.average, spec, out)
            bar.advance()


def _write_tensor(
    full: Checkpoint,
    tuned: Checkpoint,
    change: Change | None,
    average: float | None,
    spec: TensorSpec,
    out: ShardedWriter,
) -> None:
    if change is None and full.info(spec.name).dtype == spec.dtype:
        out.write_bytes(spec.name, full.pieces(spec.name))
        return
    dtype = torch_dtype(spec.dtype)
    value = full.read(spec.name).to(dtype)
    if change is not None:
        new = tuned.read(change.source, change.rows, change.axis).to(dtype)
        value = _merged(value, new, change, average)
    out.write(spec.name, value)


def _merged(old: torch.Tensor, new: torch.Tensor, change: Change, average: float | None) -> torch.Tensor:
    if change.targets is None:
        return _blended(old, new, average)
    import torch

    index = torch.tensor(change.targets)
    return old.index_copy_(change.axis, index, _blended(old.index_select(change.axis, index), new, average))


def _blended(old: torch.Tensor, new: torch.Tensor, average: float | None) -> torch.Tensor:
    """Replace, or average with at least float32 arithmetic."""
    import torch

    if average is None:
        return new
    exact = torch.promote_types(old.dtype, torch.float32)
    return ((1 - average) * old.to(exact) + average * new.to(exact)).to(old.dtype)


def torch_dtype(name: str) -> torch.dtype:
    import torch

    dtype: torch.dtype = getattr(torch, DTYPES[name][1])
    return dtype


def finetuned_checkpoint(child: Path) -> tuple[Path, Path]:
    """The checkpoint that `child` means, and the file that says which experts it kept."""
    run = RunPaths(child)
    steps = run.checkpoint_steps()
    source = run.checkpoint(steps[-1]) if steps else child
    if (source / "adapter_config.json").exists() and not (source / "config.json").exists():
        raise CheckpointError(f"{source} is an adapter; finetune with --lora --merge to get a checkpoint.")
    candidates = [source / METADATA, child / METADATA, run.selected_model / METADATA]
    metadata = next((path for path in candidates if path.exists()), None)
    if metadata is None:
        raise CheckpointError(f"{child} has no {METADATA}, which says what experts it kept; give a run directory.")
    return source, metadata


def _record(plan: MergePlan, options: MergeOptions, sources: Mapping[str, str]) -> dict[str, Any]:
    return {
        "parent_model": sources["into"],
        "pruned_trained_model": sources["child"],
        "pruning_metadata_source": sources["metadata"],
        "also_copy_router_rows": options.router,
        "also_copy_shared": options.shared,
        "also_copy_non_moe": options.rest,
        "n_routable_copied": plan.counts.get("routed", 0),
        "n_shared_copied": plan.counts.get("shared", 0),
        "n_router_rows_copied": plan.counts.get("router", 0),
        "n_non_moe_copied": plan.counts.get("rest", 0),
        "merge_mode": "replace" if options.average is None else "average",
        "average_weight": options.average,
    }
