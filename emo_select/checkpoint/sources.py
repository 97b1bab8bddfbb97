"""From what a user typed to a folder: a local path, `demo/NAME`, or a Hub id."""

from __future__ import annotations

import os
from pathlib import Path

from emo_select import progress
from emo_select.checkpoint.header import read_weight_map
from emo_select.errors import ModelError, UnknownNameError, nearest

PUBLISHED = (
    "allenai/Emo_1b14b_1T", "allenai/StdMoE_1b14b_1T", "allenai/Emo_1b14b_130B", "allenai/StdMoE_1b14b_130B",
    "allenai/StdMoE_1b4b_130B", "allenai/Dense_1b_130B", "allenai/StdMoE_1b14b_1T_Preanneal",
    "allenai/StdMoE_1b14b_1T_EmoAnnealed",
)
# Code comes along as text, so that a pruned copy still has it; nothing runs it unless the user asks for that.
HUB_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken", "*.py")


def resolve(source: str, revision: str | None = None, *, download: bool = True) -> Path:
    """The folder of a checkpoint: `demo/NAME` → shipped data, an existing folder → itself, else a Hub id.

    A Hub id is taken from the cache or, if `download`, from the Hub: config, safetensors, tokenizer; no weights in
    other formats.

    Raises:
        ModelError: nothing of that name, with near matches.
    """
    if source.startswith("demo/"):
        return _demo(source)
    path = Path(source).expanduser()
    if path.is_dir():
        return path.resolve()
    if _looks_like_path(source):
        raise ModelError(f"There is no folder {source!r}; give a checkpoint folder, a Hub id or demo/NAME.")
    cached = _cached(source, revision)
    if cached is None and not download:
        raise ModelError(f"{source} is not in the Hub cache, and a dry run downloads nothing; get it with `emo-select "
                         f"fetch --model {source} --to DIR` and name that folder, or leave out --dry-run.")
    return cached or _snapshot(source, revision)


def demo_names() -> list[str]:
    """Names of the shipped demo models, `demo/…`."""
    root = _demo_root()
    return sorted(f"demo/{path.name}" for path in root.iterdir() if path.is_dir()) if root.is_dir() else []


def _demo_root() -> Path:
    return Path(__file__).parents[1] / "demo" / "models"


def _demo(source: str) -> Path:
    if source not in demo_names():
        raise UnknownNameError("model", source, demo_names())
    return _demo_root() / source.removeprefix("demo/")


def _looks_like_path(source: str) -> bool:
    return source.startswith((".", "~", os.sep)) or source.count("/") != 1 or Path(source).exists()


def _cached(source: str, revision: str | None) -> Path | None:
    """The whole snapshot in the cache; None where it is not there or lacks a shard."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        found = Path(snapshot_download(source, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, ValueError):
        return None
    index = found / "model.safetensors.index.json"
    shards = set(read_weight_map(index).values()) if index.exists() else {"model.safetensors"}
    return found if all((found / shard).exists() for shard in shards) else None


def _snapshot(source: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    progress.say(f"{source} is not in the Hub cache; downloading it (`emo-select fetch` does so ahead of time).")
    known = (*PUBLISHED, *demo_names())
    near = "" if source in known else f" ({nearest(source, known)})"
    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=list(HUB_FILES)))
    except (RepositoryNotFoundError, HFValidationError):
        raise ModelError(f"The Hub has no model {source!r}{near}.") from None
    except RevisionNotFoundError:
        raise ModelError(f"{source} has no revision {revision!r}.") from None
    except (LocalEntryNotFoundError, OSError) as error:
        raise ModelError(f"{source} is neither a folder nor in the Hub cache, and the Hub cannot be reached "
                         f"({type(error).__name__}); check the name{near}, or fetch it where there is a "
                         "network.") from None
