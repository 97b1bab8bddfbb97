"""Pickles read with an allow list: names outside it are refused, and those on it become plain values of our own.

A training checkpoint stores its table of contents (`.metadata`), the heads of its tensors (`data.pkl` in each part)
and the state of its trainer (`train/rank<r>.pt`) as pickles, which can name any function of any package to be called.
Nothing here calls one: a permitted name stands for a harmless class, most of which only keep what they are given.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from emo_select.errors import CheckpointError

# What a damaged pickle can raise while it is taken apart.
DAMAGED = (pickle.UnpicklingError, EOFError, ValueError, TypeError, AttributeError, IndexError, KeyError,
           OverflowError, RecursionError, MemoryError, AssertionError)
SCALARS = frozenset({"float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool",
                     "uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2"})
STORAGES = {"DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16",
            "BFloat16Storage": "bfloat16", "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16",
            "CharStorage": "int8", "ByteStorage": "uint8", "BoolStorage": "bool"}


class Record:
    """Stands for an object of a permitted class: `args` it was made with, `state` it was given."""

    args: tuple[Any, ...] = ()
    state: Any = None

    def __new__(cls, *args: Any) -> Record:
        """Keep the arguments, whatever they are."""
        made = super().__new__(cls)
        made.args = args
        return made

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def get(self, name: str, default: Any = None) -> Any:
        """A field of a dataclass."""
        return self.state.get(name, default) if isinstance(self.state, dict) else default


class TensorHead:
    """A tensor without its values: storage (dtype, key, elements), offset, shape and stride in elements."""

    def __init__(self, storage: tuple[str, str, int], offset: int, shape: tuple[int, ...], stride: tuple[int, ...],
                 *others: Any) -> None:
        self.dtype, self.key, self.elements = storage
        self.offset, self.shape, self.stride = offset, tuple(shape), tuple(stride)


def _path(*parts: str) -> str:
    return str(PurePosixPath(*parts))


def _same(value: Any, *others: Any) -> Any:
    return value


Allowed = Mapping[tuple[str, str], Any]
_CHECKPOINT = "torch.distributed.checkpoint.metadata"
_COMMON: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch", "Size"): tuple,
    ("torch.serialization", "_get_layout"): _same,
    **{("torch", name): name for name in SCALARS},
}
METADATA: Allowed = {
    **_COMMON,
    **{(_CHECKPOINT, name): Record for name in (
        "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties",
        "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING")},
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): Record,
    ("torch.distributed.checkpoint.filesystem", "_StoragePrefix"): Record,
    ("olmo_core.distributed.checkpoint.filesystem", "_StorageInfo"): Record,
    ("olmo_core.distributed.checkpoint.filesystem", "_StoragePrefix"): Record,
    **{(module, name): _path for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "PurePosixPath")},
}
TENSORS: Allowed = {
    **_COMMON,
    ("torch._utils", "_rebuild_tensor_v2"): TensorHead,
    **{("torch", name): scalar for name, scalar in STORAGES.items()},
}
# The trainer's state beside that holds generators of numpy, Python and torch, and settings.
TRAINER: Allowed = {
    **METADATA, **TENSORS,
    **{(module, name): Record for module in ("numpy._core.multiarray", "numpy.core.multiarray")
       for name in ("_reconstruct", "scalar")},
    ("numpy", "ndarray"): Record,
    ("numpy", "dtype"): Record,
    ("_codecs", "encode"): _same,
    ("builtins", "set"): set,
    ("builtins", "bytearray"): Record,
}


class _Unpickler(pickle.Unpickler):
    def __init__(self, stream: io.BytesIO, allowed: Allowed, where: str) -> None:
        super().__init__(stream)
        self._allowed, self._where = allowed, where

    def find_class(self, module: str, name: str) -> Any:
        """The harmless stand-in for a permitted name."""
        try:
            return self._allowed[module, name]
        except KeyError:
            raise CheckpointError(f"{self._where} asks for {module}.{name}, which a checkpoint has no use for; nothing "
                                  "of it was run. Do not load it elsewhere unless you trust where it comes from."
                                  ) from None

    def persistent_load(self, pid: Any) -> tuple[str, str, int]:
        """A storage of a tensor: (dtype, key in the archive, elements)."""
        kind, dtype, key, _, elements = pid
        if kind != "storage" or dtype not in SCALARS:
            raise ValueError("not a storage")
        return dtype, str(key), int(elements)


def load(data: bytes, allowed: Allowed, where: str) -> Any:
    """The value of a pickle, made of plain values, `Record` and `TensorHead`.

    Raises:
        CheckpointError: it names something outside `allowed`, or it is damaged; `where` says which file it is.
    """
    stream = io.BytesIO(data)
    try:
        value = _Unpickler(stream, allowed, where).load()
    except DAMAGED:
        raise CheckpointError(f"{where} is damaged; copy or download it again.") from None
    if stream.tell() != len(data):
        raise CheckpointError(f"{where} has more behind its end; copy or download it again.")
    return value


def check_pickle(path: Path) -> None:
    """Refuse a pickle of a training checkpoint (`.metadata` or `train/rank<r>.pt`) that names what it should not.

    Raises:
        CheckpointError: as `load`, or the file is missing.
    """
    for data in _pickles(path):
        load(data, TRAINER, str(path))


def _pickles(path: Path) -> list[bytes]:
    try:
        with path.open("rb") as file:
            if file.read(4) != b"PK\x03\x04":  # as torch tells them
                return [path.read_bytes()]
        with zipfile.ZipFile(path) as archive:
            return [archive.read(entry) for entry in archive.infolist() if entry.filename.endswith("data.pkl")]
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing.") from None
    except (zipfile.BadZipFile, EOFError, NotImplementedError):
        raise CheckpointError(f"{path} is damaged; copy or download it again.") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}).") from None
