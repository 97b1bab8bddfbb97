"""A checkpoint on disk, opened by its headers alone; tensors, or some of their rows, are read when asked for.

Reads go through `pread` into memory of their own, not through a memory map: a page that was mapped stays in the
process's resident set until the map goes, and a shard cut short while mapped kills the process with SIGBUS.
"""

from __future__ import annotations

import math
import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from threading import Lock, local
from types import TracebackType
from typing import TYPE_CHECKING, Any

from emo_select.checkpoint.fingerprint import Content, content_of
from emo_select.checkpoint.header import (
    DTYPES,
    SAFETENSORS_DTYPE,
    TensorInfo,
    read_header,
    read_weight_map,
    tensor_bytes,
)
from emo_select.checkpoint.quantised import FLOATS, Formats, formats_of
from emo_select.checkpoint.sources import resolve, torch_files
from emo_select.checkpoint.values import check_values
from emo_select.errors import CheckpointError
from emo_select.progress import say_once
from emo_select.textfile import read_json_object

if TYPE_CHECKING:
    import torch

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
LAYER = re.compile(r"model\.layers\.(\d+)\.")
PIECE_BYTES = 1 << 19  # small enough to stay in the processor's cache from reading over checking to writing
MAX_READ = 1 << 30  # one pread never returns more than 2 GiB


def open_checkpoint(source: str | Path, revision: str | None = None, *, data_dir: str | Path | None = None,
                    download: bool = True) -> Checkpoint:
    """Open a local folder, a Hub id or `demo/NAME` (see `resolve`); every header is checked against its file's size.

    Raises:
        ModelError: the source does not exist. CheckpointError: a file is missing, truncated or inconsistent.
    """
    directory = resolve(str(source), revision, data_dir=data_dir, download=download)
    return Checkpoint(directory, read_config(directory), _read_headers(directory))


def read_config(directory: Path) -> dict[str, Any]:
    """The folder's config.json."""
    path = directory / "config.json"
    if not path.exists():
        raise CheckpointError(f"{directory} has no config.json, so it is not a checkpoint.")
    config = read_json_object(path, CheckpointError)
    check_values(config)
    return config


class Checkpoint:
    """Read-only view of a checkpoint folder. Safe to read from several threads.

    Attributes:
        directory: the folder, after resolving ids.
        config: config.json as a dict.
        tensors: name → `TensorInfo`, in shard and file order.
        has_weights: whether there is anything to read; see `models.shapes` for those of which only shapes are known.
    """

    has_weights = True

    def __init__(self, directory: Path, config: dict[str, Any], tensors: Mapping[str, TensorInfo]) -> None:
        self.directory, self.config, self.tensors = directory, config, tensors
        self._files: dict[str, int] = {}
        self._lock, self._buffers = Lock(), local()
        self._plain: dict[str, Checkpoint] = {}

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.bytes for info in self.tensors.values())

    @cached_property
    def parameters(self) -> int:
        """Elements of all tensors, quantised weights counted as the numbers they stand for."""
        seen = self.plain() if self.formats.weights else self
        return sum(math.prod(info.shape) for info in seen.tensors.values())

    @cached_property
    def largest_layer_bytes(self) -> int:
        """Bytes of the decoder layer that has most, quantised weights counted as the numbers they stand for."""
        seen = self.plain() if self.formats.weights else self
        return max((sum(seen.tensors[name].bytes for name in names) for names in seen.layers.values()), default=0)

    @property
    def shards(self) -> list[str]:
        """Shard file names in order of first use."""
        return list(dict.fromkeys(info.shard for info in self.tensors.values()))

    @cached_property
    def layers(self) -> dict[int, list[str]]:
        """Names of the tensors of each decoder layer (`model.layers.<layer>.…`)."""
        names: dict[int, list[str]] = {}
        for name in self.tensors:
            if match := LAYER.match(name):
                names.setdefault(int(match[1]), []).append(name)
        return names

    def info(self, name: str) -> TensorInfo:
        """The tensor's entry; CheckpointError if there is none."""
        if name not in self.tensors:
            raise CheckpointError(f"{self.directory} has no tensor {name}; its config.json does not fit its weights.")
        return self.tensors[name]

    def read(self, name: str, rows: Sequence[int] | None = None, axis: int = 0) -> torch.Tensor:
        """The tensor (or its `rows` along `axis`, in that order) on the CPU in its stored dtype, own memory."""
        import torch

        info = self.info(name)
        shape = info.shape if rows is None else (*info.shape[:axis], len(rows), *info.shape[axis + 1:])
        out = torch.empty(shape, dtype=getattr(torch, DTYPES[info.dtype][1]))
        self.read_into(name, out, rows, axis)
        return out

    def read_into(self, name: str, out: torch.Tensor, rows: Sequence[int] | None = None, axis: int = 0) -> None:
        """Read the tensor's bytes (or `rows` of it) into `out`: contiguous, on the CPU, of the stored dtype."""
        import torch

        info = self.info(name)
        if not out.is_contiguous() or str(out.dtype) != f"torch.{DTYPES[info.dtype][1]}":
            raise ValueError(f"{name} is stored as {info.dtype}; cannot read it into {out.dtype} {tuple(out.shape)}")
        self.read_bytes_into(name, out.view(-1).view(torch.uint8).numpy().data, rows, axis)

    def read_bytes_into(self, name: str, buffer: memoryview, rows: Sequence[int] | None = None, axis: int = 0) -> None:
        """Fill `buffer` with the tensor's raw bytes, or with those of `rows`; sizes must agree."""
        at = 0
        for offset, count in self.ranges(name, rows, axis):
            if at + count > len(buffer):
                raise ValueError(f"{name} does not fit the buffer of {len(buffer)} bytes")
            self._fill(self.tensors[name].shard, buffer[at:at + count], offset)
            at += count
        if at != len(buffer):
            raise ValueError(f"{name} has {at} bytes, the buffer {len(buffer)}")

    def pieces(self, name: str, rows: Sequence[int] | None = None, axis: int = 0) -> Iterator[memoryview]:
        """The bytes of the tensor or of `rows`, in order.

        All pieces that a thread gets are views of one buffer: use each before asking for the next.
        """
        if not hasattr(self._buffers, "piece"):
            self._buffers.piece = memoryview(bytearray(PIECE_BYTES))
        buffer = self._buffers.piece
        for offset, count in self.ranges(name, rows, axis):
            for at in range(0, count, PIECE_BYTES):
                piece = buffer[:min(PIECE_BYTES, count - at)]
                self._fill(self.tensors[name].shard, piece, offset + at)
                yield piece

    def ranges(self, name: str, rows: Sequence[int] | None = None, axis: int = 0) -> Iterator[tuple[int, int]]:
        """(offset in the shard file, bytes) of the tensor or of runs of consecutive `rows` along `axis`."""
        info = self.info(name)
        if rows is None:
            yield info.offset, info.bytes
            return
        size, outer = info.shape[axis], math.prod(info.shape[:axis])
        if rows and not (min(rows) >= 0 and max(rows) < size):
            raise IndexError(f"{name} has {size} rows")
        row_bytes = math.prod(info.shape[axis + 1:]) * tensor_bytes(info.dtype, (1,))
        for first, length in runs([at * size + row for at in range(outer) for row in rows]):
            yield info.offset + first * row_bytes, length * row_bytes

    @cached_property
    def formats(self) -> Formats:
        """What of it is quantised, and how; raises what `formats_of` raises."""
        return formats_of(self.config, self.tensors, self.directory)

    def plain(self, dtype: str | None = None) -> Checkpoint:
        """This checkpoint with every quantised weight as the numbers it stands for; itself where none is quantised.

        `dtype` is the precision of those weights (a safetensors name), by default the configuration's.

        Raises:
            ModelError, CheckpointError: weights are quantised in a way that is not read here.
        """
        self.formats.require_readable()
        if not self.formats.weights:
            return self
        from emo_select.checkpoint.plain import Plain

        chosen = dtype or self._own_dtype()
        if chosen not in self._plain:
            self._plain[chosen] = Plain(self, self.formats, chosen)
        return self._plain[chosen]

    def _own_dtype(self) -> str:
        named = SAFETENSORS_DTYPE.get(str(self.config.get("dtype") or self.config.get("torch_dtype")))
        return named if named in FLOATS else "BF16"

    def warm(self, name: str, rows: Sequence[int] | None = None) -> None:
        """Let the kernel read the tensor (or `rows` of it) into its page cache."""
        descriptor = self.file(self.info(name).shard)
        for offset, count in self.ranges(name, rows):
            os.posix_fadvise(descriptor, offset, count, os.POSIX_FADV_WILLNEED)

    def file(self, shard: str) -> int:
        """File descriptor of a shard, opened once, closed with the checkpoint."""
        with self._lock:
            if shard not in self._files:
                self._files[shard] = os.open(self.directory / shard, os.O_RDONLY)
            return self._files[shard]

    @cached_property
    def content(self) -> Content:
        """Digests of all that a result can depend on. The first look at large weights reads them."""
        return content_of(self.directory, self.config, self.shards)

    @property
    def fingerprint(self) -> str:
        """What this model is: digest of configuration, tokenizer, generation defaults, code and every weight."""
        return self.content.fingerprint

    @property
    def forward_fingerprint(self) -> str:
        """Digest of what texts become in it: configuration, tokenizer and every weight."""
        return self.content.forward

    def _fill(self, shard: str, buffer: memoryview, offset: int) -> None:
        done = 0
        while done < len(buffer):
            count = os.preadv(self.file(shard), [buffer[done:done + MAX_READ]], offset + done)
            if count == 0:
                raise CheckpointError(f"Shard {shard} in {self.directory} became shorter while it was being read.")
            done += count

    def close(self) -> None:
        """Close the shard files; reading again reopens them."""
        files, self._files = self._files, {}
        for descriptor in files.values():
            os.close(descriptor)

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
                 ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


def runs(rows: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(first, length) of maximal runs of consecutive numbers, in order: [3, 4, 5, 9] → (3, 3), (9, 1)."""
    start = 0
    for i in range(1, len(rows) + 1):
        if i == len(rows) or rows[i] != rows[i - 1] + 1:
            yield rows[start], i - start
            start = i


def _read_headers(directory: Path) -> dict[str, TensorInfo]:
    if (directory / SINGLE).exists():
        return read_header(directory / SINGLE)
    if (directory / INDEX).exists():
        return _read_indexed(directory)
    if torch_files(directory):
        raise CheckpointError(f"{directory} has its weights in pickles ({torch_files(directory)[0].name}), which are "
                              f"not read; convert them once: emo-select convert {shlex.quote(str(directory))} --to "
                              "safetensors --out FOLDER")
    other = next((path.name for suffix in ("*.gguf", "*.pth", "*.h5") for path in sorted(directory.glob(suffix))), None)
    there = f" ({other} is in another format)" if other else ""
    raise CheckpointError(f"{directory} has no {SINGLE} and no {INDEX}{there}; only safetensors checkpoints can be "
                          "read.")


def _read_indexed(directory: Path) -> dict[str, TensorInfo]:
    """The tensors of all shards that the index names, also those that it does not list, as transformers has it.

    Of a tensor that lies in several (one laid over another) the index says which counts.
    """
    weight_map = read_weight_map(directory / INDEX)
    tensors: dict[str, TensorInfo] = {}
    for shard in dict.fromkeys(weight_map.values()):
        header = read_header(directory / shard)
        twice = header.keys() & tensors.keys()
        if unclear := min((name for name in twice if name not in weight_map), default=None):
            raise CheckpointError(f"{unclear} is in two shards of {directory}, {tensors[unclear].shard} and {shard}, "
                                  f"and {INDEX} does not say which one counts.")
        for name in (name for name in sorted(twice) if weight_map[name] != max(shard, tensors[name].shard)):
            say_once(f"{name} is in two shards of {directory}; {weight_map[name]} counts, as {INDEX} says, but "
                     "transformers takes the last one.")
        tensors |= {name: info for name, info in header.items() if weight_map.get(name, shard) == shard}
    for name, shard in weight_map.items():
        if name not in tensors:
            raise CheckpointError(f"{INDEX} in {directory} says that {shard} holds {name}, but it does not.")
    return tensors
