"""Tokenizer files of a converted checkpoint: found, copied, and their settings made those of the training."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emo_select.checkpoint.tokenizer import FILES, TokenizerFiles, tokenizer_folder
from emo_select.convert.experiment import Tokens
from emo_select.errors import CheckpointError
from emo_select.textfile import read_json_object

SETTINGS, SPECIAL = "tokenizer_config.json", "special_tokens_map.json"


@dataclass(frozen=True)
class Found:
    """A tokenizer. `as_it_is`: saved beside the training, so that its settings are right already."""

    files: TokenizerFiles
    as_it_is: bool


def find_tokenizer(checkpoint: Path, tokens: Tokens, wanted: str | None, *, download: bool) -> Found | None:
    """The tokenizer beside the training's checkpoints, else `wanted` or the one that its config names, else None.

    Raises:
        ModelError: the named one does not exist or has no files.
    """
    for folder in (checkpoint / "tokenizer", checkpoint.resolve().parent / "tokenizer"):
        if wanted is None and (folder / "tokenizer.json").is_file():
            return Found(TokenizerFiles(folder), as_it_is=True)
    name = wanted or tokens.identifier
    return Found(TokenizerFiles(tokenizer_folder(name, download=download)), as_it_is=False) if name else None


def tokenizer_output(found: Found, tokens: Tokens, max_length: int) -> dict[str, bytes]:
    """File name → content of the converted checkpoint's tokenizer."""
    folder = found.files.folder
    files = {name: (folder / name).read_bytes() for name in FILES if (folder / name).is_file()}
    if found.as_it_is:
        return files
    special = {f"{role}_token": found.files.names.get(number) if number is not None else None
               for role, number in (("bos", tokens.bos), ("eos", tokens.eos), ("pad", tokens.pad))}
    for name, changed in ((SETTINGS, {"model_max_length": max_length}), (SPECIAL, {})):
        if name in files or name == SETTINGS:
            known = read_json_object(folder / name, CheckpointError) if name in files else {}
            files[name] = _dump({**{k: v for k, v in known.items() if k not in special}, **changed,
                                 **{k: v for k, v in special.items() if v is not None}})
    return files


def write_files(files: Mapping[str, bytes], folder: Path) -> None:
    """Write the files into a folder that is not visible yet."""
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)


def copy_tokenizer(source: Path, target: Path) -> bool:
    """Copy tokenizer files as they are; whether there are any."""
    found = [source / name for name in FILES if (source / name).is_file()]
    for path in found:
        target.mkdir(exist_ok=True)
        shutil.copyfile(path, target / path.name)
    return bool(found)


def _dump(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
