"""What a model is: the content of its files, wherever they lie and whatever they are called.

How tensors are listed in an index does not matter, nor which shard has which number: the shards' own headers say what
they hold. Anything else that a result can depend on does.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from emo_select.checkpoint.hashes import content_hashes

# Every name under which transformers' tokenizer classes keep files, chat templates included.
TOKENIZER = ("*token*.json", "vocab*", "merges*", "*.model", "*.spm", "*.tiktoken", "*.codes", "normalizer.json",
             "emoji.json", "tekken.json", "chat_template*", "additional_chat_templates/*")
GENERATION, CODE = ("generation_config.json",), ("*.py",)
FOLDERS = ("", "additional_chat_templates")


@dataclass(frozen=True)
class Content:
    """Digests of the parts of a checkpoint."""

    config: str
    tokenizer: str
    """Chat templates included."""
    generation: str
    """Generation defaults."""
    code: str
    """Python files that come with it; they are run only if the user asks for that."""
    weights: str
    """Every byte."""

    @property
    def fingerprint(self) -> str:
        """Digest of all of them."""
        return digest_of(asdict(self))

    @property
    def forward(self) -> str:
        """Digest of what texts become in the model: configuration, tokenizer and weights."""
        return digest_of({"config": self.config, "tokenizer": self.tokenizer, "weights": self.weights})


def content_of(directory: Path, config: Mapping[str, Any], shards: Sequence[str]) -> Content:
    """Look at all files of a checkpoint; weights that were never looked at before are read.

    Raises `CheckpointError` where a file cannot be read.
    """
    small = {kind: _matching(directory, patterns) for kind, patterns in
             (("tokenizer", TOKENIZER), ("generation", GENERATION), ("code", CODE))}
    weights = [directory / shard for shard in shards]
    hashes = content_hashes([*weights, *(path for files in small.values() for path in files)])
    parts = {kind: digest_of({str(path.relative_to(directory)): hashes[path] for path in files})
             for kind, files in small.items()}
    return Content(config=digest_of(config), weights=digest_of(sorted(hashes[path] for path in weights)), **parts)


def digest_of(value: Any) -> str:
    """SHA-256, in hexadecimal, of a JSON value whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _matching(directory: Path, patterns: Iterable[str]) -> list[Path]:
    found = (path for folder in FOLDERS if (directory / folder).is_dir() for path in (directory / folder).iterdir())
    return sorted(path for path in found if path.is_file() and not path.name.startswith(".")
                  and any(fnmatch(path.relative_to(directory).as_posix(), pattern) for pattern in patterns))
