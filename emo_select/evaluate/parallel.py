"""Data parallel evaluation: each process of `torchrun` takes its share of the documents."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


class DataParallel:
    """The part of lm-eval's `LM` that concerns several processes, over torch.distributed."""

    _device: torch.device

    @property
    def rank(self) -> int:
        return dist.get_rank() if dist.is_initialized() else 0

    @property
    def world_size(self) -> int:
        return dist.get_world_size() if dist.is_initialized() else 1

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensors of all processes, stacked."""
        if self.world_size == 1:
            return tensor[None]
        parts = [torch.zeros_like(tensor) for _ in range(self.world_size)]
        dist.all_gather(parts, tensor)
        return torch.stack(parts)

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """The objects of all processes, on process `dst`; None elsewhere."""
        if self.world_size == 1:
            return [obj]
        parts: list[Any] | None = [None] * self.world_size if self.rank == dst else None
        dist.gather_object(obj, parts, dst=dst)
        return parts

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()


def start() -> None:
    """Join the other processes when started by `torchrun`; do nothing otherwise."""
    import os

    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group("nccl" if cuda else "gloo")


def stop() -> None:
    """Leave the group that `start` joined."""
    if dist.is_initialized():
        dist.destroy_process_group()
