"""Tensors that many processes have saved in pieces, along one axis or several."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from emo_select.convert.dcp import TrainingTensors
from emo_select.errors import CheckpointError

WHOLE = torch.arange(7 * 6, dtype=torch.bfloat16).view(7, 6)
ROWS = [((0, 0), (3, 6)), ((3, 0), (3, 6)), ((6, 0), (1, 6))]  # three processes, unevenly
BLOCKS = [((0, 0), (4, 2)), ((0, 2), (4, 4)), ((4, 0), (3, 5)), ((4, 5), (3, 1))]


def save(folder, pieces):
    """What processes of a training would write, each piece in a file of its own."""
    chunks, places = [], {}
    for number, (start, shape) in enumerate(pieces):
        part = WHOLE[start[0]:start[0] + shape[0], start[1]:start[1] + shape[1]].clone()
        path = folder / f"__{number}_0.distcp"
        torch.save(part, path)
        chunks.append(ChunkStorageMetadata(torch.Size(start), torch.Size(shape)))
        places[MetadataIndex("model.w", start, number)] = _StorageInfo(path.name, 0, path.stat().st_size)
    described = TensorStorageMetadata(TensorProperties(dtype=WHOLE.dtype), WHOLE.shape, chunks)
    (folder / ".metadata").write_bytes(pickle.dumps(Metadata({"model.w": described}, storage_data=places)))
    return TrainingTensors(folder)


@pytest.mark.parametrize("pieces", [ROWS, ROWS[::-1], BLOCKS, [((0, 0), (7, 6))]],
                         ids=["rows", "rows backwards", "blocks", "whole"])
def test_pieces_are_put_together(tmp_path, pieces):
    tensors = save(tmp_path, pieces)
    tensors.check(["model.w"])
    assert torch.equal(tensors.read("model.w"), WHOLE)


@pytest.mark.parametrize("pieces", [
    ROWS[:2],
    [((0, 0), (4, 6)), ((3, 0), (3, 6))],
    [((0, 0), (4, 2)), ((0, 1), (4, 5)), ((4, 0), (3, 5)), ((4, 5), (2, 1))],
], ids=["one is missing", "rows overlap", "blocks overlap"])
def test_pieces_that_do_not_make_it_up_are_refused(tmp_path, pieces):
    with pytest.raises(CheckpointError, match="do not make it up"):
        save(tmp_path, pieces).check(["model.w"])
