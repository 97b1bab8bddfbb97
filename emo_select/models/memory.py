"""A model in memory, seen as a checkpoint: its tensors under the names that saving would give them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from emo_select.checkpoint import Checkpoint, TensorInfo
from emo_select.checkpoint.fingerprint import Content, digest_of
from emo_select.checkpoint.header import SAFETENSORS_DTYPE, tensor_bytes

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

IN_MEMORY = "memory"  # in place of a shard's name


class ModelInMemory(Checkpoint):
    """Reads from the model's own tensors, on whichever device they are. The model must not change meanwhile."""

    def __init__(self, model: PreTrainedModel) -> None:
        from transformers.core_model_loading import revert_weight_conversion

        self._values: dict[str, torch.Tensor] = revert_weight_conversion(model, dict(model.state_dict()))
        tensors = {}
        for name, value in self._values.items():
            dtype, shape = SAFETENSORS_DTYPE[str(value.dtype).removeprefix("torch.")], tuple(value.shape)
            tensors[name] = TensorInfo(dtype, shape, IN_MEMORY, 0, tensor_bytes(dtype, shape))
        config = json.loads(model.config.to_json_string(use_diff=False))
        super().__init__(Path(model.config.name_or_path or type(model).__name__), config, tensors)

    def read_into(self, name: str, out: torch.Tensor, rows: Sequence[int] | None = None, axis: int = 0) -> None:
        """Copy the tensor (or `rows` of it along `axis`) into `out`."""
        self.info(name)  # raises where there is none
        value = self._values[name].detach()
        out.copy_(value if rows is None else value.movedim(axis, 0)[list(rows)].movedim(0, axis))

    def file(self, shard: str) -> int:
        """A file without content: there is nothing that could be read ahead."""
        if shard not in self._files:
            self._files[shard] = os.open(os.devnull, os.O_RDONLY)
        return self._files[shard]

    @cached_property
    def content(self) -> Content:
        """Digests of configuration and weights; there are no files beside them."""
        import torch

        weights = {}
        for name, value in self._values.items():
            data = value.detach().to("cpu").contiguous().view(-1).view(torch.uint8).numpy()
            weights[name] = hashlib.sha256(data.data).hexdigest()
        return Content(config=digest_of(self.config), tokenizer="", generation="", code="", weights=digest_of(weights))
