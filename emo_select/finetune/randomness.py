"""The state of every random generator that a training draws from, as safetensors and JSON: nothing is unpickled."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from emo_select.errors import CheckpointError
from emo_select.storage import write_bytes


def random_file(folder: Path, process: int) -> Path:
    """Where the generators of one process are kept within a training state."""
    return folder / f"random-{process}.safetensors"


def save_random(path: Path) -> None:
    """Write the generators of Python, numpy and torch (on the CPU and every GPU)."""
    from safetensors.torch import save

    kind, words, *rest = np.random.get_state(legacy=True)
    tensors = {"cpu": torch.random.get_rng_state(), "numpy": torch.from_numpy(np.asarray(words).astype(np.int64))}
    if torch.cuda.is_available():
        tensors |= {f"cuda.{i}": state for i, state in enumerate(torch.cuda.random.get_rng_state_all())}
    told = {"python": random.getstate(), "numpy": [kind, *rest]}
    write_bytes(path, save(tensors, {"generators": json.dumps(told)}))


def load_random(path: Path) -> bool:
    """Put the generators back; False where this process had none, because there were fewer of them.

    Raises:
        CheckpointError: the file is damaged, or the state is one of the pickles that older versions wrote.
    """
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        _refuse_pickles(path.parent)
        return False
    try:
        with safe_open(path, "pt") as file:
            told = json.loads(file.metadata()["generators"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        _restore(told, tensors)
    except (OSError, SafetensorError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"The training state {path} cannot be read ({error}); delete {path.parent.parent} to "
                              "start over.") from None
    return True


def _restore(told: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    version, words, gauss = told["python"]
    kind, *rest = told["numpy"]
    random.setstate((version, tuple(words), gauss))
    np.random.set_state((kind, tensors["numpy"].numpy().astype(np.uint32), *rest))
    torch.random.set_rng_state(tensors["cpu"])
    cuda = [tensors[f"cuda.{i}"] for i in range(len(tensors)) if f"cuda.{i}" in tensors]
    if cuda and torch.cuda.is_available() and torch.cuda.device_count() == len(cuda):
        torch.cuda.random.set_rng_state_all(cuda)


def _refuse_pickles(folder: Path) -> None:
    if any(folder.glob("rng_state*.pth")):
        raise CheckpointError(f"The training state in {folder} was written by an older version, as a pickle, which "
                              f"is not read; delete {folder.parent} to train from the start.")
