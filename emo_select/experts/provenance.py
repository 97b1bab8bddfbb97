"""What a pruned model was made from, through any number of prunings: its experts by the numbers of each model before.

`pruned_from` in pruning_metadata.json lists these models, the first original one first: name, fingerprint of its
weights, and per layer the numbers that the kept experts have there. The published keys beside it, experts.json and
expert_mask.json all speak of the first original one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from emo_select.checkpoint import Checkpoint
from emo_select.checkpoint.sources import passed_on
from emo_select.errors import CheckpointError
from emo_select.experts.keepset import KeepSet, expert_mask, pruning_metadata
from emo_select.models.families import experts_per_layer
from emo_select.storage import read_json

METADATA, EXPERTS, MASK = "pruning_metadata.json", "experts.json", "expert_mask.json"
Kept = list[list[int] | None]
"""Per layer the numbers of the kept experts; None for dense layers, or where all are kept."""


def provenance_files(checkpoint: Checkpoint, keep_set: KeepSet, source: str) -> dict[str, Any]:
    """Contents of the files that say where the pruned model's experts come from; `checkpoint` is what is pruned.

    A mask needs the number of experts of the first original; where an older version left it out, there is none.
    """
    local: Kept = [None if kept is None else list(kept) for kept in keep_set.experts]
    ancestors = [{**one, "experts_kept_per_layer": _composed(one["experts_kept_per_layer"], local)}
                 for one in _ancestors(checkpoint)]
    keep_set = keep_set.model_copy(update={"model": passed_on(keep_set.model) if keep_set.model else None})
    own = {"model": keep_set.model or passed_on(source), "weights_fingerprint": checkpoint.content.weights,
           "experts_kept_per_layer": local}
    first = [*ancestors, own][0]
    kept = first["experts_kept_per_layer"]
    metadata = {**pruning_metadata(keep_set), "pruned_from": [*ancestors, own]}
    if ancestors:
        metadata |= {"original_model": first["model"], "experts_kept_per_layer": kept}
    files = {METADATA: metadata,
             EXPERTS: {str(layer): ids for layer, ids in enumerate(kept) if ids is not None}}
    mask = _mask(checkpoint, keep_set, kept, pruned_before=bool(ancestors))
    return files if mask is None else files | {MASK: mask}


def _ancestors(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """What the model to be pruned was pruned from itself."""
    path = checkpoint.directory / METADATA
    if not path.is_file():
        return []
    metadata = read_json(path)
    kept = metadata.get("experts_kept_per_layer")
    found = metadata.get("pruned_from") or [{"model": metadata.get("original_model"), "weights_fingerprint": None,
                                             "experts_kept_per_layer": kept}]
    counts = experts_per_layer(checkpoint.config)
    for one in found:
        listed = one["experts_kept_per_layer"]
        fits = isinstance(listed, list) and len(listed) == len(counts) and all(
            ids is None or len(ids) == count for ids, count in zip(listed, counts, strict=True))
        if not fits:
            raise CheckpointError(f"{path} does not fit the experts of the model beside it, which would get wrong "
                                  "numbers; delete it if the model is an original one.")
    return [dict(one) for one in found]


def _composed(outer: Kept, inner: Kept) -> Kept:
    """Numbers of the inner choice, which are places in the outer one, as numbers of the outer one's model."""
    return [inside if outside is None or inside is None else [outside[place] for place in inside]
            for outside, inside in zip(outer, inner, strict=True)]


def _mask(checkpoint: Checkpoint, keep_set: KeepSet, kept: Sequence[list[int] | None], *, pruned_before: bool
          ) -> list[list[int]] | None:
    if not pruned_before:
        return expert_mask(checkpoint.config, keep_set)
    path = checkpoint.directory / MASK
    if not path.is_file():
        return None
    return [[int(expert in (ids or ())) for expert in range(len(layer))]
            for layer, ids in zip(read_json(path), kept, strict=True)]
