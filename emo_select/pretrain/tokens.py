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
