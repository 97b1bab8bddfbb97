"""One training as files: what to train from what, kept beside its state so that any process can carry it out."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from emo_select.errors import CheckpointError
from emo_select.finetune.examples import TokenSet
from emo_select.spec import Execution, Training, digest
from emo_select.storage import read_json, write_bytes, write_json

FOLDER = ".training"  # within the output directory; removed when the training is complete
JOB = "job.json"


@dataclass(frozen=True)
class Job:
    """A training, as stored in `<out>/.training/`."""

    model: Path
    out: Path
    training: Training
    execution: Execution
    micro_batch: int
    world: int
    device: str
    pad_token: int
    fingerprint: str
    """Of the model that training starts from."""
    key: str
    """Digest of everything that decides the result: model, data and recipe."""

    @property
    def folder(self) -> Path:
        """Working files of this training."""
        return self.out / FOLDER

    @property
    def state(self) -> Path:
        """The point from which a killed training continues."""
        return self.folder / "state"

    def write(self, tokens: TokenSet) -> None:
        """Store job and examples; the job is written last."""
        from safetensors.numpy import save

        arrays = {"ids": tokens.ids, "trained": tokens.trained, "offsets": tokens.offsets}
        write_bytes(self.folder / "examples.safetensors", save(arrays))
        write_json(
            self.folder / JOB,
            {
                "model": str(self.model),
                "out": str(self.out),
                "training": self.training.model_dump(mode="json"),
                "execution": self.execution.model_dump(mode="json"),
                "micro_batch": self.micro_batch,
                "world": self.world,
                "device": self.device,
                "pad_token": self.pad_token,
                "fingerprint": self.fingerprint,
                "key": self.key,
            },
        )

    @classmethod
    def read(cls, folder: Path) -> Job:
        """The job stored in a working folder."""
        stored: dict[str, Any] = read_json(folder / JOB)
        paths = {name: Path(stored[name]) for name in ("model", "out")}
        settings = {"training": Training(**stored["training"]), "execution": Execution(**stored["execution"])}
        return cls(**{**stored, **paths, **settings})

    def tokens(self) -> TokenSet:
        """The stored examples."""
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        path = self.folder / "examples.safetensors"
        try:
            arrays = load_file(path)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} cannot be read ({error}); delete {self.folder}.") from None
        return TokenSet(arrays["ids"], arrays["trained"], arrays["offsets"])


def job_key(fingerprint: str, tokens: TokenSet, training: Training) -> str:
    """Digest of model, data and recipe: what decides a training's result, up to rounding and the micro-batches."""
    data = hashlib.sha256()
    for array in (tokens.ids, tokens.trained, tokens.offsets):
        data.update(np.ascontiguousarray(array).tobytes())
    return digest([fingerprint, data.hexdigest(), training.model_dump(mode="json", exclude={"file", "loss_limit"})])
