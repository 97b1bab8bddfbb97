"""Hidden states of all calibration tokens between two layers: on the device, in host memory, or in a scratch file."""

from __future__ import annotations

import os
import tempfile
from abc import ABC, abstractmethod
from pathlib import Path

import torch
from torch import Tensor

from emo_select.experts.batches import Batch
from emo_select.faults import at as located
from emo_select.storage import require_space

COPY_BYTES = 64 << 20


class Budget:
    """Memory that hidden states may still take, first on the device and then on the host.

    `limit` is bytes over both together; None allows half of what is free of either now.
    """

    def __init__(self, device: torch.device, limit: int | None, scratch: Path | None = None) -> None:
        import psutil

        self.device, self.scratch = device, scratch
        self._on_device = torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else 0
        self._on_host = psutil.virtual_memory().available // 2
        self._left = self._on_device + self._on_host if limit is None else limit

    def allocate(self, rows: int, width: int, dtype: torch.dtype) -> HiddenStates:
        """Room for (rows, width) in the fastest place that has any."""
        size = rows * width * dtype.itemsize
        if size <= min(self._left, self._on_device):
            self._on_device, self._left = self._on_device - size, self._left - size
            return InMemory(rows, width, dtype, self.device, self.device)
        if size <= min(self._left, self._on_host):
            self._on_host, self._left = self._on_host - size, self._left - size
            return InMemory(rows, width, dtype, torch.device("cpu"), self.device)
        return InFile(rows, width, dtype, self.device, self.scratch)

    def release(self, states: HiddenStates) -> None:
        """Give the room of `states` back."""
        if isinstance(states, InMemory):
            size = states.rows * states.width * states.dtype.itemsize
            self._left += size
            if states.tier == "host":
                self._on_host += size
            else:
                self._on_device += size
        states.close()


class HiddenStates(ABC):
    """(rows, width) of one dtype, read and written by ranges of rows on the compute device."""

    tier: str

    def __init__(self, rows: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        self.rows, self.width, self.dtype, self.device = rows, width, dtype, device

    def read(self, batch: Batch) -> Tensor:
        """The batch's rows (T, width) on the compute device."""
        return self.read_rows(batch.start, batch.stop)

    @abstractmethod
    def read_rows(self, start: int, stop: int) -> Tensor:
        """Rows on the compute device."""

    @abstractmethod
    def write(self, start: int, values: Tensor) -> None:
        """Replace rows from `start` on."""

    def close(self) -> None:  # noqa: B027
        """Free the room."""

    def save(self, path: Path) -> int:
        """Write all rows raw to `path`, flushed to disk; bytes written."""
        with located(path), path.open("wb") as file:
            for start, stop in self._pieces():
                file.write(_raw(self.read_rows(start, stop)))
            file.flush()
            os.fsync(file.fileno())
        return path.stat().st_size

    def load(self, path: Path) -> None:
        """Read back what `save` wrote."""
        with path.open("rb") as file:
            for start, stop in self._pieces():
                values = torch.empty(stop - start, self.width, dtype=self.dtype)
                file.readinto(_raw(values))
                self.write(start, values.to(self.device))

    def _pieces(self) -> list[tuple[int, int]]:
        step = max(1, COPY_BYTES // max(1, self.width * self.dtype.itemsize))
        return [(start, min(start + step, self.rows)) for start in range(0, self.rows, step)]


class InMemory(HiddenStates):
    """Kept in one tensor, on the compute device or (pinned, for a GPU) in host memory."""

    def __init__(self, rows: int, width: int, dtype: torch.dtype, home: torch.device, device: torch.device) -> None:
        super().__init__(rows, width, dtype, device)
        self.tier = "host" if home.type == "cpu" else "device"
        pinned = home.type == "cpu" and device.type == "cuda"
        self._values: Tensor | None = torch.empty(rows, width, dtype=dtype, device=home, pin_memory=pinned)

    def read_rows(self, start: int, stop: int) -> Tensor:
        """Rows on the compute device."""
        assert self._values is not None
        return self._values[start:stop].to(self.device, non_blocking=True)

    def write(self, start: int, values: Tensor) -> None:
        """Replace rows from `start` on."""
        assert self._values is not None
        self._values[start:start + len(values)].copy_(values, non_blocking=self.tier == "device")

    def close(self) -> None:
        """Free the memory."""
        self._values = None


class InFile(HiddenStates):
    """Kept in a file without a name, which the kernel removes when the process ends, however it ends.

    Read and written by `pread`/`pwrite`: pages of a memory map would count as this process's memory.
    """

    tier = "scratch"

    def __init__(self, rows: int, width: int, dtype: torch.dtype, device: torch.device, scratch: Path | None) -> None:
        super().__init__(rows, width, dtype, device)
        folder = Path(scratch or tempfile.gettempdir())
        folder.mkdir(parents=True, exist_ok=True)
        size = rows * width * dtype.itemsize
        require_space(folder, size, "The scratch file for hidden states")
        self._folder = folder
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - closed by close()
        os.ftruncate(self._file.fileno(), size)

    def read_rows(self, start: int, stop: int) -> Tensor:
        """Rows on the compute device."""
        values = torch.empty(stop - start, self.width, dtype=self.dtype)
        raw, at = _raw(values), self._offset(start)
        while raw:
            count = os.preadv(self._file.fileno(), [raw], at)
            raw, at = raw[count:], at + count
        return values.to(self.device)

    def write(self, start: int, values: Tensor) -> None:
        """Replace rows from `start` on."""
        raw, at = _raw(values), self._offset(start)
        with located(self._folder):
            while raw:
                count = os.pwrite(self._file.fileno(), raw, at)
                raw, at = raw[count:], at + count

    def close(self) -> None:
        """Give the disk space back."""
        self._file.close()

    def _offset(self, row: int) -> int:
        return row * self.width * self.dtype.itemsize


def _raw(values: Tensor) -> memoryview:
    return memoryview(values.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
