"""The header of a safetensors file: what it holds, checked against the file's size before anything trusts it.

A file is 8 bytes (little-endian header length), a JSON header, then the tensors' raw bytes without gaps.
Format: https://huggingface.co/docs/safetensors
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emo_select.errors import CheckpointError, TextError
from emo_select.textfile import parse_json, read_json_object, require_file

LONGEST_NAME = 255  # bytes of a file name, on every usual disk
MAX_HEADER_BYTES = 100_000_000  # the limit of the reference reader

# safetensors dtype → (bytes per element, name in torch)
DTYPES: Mapping[str, tuple[int, str]] = {
    "F64": (8, "float64"), "F32": (4, "float32"), "F16": (2, "float16"), "BF16": (2, "bfloat16"),
    "I64": (8, "int64"), "I32": (4, "int32"), "I16": (2, "int16"), "I8": (1, "int8"), "U8": (1, "uint8"),
    "U16": (2, "uint16"), "U32": (4, "uint32"), "U64": (8, "uint64"), "BOOL": (1, "bool"),
    "F8_E4M3": (1, "float8_e4m3fn"), "F8_E5M2": (1, "float8_e5m2"), "F8_E8M0": (1, "float8_e8m0fnu"),
}
SAFETENSORS_DTYPE = {torch_name: name for name, (_, torch_name) in DTYPES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """One tensor on disk. `offset` counts from the start of the shard file; `bytes` is its size."""

    dtype: str  # safetensors name, "F32"
    shape: tuple[int, ...]
    shard: str  # file name within the checkpoint's folder
    offset: int
    bytes: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one entry along axis 0."""
        return self.bytes // self.shape[0] if self.shape and self.shape[0] else self.bytes


def tensor_bytes(dtype: str, shape: Sequence[int]) -> int:
    """Size in bytes of a tensor of this safetensors dtype and shape."""
    return DTYPES[dtype][0] * math.prod(shape)


def read_header(path: Path, shard: str | None = None) -> dict[str, TensorInfo]:
    """Tensors of one safetensors file, in file order.

    Raises:
        CheckpointError: the file is missing, truncated, longer than its header says, or its header is not valid.
    """
    if not path.exists():
        raise _broken(path, "is missing")
    require_file(path, CheckpointError)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
            text = file.read(length) if 0 <= length <= min(size - 8, MAX_HEADER_BYTES) else None
    except OSError as error:
        raise _broken(path, f"cannot be read ({error.strerror})") from None
    if text is None:
        raise _broken(path, f"is truncated or not a safetensors file ({size} bytes)")
    try:
        header = parse_json(text.decode(), path.name)
    except (UnicodeDecodeError, TextError) as error:
        raise _broken(path, f"has an unreadable header ({error})") from None
    return _tensors(path, header, start=8 + length, size=size, shard=shard or path.name)


def read_integers(directory: Path, info: TensorInfo) -> tuple[int, ...]:
    """Values of a small tensor of whole numbers (I64 or I32)."""
    with (directory / info.shard).open("rb") as file:
        file.seek(info.offset)
        data = file.read(info.bytes)
    return struct.unpack(f"<{math.prod(info.shape)}{'q' if info.dtype == 'I64' else 'i'}", data)


def read_weight_map(path: Path) -> dict[str, str]:
    """Tensor name → shard, from the index of a sharded checkpoint. Raises `CheckpointError` where it is not one."""
    weight_map = read_json_object(path, CheckpointError).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise CheckpointError(f"{path} is not a valid index; download or save it again.")
    for shard in set(weight_map.values()):  # a folder's own files only, whatever the name makes of the path
        if shard in ("", ".", "..") or shard != Path(shard).name or "\0" in shard or len(shard.encode()) > LONGEST_NAME:
            raise CheckpointError(f"{path} is not a valid index: {shard!r} is no file name; download or save it again.")
    return weight_map


def write_header(tensors: Sequence[tuple[str, str, Sequence[int]]]) -> tuple[bytes, list[int]]:
    """Header bytes for (name, dtype, shape) stored in this order, and each tensor's offset in the file."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offsets, end = [], 0
    for name, dtype, shape in tensors:
        start, end = end, end + tensor_bytes(dtype, shape)
        offsets.append(start)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # readers map the data: keep it aligned
    return struct.pack("<Q", len(text)) + text, [8 + len(text) + offset for offset in offsets]


def _tensors(path: Path, header: object, *, start: int, size: int, shard: str) -> dict[str, TensorInfo]:
    if not isinstance(header, dict):
        raise _broken(path, "has an unreadable header")
    found = {name: _info(path, name, entry, start, shard) for name, entry in header.items() if name != "__metadata__"}
    end = start
    for name, info in sorted(found.items(), key=lambda item: (item[1].offset, item[1].bytes)):
        if info.offset != end:
            raise _broken(path, f"has a header whose offsets overlap or leave a gap at {name}")
        end += info.bytes
    if end != size:
        what = "is truncated" if size < end else "is longer than its header says"
        raise _broken(path, f"{what} ({size} bytes, its header needs {end})")
    return found


def _info(path: Path, name: str, entry: Any, start: int, shard: str) -> TensorInfo:
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        if not all(isinstance(n, int) and n >= 0 for n in (*shape, begin, end)):
            raise TypeError
    except (TypeError, KeyError, ValueError):
        raise _broken(path, f"has an unreadable entry for {name}") from None
    if dtype not in DTYPES:
        raise _broken(path, f"stores {name} as {dtype!r}, which this version cannot read")
    if end - begin != tensor_bytes(dtype, shape):
        raise _broken(path, f"has {end - begin} bytes for {name}, but {dtype} {list(shape)} needs "
                            f"{tensor_bytes(dtype, shape)}")
    return TensorInfo(dtype, shape, shard, start + begin, end - begin)


def _broken(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"Shard {path.name} in {path.parent} {what}; download or save it again.")
