"""Token files and what is known of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class TokenData:
    """Raw little-endian token files in the order of their mix."""

    files: tuple[Path, ...]
    labels: tuple[str, ...]
    dtype: str
    vocab_size: int
    eos_token_id: int
    pad_token_id: int | None
    tokenizer: str | None
    fingerprint: str


def read_mix(path: Path, root: Path | None = None, tokenizer: str | None = None) -> TokenData:
    """Token files of a folder with a manifest."""
    from emo_select.tree import read_json

    told = read_json(path / "manifest.json")
    files = tuple(path / name for name in told["files"])
    return TokenData(files, tuple(told["files"]), told["dtype"], told["vocab_size"], told["eos_token_id"],
                     told["pad_token_id"], None, told["fingerprint"])
