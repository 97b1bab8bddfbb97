"""Several processes (torchrun) that share one calibration set: each streams its part, sums are added in fp64."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist

from emo_select.experts.scores import LayerSums


@dataclass(frozen=True)
class Team:
    """This process among those that work together."""

    rank: int = 0
    size: int = 1

    @classmethod
    def join(cls, device: torch.device) -> Team:
        """Join the processes that torchrun started; a team of one without it."""
        if int(os.environ.get("WORLD_SIZE", "1")) == 1 and not dist.is_initialized():
            return cls()
        if not dist.is_initialized():
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        return cls(dist.get_rank(), dist.get_world_size())

    @property
    def leads(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """Which of `count` examples this process streams."""
        return range(self.rank, count, self.size)

    def add_up(self, sums: LayerSums) -> None:
        """Replace this process's sums by those of all."""
        if self.size > 1:
            for values in sums.values.values():
                dist.all_reduce(values)

    def wait(self) -> None:
        """Return when every process has called this."""
        if self.size > 1:
            dist.barrier()

    def total(self, values: list[int]) -> list[int]:
        """Element-wise sum over all processes."""
        if self.size == 1:
            return values
        shared = torch.tensor(values, device=self._device())
        dist.all_reduce(shared)
        return [int(value) for value in shared]

    def least(self, value: int) -> int:
        """The smallest value that any process has."""
        if self.size == 1:
            return value
        shared = torch.tensor(value, device=self._device())
        dist.all_reduce(shared, op=dist.ReduceOp.MIN)
        return int(shared)

    def _device(self) -> str:
        return "cuda" if dist.get_backend() == "nccl" else "cpu"
