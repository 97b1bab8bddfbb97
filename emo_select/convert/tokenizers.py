"""Tokenizer files of a converted checkpoint: found, copied, and their settings made those of the training."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emo_select.convert.experiment import Tokens
from emo_select.errors import CheckpointError, ModelError

FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
         "merges.txt", "vocab.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json")
SETTINGS = "tokenizer_config.json"


@dataclass(frozen=True)
class TokenizerFiles:
    """A folder with a tokenizer. `as_it_is`: saved beside the training, so that its settings are right already."""

    folder: Path
    as_it_is: bool


def find_tokenizer(checkpoint: Path, tokens: Tokens, wanted: str | None, *, download: bool) -> TokenizerFiles | None:
    """The tokenizer beside the training's checkpoints, else `wanted` or the one that its config names, else None.

    Raises:
        ModelError: the named one does not exist or has no files.
    """
    for folder in (checkpoint / "tokenizer", checkpoint.resolve().parent / "tokenizer"):
        if wanted is None and folder.is_dir():
            return TokenizerFiles(folder, as_it_is=True)
    name = wanted or tokens.identifier
    if name is None:
        return None
    folder = Path(name).expanduser() if Path(name).expanduser().is_dir() else _from_hub(name, download=download)
    if not (folder / "tokenizer.json").exists():
        raise ModelError(f"{name} has no tokenizer.json; give another with --tokenizer, or `--tokenizer none`.")
    return TokenizerFiles(folder, as_it_is=False)


def _from_hub(name: str, *, download: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=list(FILES), local_files_only=not download))
    except (LocalEntryNotFoundError, HFValidationError, HfHubHTTPError, OSError, ValueError):
        raise ModelError(f"The tokenizer {name!r} is neither a folder nor in the Hub cache, and the Hub does not give "
                         "it; name a folder with --tokenizer, or leave it out with `--tokenizer none`.") from None


def tokenizer_output(found: TokenizerFiles, tokens: Tokens, max_length: int | None) -> dict[str, bytes]:
    """File name → content of the converted checkpoint's tokenizer."""
    files = {name: (found.folder / name).read_bytes() for name in FILES if (found.folder / name).is_file()}
    if found.as_it_is or max_length is None:
        return files
    settings = _json(files.get(SETTINGS, b"{}"), found.folder / SETTINGS)
    names = _names(files["tokenizer.json"], found.folder)
    special = {f"{role}_token": names.get(number) if number is not None else None
               for role, number in (("bos", tokens.bos), ("eos", tokens.eos), ("pad", tokens.pad))}
    changed = {**settings, "model_max_length": max_length, **{k: v for k, v in special.items() if v is not None}}
    if special["bos_token"] is None:
        changed.pop("bos_token", None)
    files[SETTINGS] = _dump(changed)
    if "special_tokens_map.json" in files:
        known = _json(files["special_tokens_map.json"], found.folder / "special_tokens_map.json")
        files["special_tokens_map.json"] = _dump({**{k: v for k, v in known.items() if k not in special},
                                                  **{k: v for k, v in special.items() if v is not None}})
    return files


def token_numbers(tokenizer_json: bytes, folder: Path) -> dict[str, int]:
    """Every token's number."""
    return {name: number for number, name in _names(tokenizer_json, folder).items()}


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


def _names(tokenizer_json: bytes, folder: Path) -> dict[int, str]:
    content = _json(tokenizer_json, folder / "tokenizer.json")
    vocabulary = (content.get("model") or {}).get("vocab") or {}
    if isinstance(vocabulary, dict):
        names = {number: name for name, number in vocabulary.items()}
    else:  # unigram: a list of (token, score)
        names = {number: entry[0] for number, entry in enumerate(vocabulary)}
    return names | {entry["id"]: entry["content"] for entry in content.get("added_tokens") or ()}


def _json(data: bytes, path: Path) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except ValueError:
        raise CheckpointError(f"{path} is not valid JSON; download or save it again.") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is not a JSON object; download or save it again.")
    return value


def _dump(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
