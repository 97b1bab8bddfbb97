"""Telling a tracker about a training: what it is called there, where its logs lie, and that it is over."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import Trainer

PROJECT = "emo-select"
LOGS = "logs"  # of TensorBoard, within the output directory


def run_name(out: Path) -> str:
    """A training's name in a tracker: the end of its path, which for a run says what it is."""
    return f"{out.parent.name}/{out.name}"


@contextmanager
def reporting(trainer: Trainer, tracker: str, out: Path) -> Iterator[None]:
    """Report what is trained in the body as one training of its own."""
    if tracker == "tensorboard":
        _log_beside(trainer, out)
    if tracker == "wandb":
        os.environ.setdefault("WANDB_PROJECT", PROJECT)
    try:
        yield
    finally:
        if tracker == "wandb":
            import_module("wandb").finish()  # or the next training of this process would continue these curves


def _log_beside(trainer: Trainer, out: Path) -> None:
    """Log to the output directory: the trainer's own default goes when the training is complete."""
    from transformers.integrations import TensorBoardCallback

    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
            callback.logging_dir = str(out / LOGS)
