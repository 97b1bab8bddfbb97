"""Weights in files of PyTorch's own (*.bin) become safetensors, in the memory of one tensor.

Such files are pickles. They are read by torch's unpickler for weights, which knows tensors and plain containers by an
allow list and runs nothing else; tensors stay mapped until they are written.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emo_select.checkpoint import resolve
from emo_select.checkpoint.companions import companions, copy_companions
from emo_select.checkpoint.hashes import content_hashes
from emo_select.checkpoint.header import SAFETENSORS_DTYPE
from emo_select.checkpoint.sources import TORCH_FILES, torch_files
from emo_select.checkpoint.writer import ShardedWriter, TensorSpec, assign_shards
from emo_select.convert.hf import CONVERTED, RECORD, is_converted
from emo_select.errors import CheckpointError, ModelError
from emo_select.faults import translated
from emo_select.progress import track
from emo_select.spec import digest
from emo_select.storage import output_directory, write_json

if TYPE_CHECKING:
    from torch import Tensor


@translated()
def to_safetensors(source: str, out: Path, max_shard_bytes: int | None = None, *, dry_run: bool = False
                   ) -> dict[str, Any]:
    """Write a folder with the same weights in safetensors and the same other files; returns what it holds.

    Raises:
        ModelError: no such folder, or no weights of this kind in it. CheckpointError: a file holds anything but
        tensors, or is damaged. DiskSpaceError.
    """
    folder = resolve(source, download=False)
    files = torch_files(folder)
    if not files:
        raise ModelError(f"{folder} has no weights in PyTorch's own files ({' or '.join(TORCH_FILES)}).")
    companions(folder)  # refuses links
    tensors = {name: tensor for file in files for name, tensor in _opened(file).items()}
    specs = [TensorSpec(name, SAFETENSORS_DTYPE[str(tensor.dtype).removeprefix("torch.")], tuple(tensor.shape))
             for name, tensor in tensors.items()]
    total = sum(spec.bytes for spec in specs)
    summary = {"files": len(files), "tensors": len(specs), "bytes": total,
               "memory_bytes": max(spec.bytes for spec in specs)}
    if dry_run:
        return summary
    hashes = {file.name: digest for file, digest in content_hashes(files).items()}
    record = {"format": "safetensors", "source": str(folder), "files": hashes}
    if not is_converted(out, record):
        with output_directory(out, digest([hashes, max_shard_bytes]), CONVERTED, total, [folder]) as partial:
            _write(tensors, specs, max_shard_bytes, partial)
            copy_companions(folder, partial)
            write_json(partial / RECORD, record)
    return summary


def _write(tensors: Mapping[str, Tensor], specs: list[TensorSpec], limit: int | None, folder: Path) -> None:
    total = sum(spec.bytes for spec in specs)
    with ShardedWriter(folder, assign_shards(specs, limit)) as out, track("Converting (GB)", total / 1e9) as bar:
        for name in out.missing():
            out.write(name, tensors[name])
            bar.advance(tensors[name].nbytes / 1e9)


def _opened(file: Path) -> dict[str, Tensor]:
    """The tensors of a file by name, mapped; a file of before 2020 is read whole."""
    import torch

    try:
        try:
            found = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # no archive, which cannot be mapped
            found = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise CheckpointError(f"{file} is damaged, or holds more than weights, and is not read "
                              f"({type(error).__name__}); download it again.") from None
    if not isinstance(found, Mapping) or not all(isinstance(one, torch.Tensor) for one in found.values()):
        raise CheckpointError(f"{file} holds more than tensors by name, so it is no model's weights.")
    return {str(name): tensor for name, tensor in found.items()}
