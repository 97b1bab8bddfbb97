"""Whose a folder is: every folder that appears by `tree.publish` says inside that we made it.

Nothing is replaced or deleted on the strength of its name alone. Names that begin with a dot and end in `.partial` or
`.old` are reserved for what is under way.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from emo_select.errors import OwnershipError
from emo_select.textfile import read_json_object

MARKER = ".emo-select.json"
NOTE = "This folder was made by emo-select, which may therefore replace it. Delete this file to prevent that."
RUN_RECORD, TRAINING = "run.json", ("training.json", ".training/job.json")
CHECKPOINT = re.compile(r"checkpoint-(\d+)")

# What folders are made as.
PRUNED, FINETUNED, MERGED, STATISTICS = "pruned model", "finetuned model", "merged model", "expert statistics"
RESULTS, TRAINING_STATE, PRETRAINED = "results", "training state", "pretrained model"
OUTPUT = "output"  # of any other kind


def mark(folder: Path, what: str) -> None:
    """Say in a folder that is being made that it is ours, and what it holds."""
    marker = folder / MARKER
    marker.unlink(missing_ok=True)  # it may be a hard link to another folder's
    marker.write_text(json.dumps({"made_by": "emo-select", "what": what, "note": NOTE}, indent=1) + "\n")


def made_as(folder: Path) -> str | None:
    """What we made the folder as, by the record inside; None where it is not ours."""
    if (folder / MARKER).is_file():
        return str(read_json_object(folder / MARKER).get("what", ""))
    return _made_before_markers(folder)


def _made_before_markers(folder: Path) -> str | None:
    """Parts of a run directory, known by its run.json, checkpoints beside their training's report, activations."""
    if folder.name == "selected_model" and (folder.parent / RUN_RECORD).is_file():
        return PRUNED
    if CHECKPOINT.fullmatch(folder.name) and (folder.parent.parent / RUN_RECORD).is_file():
        return {"finetuned_model": FINETUNED, "results": RESULTS}.get(folder.parent.name)
    if CHECKPOINT.fullmatch(folder.name) and any((folder.parent / name).is_file() for name in TRAINING):
        return FINETUNED
    names = {path.name for path in folder.iterdir()}
    return STATISTICS if names == {"scores.json", "scores.safetensors"} else None


def require_own_run(directory: Path) -> None:
    """Raise `OwnershipError` where a run directory without a record of ours holds somebody else's models or results."""
    if (directory / RUN_RECORD).exists():
        return
    parts = [directory / "selected_model", *directory.glob("finetuned_model/*"), *directory.glob("results/*")]
    for part in parts:
        if part.is_dir() and any(part.iterdir()) and made_as(part) is None:
            raise OwnershipError(f"{directory} has no run.json, so {part.relative_to(directory)} in it was not made by "
                                 "emo-select and is not replaced; choose another --output-dir, or move it away.")


def require_replaceable(final: Path, *sources: Path, what: str | None = None) -> None:
    """Raise `OwnershipError` unless `final` is free, or a folder that we made and none of `sources` lies in.

    With `what`, a folder that we made as something else is not replaced either.
    """
    for source in sources:
        if source.resolve().is_relative_to(final.resolve()):
            place = "is" if source.resolve() == final.resolve() else "is a folder above"
            raise OwnershipError(f"{final} {place} the model {source}, which would be lost; choose another output.")
    if final.is_symlink():
        raise OwnershipError(f"{final} is a symbolic link; name the folder itself, or choose another output.")
    if not os.path.lexists(final) or (final.is_dir() and not any(final.iterdir())):
        return
    made = made_as(final) if final.is_dir() else None
    if made is None:
        raise OwnershipError(f"{final} was not made by emo-select, so it is not replaced; choose another output, or "
                             "delete it yourself.")
    if what and made != what:
        raise OwnershipError(f"{final} holds something else (a {made}); choose another output, or delete it yourself.")
