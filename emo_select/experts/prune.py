"""Prune a checkpoint on disk: a plan made from headers, checked whole, then a loop that moves bytes.

The model is never built. Kept experts are renumbered, router rows and fused tensors sliced, everything else is
copied byte for byte; memory use is one piece of a tensor.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from emo_select.checkpoint import Checkpoint, ShardedWriter, TensorSpec, assign_shards, open_checkpoint
from emo_select.checkpoint.card import CARD, write_card
from emo_select.checkpoint.companions import companions, copy_companions
from emo_select.checkpoint.finite import all_finite
from emo_select.checkpoint.header import DTYPES, SAFETENSORS_DTYPE
from emo_select.checkpoint.quantised import Quantised
from emo_select.checkpoint.reader import INDEX
from emo_select.errors import CheckpointError, KeepKError, NumericError, SpecError, keywords_checked
from emo_select.experts.keepset import (
    KeepSet,
    check_keep_set,
    pruned_top_k,
    shared_kept,
    top_k_notice,
)
from emo_select.experts.provenance import EXPERTS, MASK, METADATA, provenance_files
from emo_select.experts.pruned_formats import check_unread, pruned_quantization, renumbered, serves_all_experts
from emo_select.faults import translated
from emo_select.models.families import (
    COUNT_KEYS,
    FLOATING,
    Family,
    Role,
    always_active_per_layer,
    experts_per_layer,
    family_of,
    top_k,
)
from emo_select.models.preflight import check_weights
from emo_select.models.unused import prediction_role
from emo_select.ownership import PRUNED, require_replaceable
from emo_select.progress import say, say_once, track
from emo_select.storage import link_or_copy, require_space, staged_directory, write_bytes

WORKERS = min(4, os.cpu_count() or 1)  # more gain nothing on one disk
PART_BYTES = 4_000_000
Prediction = Literal["drop", "prune", "keep"]
REPLACED = frozenset({"config.json", INDEX, METADATA, EXPERTS, MASK, CARD})


@dataclass(frozen=True)
class Copy:
    """One tensor of the pruned checkpoint: what it becomes, where it comes from, which rows of `axis` (None: all)."""

    spec: TensorSpec
    source: str
    rows: tuple[int, ...] | None = None
    axis: int = 0


@dataclass(frozen=True)
class PrunePlan:
    """All that will be written. `copies` are in the source's order."""

    copies: tuple[Copy, ...]
    config: dict[str, Any]
    dropped_layers: int  # prediction layers that are left out
    prediction_layers: int = 0  # those that there are

    @property
    def total_bytes(self) -> int:
        """Bytes of the pruned checkpoint's tensors."""
        return sum(copy.spec.bytes for copy in self.copies)


@keywords_checked
@translated()
def prune_checkpoint(source: str | Path, keep_set: KeepSet, out_dir: Path, *, dtype: str | None = None,
                     max_shard_size: str | int | None = None, metadata: Mapping[str, Any] | None = None,
                     allow_nonuniform: bool = False, dequantize: bool = False, prediction: Prediction = "drop"
                     ) -> None:
    """Write the pruned checkpoint to `out_dir`, which appears by rename when all of it is on disk.

    A call that was interrupted goes on with the shard it was in. With every expert kept and neither `dtype` nor
    `max_shard_size`, shards become hard links to the source's.

    Args:
        source: folder, Hub id or demo/NAME.
        keep_set: experts to keep, of this very model.
        out_dir: replaced if it exists and this package made it.
        dtype: cast floating-point weights ("bfloat16", "float32", "float16"); None keeps each tensor's own.
        max_shard_size: "5GB", "500MB" or bytes; None means 5 GB.
        metadata: entries that replace those of pruning_metadata.json.
        allow_nonuniform: accept different numbers of experts per layer where the family's config can say so.
        dequantize: write quantised weights as the numbers they stand for, in `dtype` or the configuration's.
        prediction: what becomes of prediction layers, which transformers does not load: "drop"; "prune" keeps them with
            the experts that the last layer keeps; "keep" copies them whole.

    Raises:
        ModelError, CheckpointError, KeepKError, SpecError, OwnershipError, DiskSpaceError: before anything is written.
        NumericError: a weight is NaN or infinite, named with layer and expert.
    """
    target = stored_dtype(dtype)
    with open_checkpoint(source) as opened:
        checkpoint = opened.plain(target) if dequantize else opened
        require_replaceable(out_dir, checkpoint.directory)
        companions(checkpoint.directory)  # refuses links
        if keep_set.fingerprint not in (None, checkpoint.forward_fingerprint):
            say(f"The selection was made on other weights or another config than {source} has now.")
        plan = plan_prune(checkpoint, keep_set, dtype=target, allow_nonuniform=allow_nonuniform, prediction=prediction)
        _say_prediction(plan, prediction)
        notice = top_k_notice(checkpoint.config, [len(kept or ()) for kept in keep_set.experts])
        if notice:
            say_once(notice)
        limit = parse_size(max_shard_size)
        linkable = not (dtype or limit) and _keeps_everything(checkpoint, plan)
        require_space(out_dir.parent, 0 if linkable else plan.total_bytes, "The pruned checkpoint")
        described = provenance_files(checkpoint, keep_set, str(source))
        described[METADATA] |= {} if prediction == "drop" else {"prediction_layers": prediction}
        described[METADATA] |= metadata or {}
        key = _resume_key(checkpoint, keep_set, target, limit, [dequantize, prediction])
        with staged_directory(out_dir, key, PRUNED, [checkpoint.directory]) as folder:
            if linkable:
                _link_shards(checkpoint, folder)
            else:
                _write_shards(checkpoint, plan, folder, limit)
            copy_companions(checkpoint.directory, folder, without=REPLACED)
            described["config.json"] = plan.config
            for name, value in described.items():  # the folder is flushed as a whole before it appears
                (folder / name).write_text(json.dumps(value, indent=1) + "\n")
            write_card(folder, checkpoint.directory)


def plan_prune(checkpoint: Checkpoint, keep_set: KeepSet, *, dtype: str | None = None, allow_nonuniform: bool = False,
               prediction: Prediction = "drop") -> PrunePlan:
    """Decide from headers alone what the pruned checkpoint holds; reads no weights, writes nothing.

    `dtype` is a safetensors name, `prediction` says what becomes of prediction layers. Raises what `prune_checkpoint`
    raises before writing, except for disk space.
    """
    family = family_of(checkpoint.config)
    if checkpoint.formats.unread is None:
        check_weights(checkpoint)
    else:
        check_unread(checkpoint, family)
    check_keep_set(checkpoint.config, keep_set)
    _check_uniform(checkpoint, family, keep_set, allow_nonuniform)
    tail = max(family.tails.values(), default=0)
    new_index = [_numbers(kept or (), count, tail)
                 for kept, count in zip(keep_set.experts, family.counts, strict=True)]
    copies, predicting = [], set()
    for name in checkpoint.tensors:
        weight = checkpoint.formats.owner.get(name)
        role, place = _role_of(family, weight.name if weight else name, prediction)
        predicting |= set() if place is None else {place}
        if role and (copy := _plan_tensor(checkpoint, name, role, keep_set, new_index, dtype, weight)):
            copies.append(copy)
    found = len(predicting - {""}) or len(predicting)
    dropped = found if prediction == "drop" else 0
    config = pruned_config(checkpoint.config, family, keep_set, dtype=dtype, dropped_layers=dropped)
    config = pruned_quantization(checkpoint, config, family, new_index)
    return PrunePlan(tuple(copies), config, dropped, found)


def _role_of(family: Family, name: str, prediction: Prediction) -> tuple[Role | None, str | None]:
    """What pruning makes of a tensor (None: left out), and the prediction layer that it belongs to (None: none)."""
    predicts = prediction_role(family, name)
    if predicts is None:
        return family.role(name), None
    return {"drop": None, "prune": predicts, "keep": Role("other")}[prediction], predicts.prefix


def describe_plan(checkpoint: Checkpoint, plan: PrunePlan) -> dict[str, Any]:
    """The plan in numbers for people and machines: experts of the largest layer and bytes, before and after."""
    family = family_of(checkpoint.config)
    kept = plan.config.get("num_experts_per_layer") or [family.value(plan.config, family.count_keys[0])]
    return {"experts": max(kept), "experts_before": max(experts_per_layer(checkpoint.config)),
            "tensors": len(plan.copies), "tensors_before": len(checkpoint.tensors),
            "bytes": plan.total_bytes, "bytes_before": checkpoint.total_bytes,
            "experts_per_token": family.value(plan.config, family.top_k_keys[0]), "dropped_layers": plan.dropped_layers}


def _say_prediction(plan: PrunePlan, prediction: Prediction) -> None:
    if plan.prediction_layers:
        layers = "A prediction layer" if plan.prediction_layers == 1 else f"{plan.prediction_layers} prediction layers"
        say({"drop": f"{layers}, for speculative decoding, left out; --prediction-layers prune takes them along.",
             "prune": f"{layers} kept, with the experts of the last layer.",
             "keep": f"{layers} kept whole: engines that run them expect as many experts as config.json counts now."
             }[prediction])


def _numbers(kept: Sequence[int], count: int, tail: int) -> dict[int, int]:
    """Which number each of these of `count` experts gets; what is numbered behind all of them stays behind them."""
    return {e: i for i, e in enumerate([*kept, *range(count, count + tail)])}


def _plan_tensor(checkpoint: Checkpoint, name: str, role: Role, keep_set: KeepSet, new_index: list[dict[int, int]],
                 dtype: str | None, weight: Quantised | None) -> Copy | None:
    """What becomes of a stored tensor, which may be a part of a quantised `weight`: those are never cast."""
    info = checkpoint.tensors[name]
    casts = dtype and info.dtype in FLOATING and not weight and not name.endswith("e_score_correction_bias")
    stored = dtype if dtype and casts else info.dtype
    if role.layer is None or role.kind == "other":
        return Copy(TensorSpec(name, stored, info.shape), name)
    if role.kind == "rows":
        if serves_all_experts(weight, name, info.shape):
            return Copy(TensorSpec(name, stored, info.shape), name)
        count, axis = family_of(checkpoint.config).counts[role.layer], role.rows.axis
        rows = role.rows.entries(keep_set.experts[role.layer] or (), count)
        if len(info.shape) <= axis or info.shape[axis] != count * role.rows.each + role.rows.tail:
            raise CheckpointError(f"{name} has shape {list(info.shape)}, which does not fit {count} experts.")
        shape = (*info.shape[:axis], len(rows), *info.shape[axis + 1:])
        return Copy(TensorSpec(name, stored, shape), name, rows, axis)
    number = new_index[role.layer].get(-1 if role.expert is None else role.expert)
    return None if number is None else Copy(TensorSpec(renumbered(name, role, number), stored, info.shape), name)


def pruned_config(config: Mapping[str, Any], family: Family, keep_set: KeepSet, *, dtype: str | None = None,
                  dropped_layers: int = 0) -> dict[str, Any]:
    """config.json of the pruned checkpoint: every key that counts experts agrees, the rest stays as it is.

    `num_experts` and its twins are the smallest number that a layer keeps; layers that differ are in the per-layer
    lists. Whether the model returns router logits stays its source's choice, except where published checkpoints ask
    for them (`Family.pruned_config`): finetuning switches load balancing on by itself.
    """
    kept = [len(experts or ()) for experts in keep_set.experts]
    smallest = min(count for count in kept if count)
    counted = config.get(family.section) or {} if family.section else config
    values = dict.fromkeys((*family.count_keys, *(key for key in COUNT_KEYS if counted.get(key) is not None)), smallest)
    if pruned_top_k(config, smallest) != top_k(config):
        values |= dict.fromkeys(family.top_k_keys, pruned_top_k(config, smallest))
    new = family.changed(config, values)
    if family.listed_shared:
        new |= _pruned_shared(config, family, keep_set, per_layer=not keep_set.uniform)
    new |= _pruned_always_active(config, keep_set)
    if dropped_layers and family.extra_layers_key:
        new = family.changed(new, {family.extra_layers_key: 0})
    if dtype:
        new["torch_dtype" if "torch_dtype" in config else "dtype"] = DTYPES[dtype][1]
    return {**new, **family.pruned_config}


def _pruned_shared(config: Mapping[str, Any], family: Family, keep_set: KeepSet, *, per_layer: bool) -> dict[str, Any]:
    shared = shared_kept(config, keep_set)
    moe = [s for s, experts in zip(shared, keep_set.experts, strict=True) if experts is not None]
    new: dict[str, Any] = {}
    if config.get("num_experts_per_layer") or per_layer:
        new["num_experts_per_layer"] = [len(experts or ()) for experts in keep_set.experts]
        if config.get("num_shared_experts_per_layer") or per_layer or len(set(moe)) > 1:
            new["num_shared_experts_per_layer"] = shared
    if max(moe) != family.value(config, "num_shared_experts"):
        new["num_shared_experts"] = max(moe)
    return new


def _pruned_always_active(config: Mapping[str, Any], keep_set: KeepSet) -> dict[str, Any]:
    """Always-active experts under their new numbers; the lists differ between layers once experts are dropped."""
    active = always_active_per_layer(config)
    if not any(active):
        return {}
    renumbered = [[(kept or ()).index(e) for e in layer] for layer, kept in zip(active, keep_set.experts, strict=True)]
    if not config.get("always_active_experts_per_layer") and all(row == renumbered[0] for row in renumbered):
        return {"always_active_experts": renumbered[0]}
    return {"always_active_experts": None, "always_active_experts_per_layer": renumbered}


def _check_uniform(checkpoint: Checkpoint, family: Family, keep_set: KeepSet, allow: bool) -> None:
    sizes = [len(kept) for kept in keep_set.experts if kept is not None]
    counts = [count for count in experts_per_layer(checkpoint.config) if count]
    if keep_set.uniform or sizes == [min(keep_set.keep_k, count) for count in counts]:
        return  # layers that had fewer than keep-k to begin with are in the config already
    if not family.per_layer_keys:
        raise KeepKError(f"A {family.name} config cannot give layers different numbers of experts ({min(sizes)} to "
                         f"{max(sizes)} here); select with one keep-k.")
    if not allow:
        raise KeepKError(f"The selection keeps {min(sizes)} to {max(sizes)} experts per layer; pass --allow-nonuniform "
                         "to write such a checkpoint.")
    say("Layers keep different numbers of experts: emo-select (in vLLM, too) and the published remote code load this, "
        "through num_experts_per_layer; stock transformers and other programs do not.")


def parse_size(size: str | int | None) -> int | None:
    """Bytes of "5GB", "500MB", "100KB" or a plain number (decimal units); None stays None."""
    if size is None or isinstance(size, int):
        return size
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
    text = size.strip().upper()
    number, unit = (text[:-2], units[text[-2:]]) if text[-2:] in units else (text, 1)
    try:
        parsed = int(float(number) * unit)
    except (ValueError, OverflowError):
        parsed = 0
    if parsed <= 0:
        raise SpecError(f"{size!r} is not a size; write 5GB, 500MB or a number of bytes.")
    return parsed


def stored_dtype(dtype: str | None) -> str | None:
    """Safetensors name of a floating-point dtype given as in torch ("bfloat16" → "BF16"); None stays None."""
    if dtype is None:
        return None
    name = SAFETENSORS_DTYPE.get(dtype)
    if name not in FLOATING:
        raise SpecError(f"Cannot store weights as {dtype!r}; choose bfloat16, float16 or float32.")
    return name


def _keeps_everything(checkpoint: Checkpoint, plan: PrunePlan) -> bool:
    return len(plan.copies) == len(checkpoint.tensors) and plan.total_bytes == checkpoint.total_bytes


def _resume_key(checkpoint: Checkpoint, keep_set: KeepSet, dtype: str | None, limit: int | None, options: list[Any]
                ) -> str:
    identity = [checkpoint.fingerprint, keep_set.experts, dtype, limit, *options]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()


def _write_shards(checkpoint: Checkpoint, plan: PrunePlan, folder: Path, limit: int | None) -> None:
    copies = {copy.spec.name: copy for copy in plan.copies}
    shards = assign_shards((copy.spec for copy in plan.copies), limit)
    with ShardedWriter(folder, shards) as out, track("Writing experts (GB)", plan.total_bytes / 1e9) as bar:
        missing = [copies[name] for name in out.missing()]
        bar.advance((plan.total_bytes - sum(copy.spec.bytes for copy in missing)) / 1e9)
        with ThreadPoolExecutor(WORKERS) as pool:  # reading, checking and writing all let other threads run
            for written in pool.map(lambda part: _write_tensors(checkpoint, part, out), _parts(missing)):
                bar.advance(written / 1e9)


def _parts(copies: Sequence[Copy]) -> Iterator[list[Copy]]:
    """Consecutive tensors of some megabytes, so that handing them to a thread costs little beside writing them."""
    part: list[Copy] = []
    size = 0
    for copy in copies:
        part.append(copy)
        size += copy.spec.bytes
        if size >= PART_BYTES:
            yield part
            part, size = [], 0
    if part:
        yield part


def _write_tensors(checkpoint: Checkpoint, copies: Sequence[Copy], out: ShardedWriter) -> int:
    for copy in copies:
        if copy.spec.dtype == checkpoint.tensors[copy.source].dtype:
            out.write_bytes(copy.spec.name, finite_pieces(checkpoint, copy))
        else:
            out.write(copy.spec.name, _cast(checkpoint, copy))
    return sum(copy.spec.bytes for copy in copies)


def finite_pieces(checkpoint: Checkpoint, copy: Copy) -> Iterator[memoryview]:
    """The tensor's bytes piece by piece in a reused buffer, each piece seen to be finite."""
    dtype = checkpoint.tensors[copy.source].dtype
    for piece in checkpoint.pieces(copy.source, copy.rows, copy.axis):
        if not all_finite(piece, dtype):
            raise _not_finite(checkpoint, copy)
        yield piece


def _cast(checkpoint: Checkpoint, copy: Copy) -> Any:
    import torch

    source = checkpoint.read(copy.source, copy.rows, copy.axis)
    if source.is_floating_point() and not torch.isfinite(source).all():
        raise _not_finite(checkpoint, copy)
    cast = source.to(getattr(torch, DTYPES[copy.spec.dtype][1]))
    if not torch.isfinite(cast).all():
        raise NumericError(f"{copy.source} has values that {cast.dtype} cannot hold; choose bfloat16 or float32.")
    return cast


def _not_finite(checkpoint: Checkpoint, copy: Copy) -> NumericError:
    role = family_of(checkpoint.config).role(copy.source)
    where = "" if role.layer is None else f" (layer {role.layer}" + (
        f", expert {role.expert})" if role.expert is not None else ")")
    return NumericError(f"{copy.source}{where} in {checkpoint.directory} holds NaN or infinite values; "
                        "download or save the checkpoint again.")


def _link_shards(checkpoint: Checkpoint, folder: Path) -> None:
    for shard in checkpoint.shards:
        link_or_copy(checkpoint.directory / shard, folder / shard)
    if (checkpoint.directory / INDEX).exists() and len(checkpoint.shards) > 1:
        write_bytes(folder / INDEX, (checkpoint.directory / INDEX).read_bytes())


