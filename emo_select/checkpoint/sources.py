"""From what a user typed to a folder: a local path, `demo/NAME`, or a Hub id."""

from __future__ import annotations

import os
import re
from pathlib import Path

from emo_select import progress
from emo_select.checkpoint.header import read_weight_map
from emo_select.errors import ModelError, UnknownNameError, nearest

PUBLISHED = (
    "allenai/Emo_1b14b_1T", "allenai/StdMoE_1b14b_1T", "allenai/Emo_1b14b_130B", "allenai/StdMoE_1b14b_130B",
    "allenai/StdMoE_1b4b_130B", "allenai/Dense_1b_130B", "allenai/StdMoE_1b14b_1T_Preanneal",
    "allenai/StdMoE_1b14b_1T_EmoAnnealed",
)
DATA_DIR_VARIABLE = "EMO_SELECT_DATA_DIR"
OF_A_RUN = re.compile(r"selected_model|finetuned_model|checkpoint-\d+")  # names that say nothing by themselves
MODELS = "models"  # the data folder's own folder of models
# Code comes along as text, so that a pruned copy still has it; nothing runs it unless the user asks for that.
TORCH_FILES = ("pytorch_model.bin", "pytorch_model-*-of-*.bin")
HUB_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken", "*.py", "README.md", "LICENSE*",
             "NOTICE*")


def resolve(source: str, revision: str | None = None, *, data_dir: str | Path | None = None,
            download: bool = True) -> Path:
    """The folder of a checkpoint: `demo/NAME` → shipped data, an existing folder → itself, else a Hub id.

    A Hub id may end in `@REVISION`. It is taken from the data folder that `emo-select fetch` filled (`data_dir`, else
    EMO_SELECT_DATA_DIR), from the cache or, if `download`, from the Hub: config, safetensors, tokenizer; no weights
    in other formats.

    Raises:
        ModelError: nothing of that name, with near matches; or a copy in the data folder that is not whole.
    """
    if source.startswith("demo/"):
        return _demo(source)
    path = Path(source).expanduser()
    if path.is_dir():
        return path.resolve()
    if _looks_like_path(source):
        raise ModelError(f"There is no folder {source!r}; give a checkpoint folder, a Hub id or demo/NAME.")
    name = at_revision(source, revision)
    if fetched := _fetched(name, data_dir):
        return fetched
    cached = _cached(*split_revision(name))
    if cached is None and not download:
        raise ModelError(f"{name} is not on this machine, and nothing is downloaded now; get it with `emo-select "
                         f"fetch --model {name} --to DIR`, then give --data-dir DIR.")
    return cached or _snapshot(*split_revision(name))


def passed_on(source: str) -> str:
    """What a model is called in files that travel: ids as they are; of a folder on this machine only its name."""
    path = Path(source).expanduser()
    return name_of(path) if path.is_absolute() or path.is_dir() else source


def name_of(folder: Path) -> str:
    """The Hub id of a folder in the Hub's cache, else the folder's own name, with the run's where it says nothing."""
    cached = next((part for part in folder.parts if part.startswith("models--")), None)
    if cached:
        return cached.removeprefix("models--").replace("--", "/")
    telling = next((part for part in reversed(folder.parts) if not OF_A_RUN.fullmatch(part)), "").strip("/")
    return folder.name if telling in ("", folder.name) else f"{folder.name} of {telling}"


def here(source: str, data_dir: str | Path | None = None) -> Path | None:
    """The folder with the checkpoint's config.json, if it is on this machine; its weights may be missing."""
    if source.startswith("demo/") or Path(source).expanduser().is_dir() or _looks_like_path(source):
        return resolve(source)
    if folder := _in_data_folder(source, data_dir):
        return folder
    from huggingface_hub import try_to_load_from_cache

    name, revision = split_revision(source)
    found = try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(found).parent if isinstance(found, str) else None


def split_revision(source: str) -> tuple[str, str | None]:
    """`owner/name@revision` → (`owner/name`, `revision`); of anything else, itself and None."""
    name, at, revision = source.partition("@")
    is_hub_id = at and revision and name.count("/") == 1 and not Path(source).expanduser().exists()
    return (name, revision) if is_hub_id and not _looks_like_path(name) else (source, None)


def at_revision(source: str, revision: str | None) -> str:
    """The source with `@revision` behind it. Raises `ModelError` where it has another, or is no Hub id."""
    if revision is None:
        return source
    if source.startswith("demo/") or Path(source).expanduser().is_dir() or _looks_like_path(source):
        raise ModelError(f"{source} is on this machine and has no revisions; leave out the revision {revision!r}.")
    name, own = split_revision(source)
    if own not in (None, revision):
        raise ModelError(f"{source} names the revision {own!r} already; leave out {revision!r}.")
    return f"{name}@{revision}"


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


def _in_data_folder(name: str, data_dir: str | Path | None) -> Path | None:
    root = data_dir or os.environ.get(DATA_DIR_VARIABLE)
    folder = Path(root).expanduser() / MODELS / name if root else None
    return folder.resolve() if folder is not None and (folder / "config.json").is_file() else None


def _fetched(name: str, data_dir: str | Path | None) -> Path | None:
    folder = _in_data_folder(name, data_dir)
    if folder is not None and not is_whole(folder):
        raise ModelError(f"The copy of {name} in {folder} lacks some of its weights; run `emo-select fetch --model "
                         f"{name} --to {folder.parents[2]}` again, it goes on where it was.")
    return folder


def is_whole(folder: Path) -> bool:
    """Whether the folder has every shard that its index names, or a single file of weights."""
    index = folder / "model.safetensors.index.json"
    shards = set(read_weight_map(index).values()) if index.exists() else {"model.safetensors"}
    return all((folder / shard).exists() for shard in shards)


def torch_files(folder: Path) -> list[Path]:
    """The weights of a folder in PyTorch's own files, which are not read as a checkpoint; sorted."""
    return sorted(path for pattern in TORCH_FILES for path in folder.glob(pattern))


def _cached(source: str, revision: str | None) -> Path | None:
    """The whole snapshot in the cache; None where it is not there or lacks a shard."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        found = Path(snapshot_download(source, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, ValueError):
        return None
    return found if is_whole(found) else None


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
