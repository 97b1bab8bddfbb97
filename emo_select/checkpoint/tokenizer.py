"""Tokenizers on disk: where a name's files lie, which numbers its tokens have. Reads JSON only, runs no tokenizer."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from emo_select.checkpoint.sources import demo_names, resolve
from emo_select.errors import ModelError
from emo_select.textfile import read_json_object

FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
         "merges.txt", "vocab.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json")
ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")  # usual names, where tokenizer_config.json says none


def tokenizer_folder(name: str, *, download: bool = True) -> Path:
    """The folder of a tokenizer: one on this machine, demo/NAME, or a Hub id, of which only tokenizer files are got.

    Raises:
        ModelError: there is none of that name, or it has no tokenizer.json.
    """
    local = Path(name).expanduser()
    if name in demo_names():
        folder = resolve(name)
    else:
        folder = local.resolve() if local.is_dir() else _from_hub(name, download=download)
    if not (folder / "tokenizer.json").is_file():
        raise ModelError(f"{name} has no tokenizer.json; name another tokenizer with --tokenizer.")
    return folder


def _from_hub(name: str, *, download: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=list(FILES), local_files_only=not download))
    except (LocalEntryNotFoundError, HFValidationError, HfHubHTTPError, OSError, ValueError):
        raise ModelError(f"The tokenizer {name!r} is neither a folder nor in the Hub cache, and the Hub does not give "
                         "it; name a folder with --tokenizer.") from None


@dataclass(frozen=True)
class TokenizerFiles:
    """A folder with tokenizer.json."""

    folder: Path

    @property
    def path(self) -> Path:
        """The file that a `tokenizers.Tokenizer` is made from."""
        return self.folder / "tokenizer.json"

    @cached_property
    def numbers(self) -> dict[str, int]:
        """Token → number, added tokens included."""
        content = read_json_object(self.path, ModelError)
        vocabulary = (content.get("model") or {}).get("vocab") or {}
        if not isinstance(vocabulary, dict):  # unigram: a list of (token, score)
            vocabulary = {entry[0]: number for number, entry in enumerate(vocabulary)}
        return vocabulary | {entry["content"]: entry["id"] for entry in content.get("added_tokens") or ()}

    @cached_property
    def names(self) -> dict[int, str]:
        """Number → token."""
        return {number: name for name, number in self.numbers.items()}

    @property
    def size(self) -> int:
        """Numbers that it can give: one more than the largest."""
        return 1 + max(self.numbers.values(), default=-1)

    @property
    def end(self) -> int | None:
        """Number of the token that ends a text, None where it has none."""
        return next((self.numbers[name] for name in (self._special("eos_token"), *ENDS) if name in self.numbers), None)

    @property
    def pad(self) -> int | None:
        """Number of the padding token."""
        return self.numbers.get(self._special("pad_token") or "")

    @cached_property
    def sha256(self) -> str:
        """Of tokenizer.json, which decides what a text becomes."""
        return hashlib.sha256(self.path.read_bytes()).hexdigest()

    def _special(self, role: str) -> str | None:
        path = self.folder / "tokenizer_config.json"
        value: Any = read_json_object(path, ModelError).get(role) if path.is_file() else None
        return value.get("content") if isinstance(value, dict) else value
