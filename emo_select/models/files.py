"""Which files beside the weights a model needs, seen without loading any of them."""

from __future__ import annotations

from pathlib import Path

from emo_select.errors import ModelError
from emo_select.textfile import read_json_object, require_file

# Any of them holds a vocabulary; the rest of a tokenizer's files are settings.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "*.spm", "*.tiktoken",
                   "spiece.model", "sentencepiece*.model", "tekken.json")


def require_tokenizer(directory: Path, *, trust_remote_code: bool = False) -> None:
    """Raise `ModelError` where a checkpoint has no tokenizer of its own, or one that is code and not trusted.

    For some architectures transformers would invent an empty one, and scores would be noise.
    """
    present = {path.name for path in directory.iterdir() if any(path.match(name) for name in TOKENIZER_FILES)}
    for name in ("config.json", "tokenizer_config.json", *present):
        if (directory / name).exists():
            require_file(directory / name, ModelError)
    if present or trust_remote_code:
        return
    settings = directory / "tokenizer_config.json"
    if settings.exists() and read_json_object(settings, ModelError).get("auto_map"):
        raise ModelError(f"The tokenizer of {directory} is code of its own; pass trust_remote_code=True "
                         "(--trust-remote-code) if you trust that code.")
    raise ModelError(f"{directory} has no tokenizer files ({', '.join(TOKENIZER_FILES)}); copy those of the original "
                     "model into it.")
