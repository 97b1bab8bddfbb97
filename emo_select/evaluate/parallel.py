"""Data parallel evaluation under `torchrun`: each process answers its share of the documents, all get all answers."""

from __future__ import annotations

import os
import sys
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from emo_select import progress


@contextmanager
def process_group() -> Iterator[None]:
    """Join the processes that `torchrun` started for the body; does nothing without it."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or world_size() > 1:
        yield
        return
    import torch
    import torch.distributed as dist

    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(local_rank())
    dist.init_process_group("nccl" if cuda else "gloo")
    if not is_first():
        progress.configure(quiet=True)
    try:
        yield
    finally:
        dist.destroy_process_group()


def is_first() -> bool:
    """Whether this process talks and prints: the only one, or the first that `torchrun` started."""
    return os.environ.get("RANK", "0") == "0"


def rank() -> int:
    """Number of this process; 0 writes the files."""
    group = _joined()
    return int(group.get_rank()) if group else 0


def world_size() -> int:
    """How many processes share the work."""
    group = _joined()
    return int(group.get_world_size()) if group else 1


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
    group = _joined()
    if group is None:
        return [items]
    parts: list[Any] = [None] * world_size()
    group.all_gather_object(parts, items)
    return parts


def _joined() -> Any:
    """torch.distributed where there is a process group, else None; torch is not imported for the question."""
    group = sys.modules.get("torch.distributed")
    return group if group and group.is_available() and group.is_initialized() else None
