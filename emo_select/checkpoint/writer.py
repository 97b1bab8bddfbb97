"""Write a sharded checkpoint tensor by tensor, holding one tensor in memory; a shard appears only when it is whole."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import TYPE_CHECKING

from emo_select.checkpoint.header import SAFETENSORS_DTYPE, read_header, tensor_bytes, write_header
from emo_select.checkpoint.reader import INDEX, SINGLE
from emo_select.errors import CheckpointError
from emo_select.faults import at as located
from emo_select.storage import write_json

if TYPE_CHECKING:
    import torch

DEFAULT_SHARD_BYTES = 5_000_000_000  # as transformers 4.57 splits


@dataclass(frozen=True)
class TensorSpec:
    """A tensor to be written. `dtype` is the safetensors name ("F32", "BF16", …)."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Size of its data."""
        return tensor_bytes(self.dtype, self.shape)


Shards = Mapping[str, Sequence[TensorSpec]]  # file name → its tensors, in file order


def assign_shards(tensors: Iterable[TensorSpec], max_shard_bytes: int | None = None) -> dict[str, list[TensorSpec]]:
    """Fill shards in order up to `max_shard_bytes` (a larger tensor gets its own); published file names."""
    limit = max_shard_bytes or DEFAULT_SHARD_BYTES
    groups: list[list[TensorSpec]] = [[]]
    filled = 0
    for spec in tensors:
        if groups[-1] and filled + spec.bytes > limit:
            groups.append([])
            filled = 0
        groups[-1].append(spec)
        filled += spec.bytes
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, 1)}


class ShardedWriter:
    """Writes the tensors named in `shards`, in any order and from any thread; leaving the `with` block publishes.

    A shard is written to `.NAME.partial` and renamed once all of its tensors are there and on disk. Shards that an
    interrupted writer with the same plan has finished are kept: `done(name)` tells whether a tensor is already in
    one, and `write` then ignores it. The index (for more than one shard) comes last. If the block raises, finished
    shards stay for the next attempt and no index is written. config.json and the rest are the caller's.

        specs = [TensorSpec(n, i.dtype, i.shape) for n, i in checkpoint.tensors.items()]
        with ShardedWriter(directory, assign_shards(specs)) as out:
            for name in out.missing():
                out.write(name, checkpoint.read(name))
    """

    def __init__(self, directory: Path, shards: Shards) -> None:
        self.directory, self.shards = directory, shards
        self._headers = {s: write_header([(t.name, t.dtype, t.shape) for t in ts]) for s, ts in shards.items()}
        self._place = {t.name: (s, at, t) for s, ts in shards.items()
                       for t, at in zip(ts, self._headers[s][1], strict=True)}
        self._pending = {s: {t.name for t in ts} for s, ts in shards.items() if not self._finished(s)}
        self._files: dict[str, int] = {}
        self._lock = Lock()

    def done(self, name: str) -> bool:
        """Whether the tensor is already written."""
        return name not in self._pending.get(self._place[name][0], ())

    def missing(self) -> list[str]:
        """Names still to be written, in shard and file order (the fastest to write in)."""
        return [t.name for s, ts in self.shards.items() if s in self._pending for t in ts if not self.done(t.name)]

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor (any device); shape and dtype must be the planned ones."""
        import torch

        spec = self._place[name][2]
        stored = SAFETENSORS_DTYPE.get(str(tensor.dtype).removeprefix("torch."))
        if (stored, tuple(tensor.shape)) != (spec.dtype, spec.shape):
            raise CheckpointError(f"{name} was planned as {spec.dtype} {list(spec.shape)}, but is {tensor.dtype} "
                                  f"{list(tensor.shape)}.")
        flat = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
        self.write_bytes(name, [flat.numpy().data])

    def write_bytes(self, name: str, pieces: Iterable[memoryview]) -> None:
        """Write one tensor's raw little-endian bytes, given in order in any number of pieces."""
        if self.done(name):
            return
        shard, at, spec = self._place[name]
        end = at + spec.bytes
        for piece in pieces:
            with located(self._partial(shard)):
                _write_all(self._file(shard), piece, at)
            at += len(piece)
        if at != end:
            raise CheckpointError(f"{name} needs {spec.bytes} bytes, {spec.bytes + at - end} were written.")
        self._finish_tensor(shard, name)

    def close(self) -> None:
        """Publish the index; CheckpointError if tensors are missing."""
        missing = self.missing()
        if missing:
            raise CheckpointError(f"{len(missing)} tensors were never written, the first is {missing[0]}.")
        for shard in list(self._pending):  # a shard without tensors
            self._publish(shard)
        if len(self.shards) > 1:
            total = sum(t.bytes for ts in self.shards.values() for t in ts)
            weight_map = {t.name: s for s, ts in self.shards.items() for t in ts}
            write_json(self.directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})

    def __enter__(self) -> ShardedWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
                 ) -> None:
        try:
            if kind is None:
                self.close()
        finally:
            for descriptor in self._files.values():
                os.close(descriptor)
            self._files.clear()

    def _finished(self, shard: str) -> bool:
        path = self.directory / shard
        if not path.exists():
            return False
        try:
            found = read_header(path)
        except CheckpointError:
            return False
        return [(n, i.dtype, i.shape) for n, i in found.items()] == [(t.name, t.dtype, t.shape)
                                                                     for t in self.shards[shard]]

    def _file(self, shard: str) -> int:
        with self._lock:
            if shard not in self._files:
                self._files[shard] = os.open(self._partial(shard), os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
                _write_all(self._files[shard], memoryview(self._headers[shard][0]), 0)
            return self._files[shard]

    def _partial(self, shard: str) -> Path:
        return self.directory / f".{shard}.partial"

    def _finish_tensor(self, shard: str, name: str) -> None:
        with self._lock:
            self._pending[shard].discard(name)
            last = not self._pending[shard]
        if last:
            self._publish(shard)

    def _publish(self, shard: str) -> None:
        descriptor = self._file(shard)
        with located(self._partial(shard)):
            os.fsync(descriptor)
        os.close(descriptor)
        self._partial(shard).replace(self.directory / shard)
        del self._files[shard], self._pending[shard]


def _write_all(descriptor: int, data: memoryview, at: int) -> None:
    while len(data):
        count = os.pwrite(descriptor, data[:1 << 30], at)
        data, at = data[count:], at + count
