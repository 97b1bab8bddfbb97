"""Write weights as torch.distributed.checkpoint's files, tensor by tensor; a part appears only when it is whole."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emo_select.checkpoint.header import SAFETENSORS_DTYPE, tensor_bytes
from emo_select.convert.dcp import METADATA_FILE
from emo_select.convert.layout import Group
from emo_select.storage import write_bytes, write_json

if TYPE_CHECKING:
    from torch import Tensor

PART_BYTES = 5_000_000_000
ARCHIVE_BYTES = 4096  # that an archive has around its values, at most
Parts = Mapping[str, Sequence[Group]]  # file name → the tensors in it, in order
Places = Mapping[str, tuple[int, int]]  # name of a tensor → offset and length in its file


def assign_parts(groups: Iterable[Group], dtype: str, limit: int | None = None) -> dict[str, list[Group]]:
    """Fill files in order up to `limit` bytes; names as rank 0 of a training would give them."""
    parts: list[list[Group]] = [[]]
    filled = 0
    for group in groups:
        size = tensor_bytes(SAFETENSORS_DTYPE[dtype], group.shape)
        if parts[-1] and filled + size > (limit or PART_BYTES):
            parts.append([])
            filled = 0
        parts[-1].append(group)
        filled += size
    return {f"__0_{number}.distcp": part for number, part in enumerate(parts)}


def write_parts(folder: Path, parts: Parts, dtype: str, tensor_of: Callable[[Group], Tensor],
                done: Callable[[Group], None]) -> None:
    """Write the parts that an interrupted call with the same plan has not finished, then the table of contents.

    A part is a file of archives, one per tensor; beside it, a hidden list of where each lies stays until the end.
    """
    folder.mkdir(exist_ok=True)
    places: dict[str, Places] = {}
    for name, groups in parts.items():
        listing = folder / f".{name}.json"
        if not (listing.exists() and (folder / name).exists()):
            write_json(listing, _write_part(folder / name, groups, tensor_of))
        places[name] = json.loads(listing.read_bytes())
        for group in groups:
            done(group)
    write_bytes(folder / METADATA_FILE, _table_of_contents(parts, dtype, places))
    for name in parts:
        (folder / f".{name}.json").unlink(missing_ok=True)


def _write_part(path: Path, groups: Sequence[Group], tensor_of: Callable[[Group], Tensor]) -> Places:
    import torch

    places = {}
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        for group in groups:
            start = file.tell()
            torch.save(tensor_of(group), file)
            places[group.stored] = (start, file.tell() - start)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    return places


def _table_of_contents(parts: Parts, dtype: str, places: Mapping[str, Places]) -> bytes:
    """`.metadata`, made of torch's own classes, as its readers expect it."""
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

    groups = [(name, group) for name, part in parts.items() for group in part]
    metadata = Metadata(
        state_dict_metadata={group.stored: _described(group, dtype) for _, group in groups},
        planner_data={group.stored: tuple(group.stored.split(".", 1)) for _, group in groups},
        storage_data={MetadataIndex(group.stored, (0,) * len(group.shape), 0):
                      _StorageInfo(name, *places[name][group.stored]) for name, group in groups},
    )
    return pickle.dumps(metadata)


def _described(group: Group, dtype: str) -> Any:
    import torch
    from torch.distributed.checkpoint.metadata import (
        ChunkStorageMetadata,
        TensorProperties,
        TensorStorageMetadata,
    )

    shape = torch.Size(group.shape)
    whole = ChunkStorageMetadata(offsets=torch.Size((0,) * len(shape)), sizes=shape)
    return TensorStorageMetadata(TensorProperties(dtype=getattr(torch, dtype)), shape, [whole])
