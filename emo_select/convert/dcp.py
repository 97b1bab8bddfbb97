"""The weights of a training checkpoint (torch.distributed.checkpoint's files), one tensor at a time.

`.metadata` lists every tensor with its pieces, one per rank or more, each at an offset of a `.distcp` file; a piece is
an archive as `torch.save` writes it. Pickles are read with an allow list, values as raw bytes with their checksum, and
what is not asked for (the optimiser's state) is never read.
"""

from __future__ import annotations

import io
import math
import os
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from emo_select.checkpoint.header import SAFETENSORS_DTYPE, tensor_bytes
from emo_select.convert.pickles import DAMAGED, METADATA, TENSORS, Record, TensorHead, load
from emo_select.errors import CheckpointError

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
METADATA_FILE = ".metadata"
ARCHIVE = b"PK\x03\x04"
READ_BYTES = 1 << 20


@dataclass(frozen=True)
class Piece:
    """A part of a tensor: where its archive lies, where the part begins in the tensor, and its shape."""

    file: str
    offset: int
    length: int
    start: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of the checkpoint. `dtype` is torch's name ("float32")."""

    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    @property
    def bytes(self) -> int:
        """Size of its values."""
        return tensor_bytes(SAFETENSORS_DTYPE[self.dtype], self.shape)


class TrainingTensors:
    """Read-only view of a folder with `.metadata` and `.distcp` files; opening it reads `.metadata` alone.

    Attributes:
        tensors: name as the trainer saved it (`model.…`, `optim.state.…`) → `StoredTensor`.
        values: name → place of what is no tensor (`optim.param_groups.…`).
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tensors: Mapping[str, StoredTensor]
        self.values: Mapping[str, Piece]
        self.tensors, self.values = _read_metadata(folder / METADATA_FILE)

    def info(self, name: str) -> StoredTensor:
        """The tensor's entry; CheckpointError if there is none."""
        if name not in self.tensors:
            raise CheckpointError(f"{self.folder} has no tensor {name}; its config.json does not fit its weights.")
        return self.tensors[name]

    def check(self, names: Iterable[str]) -> None:
        """Refuse tensors whose pieces do not make them up, or whose files are missing or too short.

        Raises:
            CheckpointError: names the tensor or the file.
        """
        sizes: dict[str, int] = {}
        for name in names:
            tensor = self.info(name)
            _check_pieces(name, tensor, self.folder)
            for piece in tensor.pieces:
                if piece.file not in sizes:
                    sizes[piece.file] = self._size(piece.file)
                if piece.offset + piece.length > sizes[piece.file]:
                    raise CheckpointError(f"{self.folder / piece.file} is truncated: {name} lies behind its end; copy "
                                          "it again.")

    def read(self, name: str) -> torch.Tensor:
        """The whole tensor on the CPU in its stored dtype, assembled from its pieces.

        Raises:
            CheckpointError: a piece is damaged, or is not what `.metadata` says.
        """
        import torch

        tensor = self.info(name)
        if len(tensor.pieces) == 1 and tensor.pieces[0].shape == tensor.shape:
            return self._read_piece(name, tensor, tensor.pieces[0])
        whole = torch.empty(tensor.shape, dtype=getattr(torch, tensor.dtype))
        for piece in tensor.pieces:
            where = tuple(slice(at, at + size) for at, size in zip(piece.start, piece.shape, strict=True))
            whole[where] = self._read_piece(name, tensor, piece)
        return whole

    def read_value(self, name: str) -> Any:
        """A setting of the optimiser, such as a rate, as a plain Python value.

        Raises:
            CheckpointError: it is damaged, or its pickle names what a setting has no use for.
        """
        if name not in self.values:
            raise CheckpointError(f"{self.folder} has no entry {name}.")
        return self._opened(name, self.values[name], _read_value)

    def check_pickles(self) -> None:
        """Refuse a checkpoint of which any part (the optimiser too) has a pickle that asks for what it should not.

        For those who hand it to a program that reads pickles freely. Reads only the heads of the parts.
        """
        places = {**{name: tensor.pieces for name, tensor in self.tensors.items()},
                  **{name: (piece,) for name, piece in self.values.items()}}
        for name, pieces in places.items():
            for piece in pieces:
                self._opened(name, piece, _read_head)

    def _size(self, file: str) -> int:
        try:
            return (self.folder / file).stat().st_size
        except FileNotFoundError:
            raise CheckpointError(f"{self.folder} lacks {file}, which .metadata names; copy it there.") from None

    def _read_piece(self, name: str, tensor: StoredTensor, piece: Piece) -> torch.Tensor:
        return self._opened(
            name, piece, lambda archive, where: _read_archive(archive, tensor.dtype, piece.shape, where))

    def _opened(self, name: str, piece: Piece, read: Callable[[zipfile.ZipFile, str], T]) -> T:
        where = f"{name} in {self.folder / piece.file}"
        try:
            with (self.folder / piece.file).open("rb") as file:
                view = io.BufferedReader(_Slice(file.fileno(), piece.offset, piece.length), READ_BYTES)
                if view.read(len(ARCHIVE)) != ARCHIVE:  # for torch that is no archive, whatever its end says
                    raise ValueError("not an archive")
                with zipfile.ZipFile(view) as archive:
                    return read(archive, where)
        except FileNotFoundError:
            raise CheckpointError(f"{self.folder} lacks {piece.file}, which .metadata names; copy it there.") from None
        except (zipfile.BadZipFile, zipfile.LargeZipFile, NotImplementedError, *DAMAGED):
            raise CheckpointError(f"{where} is damaged; copy or download that file again.") from None


class _Slice(io.RawIOBase):
    """A stretch of a file, read as if it were a file of its own."""

    def __init__(self, descriptor: int, offset: int, length: int) -> None:
        self._descriptor, self._offset, self._length, self._at = descriptor, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        if base + offset < 0:
            raise ValueError("a position before the start")
        self._at = base + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        room = memoryview(buffer)[:max(0, self._length - self._at)]
        count = os.preadv(self._descriptor, [room], self._offset + self._at) if len(room) else 0
        self._at += count
        return count


def _read_archive(archive: zipfile.ZipFile, dtype: str, shape: tuple[int, ...], where: str) -> torch.Tensor:
    """The one tensor of an archive of `torch.save`; its bytes must have the checksum that stands beside them."""
    import torch

    entries = {entry.filename.partition("/")[2]: entry for entry in archive.infolist()}
    head = _read_head(archive, where)
    if not isinstance(head, TensorHead) or (head.dtype, head.shape) != (dtype, shape):
        raise ValueError("another tensor than .metadata says")
    if "byteorder" in entries and archive.read(entries["byteorder"]) != b"little":
        raise CheckpointError(f"{where} was written on a big-endian machine, which this version cannot read.")
    values = torch.empty(head.elements, dtype=getattr(torch, dtype))
    _fill(archive, entries[f"data/{head.key}"], values.view(torch.uint8).numpy().data)
    return values.as_strided(shape, head.stride, head.offset)


def _read_head(archive: zipfile.ZipFile, where: str) -> Any:
    """What the pickle of an archive holds: a `TensorHead`, or a plain value."""
    (entry,) = (entry for entry in archive.infolist() if entry.filename.endswith("data.pkl"))  # of two, one could hide
    return load(archive.read(entry), TENSORS, where)


def _read_value(archive: zipfile.ZipFile, where: str) -> Any:
    value = _read_head(archive, where)
    if isinstance(value, TensorHead):
        raise ValueError("a tensor, where a setting should be")
    return value


def _fill(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, buffer: memoryview) -> None:
    if entry.file_size != len(buffer):
        raise ValueError("another size than its head says")
    if entry.CRC == 0:
        del entry.CRC  # torch was told to compute no checksums
    with archive.open(entry) as file:
        at = 0
        while piece := file.read(READ_BYTES):
            buffer[at:at + len(piece)] = piece
            at += len(piece)


def _read_metadata(path: Path) -> tuple[dict[str, StoredTensor], dict[str, Piece]]:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} has no {path.name}, so it holds no checkpoint of a training, or an "
                              "unfinished one.") from None
    contents = load(data, METADATA, str(path))
    try:
        return _tensors(contents), _values(contents)
    except DAMAGED:
        raise CheckpointError(f"{path} is not laid out as torch.distributed.checkpoint does it.") from None


def _tensors(contents: Record) -> dict[str, StoredTensor]:
    places: dict[str, list[Piece]] = {}
    described = {name: entry for name, entry in contents.get("state_dict_metadata").items()
                 if isinstance(entry.get("size"), tuple)}
    for index, place in contents.get("storage_data").items():
        if (name := index.get("fqn")) in described:
            places.setdefault(name, []).append(_piece(described[name], index, place))
    return {name: StoredTensor(entry.get("properties").state[0], entry.get("size"), tuple(places.get(name, ())))
            for name, entry in described.items()}


def _values(contents: Record) -> dict[str, Piece]:
    described = contents.get("state_dict_metadata")
    return {index.get("fqn"): Piece(_place(place), place.get("offset"), place.get("length"), (), ())
            for index, place in contents.get("storage_data").items()
            if not isinstance(described[index.get("fqn")].get("size"), tuple)}


def _place(place: Record) -> str:
    """Name of the file, which lies in the folder."""
    file = place.get("relative_path")
    if file != Path(file).name or place.get("transform_descriptors"):
        raise ValueError("a part outside the folder, or a packed one")
    return str(file)


def _piece(tensor: Record, index: Record, place: Record) -> Piece:
    start = tuple(index.get("offset") or (0,) * len(tensor.get("size")))
    shapes = {tuple(chunk.get("offsets")): tuple(chunk.get("sizes")) for chunk in tensor.get("chunks")}
    return Piece(_place(place), int(place.get("offset")), int(place.get("length")), start, shapes[start])


def _check_pieces(name: str, tensor: StoredTensor, folder: Path) -> None:
    """Pieces that lie inside, overlap nowhere and have together as many values as the tensor make it up."""
    inside = all(at >= 0 and at + size <= whole for piece in tensor.pieces
                 for at, size, whole in zip(piece.start, piece.shape, tensor.shape, strict=True))
    values = sum(math.prod(piece.shape) for piece in tensor.pieces)
    if not (inside and _apart(tensor.pieces) and values == math.prod(tensor.shape)):
        raise CheckpointError(f"{folder / METADATA_FILE} describes {name} by pieces that do not make it up; parts of "
                              "the checkpoint are missing.")
    if tensor.dtype not in SAFETENSORS_DTYPE:
        raise CheckpointError(f"{name} in {folder} is stored as {tensor.dtype}, which this version cannot read.")


def _apart(pieces: Sequence[Piece]) -> bool:
    """Whether no two pieces overlap. Those of the usual kind, rows of a tensor, are compared with the next one only."""
    ordered = sorted(pieces, key=lambda piece: piece.start)
    only_rows = len({(piece.start[1:], piece.shape[1:]) for piece in pieces}) == 1
    pairs = pairwise(ordered) if only_rows else combinations(ordered, 2)
    return all(any(a + length <= b or b + width <= a for a, length, b, width in zip(
        one.start, one.shape, other.start, other.shape, strict=True)) for one, other in pairs)
