"""Which folder is served: a run's last checkpoint, a model, or a model pruned to a keep set first."""

from __future__ import annotations

from pathlib import Path

from emo_select.checkpoint import open_checkpoint, resolve
from emo_select.errors import CheckpointError, SpecError
from emo_select.experts.keepset import KeepSet
from emo_select.experts.provenance import METADATA
from emo_select.experts.prune import prune_checkpoint
from emo_select.progress import say
from emo_select.storage import read_json
from emo_select.tree import RunPaths


def folder_to_serve(source: str, keep_set: Path | None, out: Path | None, *, step: int | None = None) -> Path:
    """The checkpoint that `source` means; with `keep_set`, a selection, `source` pruned to it in `out`.

    Raises `CheckpointError` for a run without a checkpoint, `SpecError` for arguments that contradict each other, and
    what `prune_checkpoint` raises.
    """
    run = RunPaths(Path(source))
    if run.record.is_file():
        if keep_set is not None:
            raise SpecError(f"{source} is a run, whose own selection is served; give --keep-set with a model.")
        return _checkpoint_of(run, step)
    if step is not None:
        raise SpecError(f"--checkpoint is for run directories, and {source} is none.")
    return resolve(source) if keep_set is None else _pruned(source, keep_set, out)


def _checkpoint_of(run: RunPaths, step: int | None) -> Path:
    steps = [0, *(found for found in run.checkpoint_steps() if found)]
    chosen = steps[-1] if step is None else step
    folder = run.checkpoint(chosen) if chosen else run.selected_model
    if not (folder / "config.json").is_file() and not (folder / "adapter_config.json").is_file():
        raise CheckpointError(f"{run.directory} has no {folder.name}; `emo-select run --config "
                              f"{run.config}` makes it.")
    return folder.resolve()


def _pruned(source: str, selection: Path, out: Path | None) -> Path:
    """`source` pruned to a selection, unless `out` (beside the selection by default) is just that already."""
    path = selection / "selection.json" if selection.is_dir() else selection
    keep_set, target = KeepSet.load(path), out or path.parent / "selected_model"
    if target.exists():
        if _is_pruned_to(target, source, keep_set):
            return target.resolve()
        raise SpecError(f"{target} is another model than {source} pruned to {path}; choose another with --out.")
    say(f"Pruning {source} to {path} …")
    prune_checkpoint(source, keep_set, target, allow_nonuniform=True)
    return target.resolve()


def _is_pruned_to(folder: Path, source: str, keep_set: KeepSet) -> bool:
    if not (folder / METADATA).is_file():
        return False
    made = (read_json(folder / METADATA).get("pruned_from") or [{}])[-1]
    kept = [None if experts is None else list(experts) for experts in keep_set.experts]
    with open_checkpoint(source) as checkpoint:
        whole = {"experts_kept_per_layer": kept, "weights_fingerprint": checkpoint.content.weights}
    return {key: made.get(key) for key in whole} == whole
