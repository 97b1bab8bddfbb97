"""The small files that belong to a checkpoint beside its weights, in its subfolders, too: what a copy needs of it.

Weights in any format, training state, hidden files, checkpoints within the folder and what we made there are no part of
it. A symbolic link that leads out of the checkpoint is refused: copying it would publish a file that nobody meant.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

from emo_select.checkpoint.fingerprint import TOKENIZER
from emo_select.errors import CheckpointError
from emo_select.ownership import CHECKPOINT, MARKER

SUFFIXES = (".json", ".txt", ".model", ".jinja", ".py", ".tiktoken", ".md")
LEGAL = ("LICENSE*", "LICENCE*", "NOTICE*")
WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.gguf",
           "*.onnx", "*.h5", "*.msgpack")
TRAINING = ("trainer_state.json", "*.key")


def companions(directory: Path) -> list[Path]:
    """Paths below `directory` of the files that belong to the checkpoint in it, sorted.

    Raises `CheckpointError` naming a link that leads out of the checkpoint; into the Hub's cache its own links may.
    """
    found = []
    for folder, inner, names in os.walk(directory):
        here = Path(folder)
        inner[:] = sorted(name for name in inner if not name.startswith(".") and _belongs(here / name))
        found += [path for name in names if _wanted(name) and _stays(path := here / name, directory)]
    return sorted(path.relative_to(directory) for path in found)


def copy_companions(source: Path, target: Path, *, without: frozenset[str] = frozenset()) -> None:
    """Copy them to another folder, apart from those with a name in `without`."""
    for path in _chosen(source, without):
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / path, target / path)


def _chosen(source: Path, without: frozenset[str]) -> Iterator[Path]:
    return (path for path in companions(source) if str(path) not in without)


def _wanted(name: str) -> bool:
    if name.startswith(".") or any(fnmatch(name, pattern) for pattern in (*WEIGHTS, *TRAINING)):
        return False
    return name.endswith(SUFFIXES) or any(fnmatch(name, pattern) for pattern in (*LEGAL, *TOKENIZER))


def _belongs(folder: Path) -> bool:
    """Whether a subfolder is a part of the checkpoint, not another checkpoint nor an output of ours."""
    if CHECKPOINT.fullmatch(folder.name) or (folder / MARKER).exists() or folder.is_symlink():
        return False
    return not any(fnmatch(path.name, pattern) for path in folder.iterdir() for pattern in WEIGHTS)


def _stays(path: Path, directory: Path) -> bool:
    """Whether it is a file of the checkpoint's own; a link out of it is refused."""
    if not path.is_symlink():
        return path.is_file()
    real, home = path.resolve(), directory.resolve()
    cache = home.parent.parent if home.parent.name == "snapshots" else None
    if real.is_relative_to(home) or (cache is not None and real.parent == cache / "blobs"):
        return path.is_file()
    raise CheckpointError(f"{path} is a symbolic link to {real}, outside of the checkpoint, and would be copied; "
                          "put the file itself there, or remove the link.")
