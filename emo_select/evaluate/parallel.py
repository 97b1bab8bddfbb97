"""Data parallel evaluation under `torchrun`: each process answers its share of the documents, all get all answers."""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist


@contextmanager
def process_group() -> Iterator[None]:
    """Join the processes that `torchrun` started for the body; does nothing without it."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(local_rank())
    dist.init_process_group("nccl" if cuda else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def rank() -> int:
    """Number of this process; 0 writes the files."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes share the work."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank() -> int:
    """Number of this process on its machine, hence of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def own_share(owners: Sequence[Hashable]) -> list[int]:
    """Indices of the items of this process, where `owners` says what (a document) each item belongs to.

    Owners go round the processes in order of appearance, so all items of one owner stay together.
    """
    number: dict[Hashable, int] = {}
    for owner in owners:
        number.setdefault(owner, len(number))
    return [index for index, owner in enumerate(owners) if number[owner] % world_size() == rank()]


def exchanged(items: Any) -> list[Any]:
    """The `items` of every process, on every process."""
    if world_size() == 1:
        return [items]
    parts: list[Any] = [None] * world_size()
    dist.all_gather_object(parts, items)
    return parts
