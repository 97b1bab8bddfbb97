"""Whose a folder is: every folder that appears by `storage.publish` says inside that we made it.

Nothing is replaced or deleted on the strength of its name alone. Names that begin with a dot and end in `.partial` or
`.old` are reserved for what is under way. Beside files in a user's folder, as those of `report`, `eval --out` and
`fetch`, a record says what was written (`storage.write_output`); it does not make their folder ours.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

from emo_select.errors import OwnershipError
from emo_select.faults import at
from emo_select.textfile import read_json_object

MARKER, FILES = ".emo-select.json", ".emo-select-files.json"
NOTE = "This folder was made by emo-select, which may therefore replace it. Delete this file to prevent that."
FILES_NOTE = ("Files here that emo-select wrote, which it may therefore replace while they are as it wrote them. "
              "Delete this file to prevent that.")
RUN_RECORD, TRAINING = "run.json", ("training.json", ".training/job.json")
MODEL_NOTE, EVALUATIONS = ".model.json", "evaluations"
INNER = 4  # how deep below a folder of ours our files lie, as per_subject/<subject>/ below results
CHECKPOINT = re.compile(r"checkpoint-(\d+)")

# What folders are made as.
PRUNED, FINETUNED, MERGED, STATISTICS = "pruned model", "finetuned model", "merged model", "expert statistics"
COMPOSED = "composed model"
RESULTS, TRAINING_STATE, PRETRAINED = "results", "training state", "pretrained model"
OUTPUT = "output"  # of any other kind


def mark(folder: Path, what: str) -> None:
    """Say in a folder that is being made that it is ours, and what it holds."""
    marker = folder / MARKER
    marker.unlink(missing_ok=True)  # it may be a hard link to another folder's
    text = json.dumps({"made_by": "emo-select", "what": what, "note": NOTE}, indent=1) + "\n"
    with at(marker, len(text)):
        marker.write_text(text)


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
    if folder.name == EVALUATIONS and (folder.parent / MODEL_NOTE).is_file():
        return RESULTS
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


def require_own_files(*files: Path) -> None:
    """Raise `OwnershipError` where one of `files` is there and is not as we wrote it, by the record beside it.

    In a folder that is ours as a whole nothing has to be proven.
    """
    for file in files:
        if not os.path.lexists(file) or is_ours(file.parent):
            continue
        if file.is_symlink() or not file.is_file():
            raise OwnershipError(f"{file} is no plain file, so it is not replaced; choose another name.")
        if not _is_as_written(file):
            raise OwnershipError(f"{file} was not made by emo-select, or was changed since, so it is not replaced; "
                                 "choose another name, or remove it.")


def is_ours(folder: Path) -> bool:
    """Whether a folder is ours as a whole, or lies in one that is, or that we are making."""
    around = [folder.absolute(), *folder.absolute().parents][:INNER]
    return any((part.name.startswith(".") and part.name.endswith(".partial")) or (part.is_dir() and made_as(part))
               for part in around)


def entry_of(content: bytes | Path) -> dict[str, Any]:
    """What the record says of a file with this content, given as it is or as another file."""
    if isinstance(content, bytes):
        return {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    return {"size": content.stat().st_size, "sha256": _sha256(content)}


def with_file(file: Path, new: dict[str, Any]) -> dict[str, Any]:
    """The record of the folder of `file` as it has to be before what `new` describes (`entry_of`) is put there.

    It knows what stands there now, too, if that is ours: whichever of both a kill leaves may be replaced.
    """
    known = _written(file.parent)
    now = [entry for entry in known.get(file.name, []) if entry != new and _matches(file, entry)]
    return {"made_by": "emo-select", "note": FILES_NOTE, "files": {**known, file.name: [*now, new]}}


def _written(folder: Path) -> dict[str, list[Any]]:
    record = folder / FILES
    files = read_json_object(record).get("files") if record.is_file() else None
    found = files if isinstance(files, dict) else {}
    return {name: entries for name, entries in found.items() if isinstance(entries, list)}


def _is_as_written(file: Path) -> bool:
    return any(_matches(file, entry) for entry in _written(file.parent).get(file.name, []))


def _matches(file: Path, entry: Any) -> bool:
    if not file.is_file() or not isinstance(entry, dict) or entry.get("size") != file.stat().st_size:
        return False
    return _sha256(file) == entry.get("sha256")


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
