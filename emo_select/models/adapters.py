"""LoRA adapters on disk: which model they belong to, and that model with an adapter merged into its weights."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from emo_select.errors import CheckpointError
from emo_select.spec import digest
from emo_select.storage import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def base_and_adapter(source: str) -> tuple[str, Path | None]:
    """The model that `source` names and, where it is the folder of an adapter, that folder.

    An adapter's model is the `checkpoint-0` beside it, which every training leaves there and which moves with it, else
    the one that its configuration names: a path from the adapter's folder, a folder, or a Hub id.

    Raises:
        CheckpointError: the adapter's configuration cannot be read, names no model, or one that is not there.
    """
    folder = Path(source).expanduser()
    if not (folder / CONFIG).is_file() or (folder / "config.json").exists():
        return source, None
    beside = folder.resolve().with_name("checkpoint-0")
    base = str(beside) if beside.is_dir() else read_json(folder / CONFIG).get("base_model_name_or_path")
    if not base:
        raise CheckpointError(f"{folder / CONFIG} does not say which model the adapter belongs to; set its "
                              "base_model_name_or_path.")
    from_here = (folder.resolve() / base).resolve()
    if base.startswith("..") and not from_here.is_dir():
        raise CheckpointError(f"The model of the adapter in {folder} should be in {from_here}; put it there, or set "
                              f"base_model_name_or_path in {CONFIG}.")
    return str(from_here) if base.startswith("..") else base, folder


def adapter_fingerprint(adapter: Path) -> str:
    """Digest of an adapter's configuration and weights, whatever its model is called."""
    config = {key: value for key, value in read_json(adapter / CONFIG).items() if key != "base_model_name_or_path"}
    with _weights(adapter).open("rb") as file:
        return digest([config, hashlib.file_digest(file, "sha256").hexdigest()])


def merge_adapter(model: PreTrainedModel, adapter: Path) -> PreTrainedModel:
    """`model` with the adapter added to its weights, in memory.

    Raises:
        CheckpointError: the adapter is missing, damaged, or made for another model.
    """
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(_weights(adapter), "pt") as file, quiet_peft():
            adapted = PeftModel.from_pretrained(model, str(adapter))
            differing = get_peft_model_state_dict(adapted, save_embedding_layers=False).keys() ^ set(file.keys())
        if differing:  # peft only warns
            raise ValueError(f"{len(differing)} tensors differ, such as {min(differing)}")
        return adapted.merge_and_unload().eval()
    except (ValueError, TypeError, KeyError, RuntimeError, OSError, SafetensorError) as error:
        reason = str(error).partition("\n")[0]
        raise CheckpointError(f"The adapter in {adapter} does not fit its model ({reason}); train it again.") from error


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Without the warnings that peft calls transformers by a former name, and of what is checked here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.filterwarnings("ignore", "Found missing adapter keys", UserWarning)
        yield


def _weights(adapter: Path) -> Path:
    """The adapter's safetensors; no other format is read."""
    path = adapter / WEIGHTS
    if not path.is_file():
        raise CheckpointError(f"{adapter} has no {WEIGHTS}; save the adapter as safetensors, or train it again.")
    return path
