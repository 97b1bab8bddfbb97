"""What a training leaves on disk, and when: weights at even steps, its whole state now and then.

    <out>/checkpoint-N/       weights in the source's own layout, appearing by one rename
    <out>/.training/          job, examples, and `state/`, the point from which a killed training continues
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from emo_select.checkpoint import open_checkpoint
from emo_select.checkpoint.header import DTYPES
from emo_select.finetune.lora import merge_adapter, save_adapter
from emo_select.finetune.recipe import checkpoint_steps
from emo_select.progress import Bar
from emo_select.tree import partial_directory, publish

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from torch import Tensor
    from transformers import PreTrainedModel

SAVING_SHARE = 0.05  # of the time at most, spent on writing training state
BYTES_PER_SECOND = 500e6  # assumed of the disk until the first state has been written
WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.key", ".*")


class Keeper(TrainerCallback):
    """Decides after each step what to save; `RecipeTrainer` calls `save` back when something is due."""

    def __init__(self, *, count: int, bar: Bar, state_bytes: int) -> None:
        self._count, self._bar = count, bar
        self.writers: Mapping[Literal["weights", "state"], Callable[[int], None]] = {}
        self.steps: list[int] = []
        self.stop_requested = False
        self._cost = state_bytes / BYTES_PER_SECOND
        self._saved_at = time.monotonic()
        self._state_due = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Place the checkpoints, now that the number of steps is known."""
        self.steps = checkpoint_steps(state.max_steps, self._count)
        self._saved_at = time.monotonic()
        self._bar.update(total=state.max_steps)
        self._bar.advance(state.global_step)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ask for a save at checkpoint steps, when the last state is old enough, and before stopping."""
        old = time.monotonic() - self._saved_at > self._cost / SAVING_SHARE
        stop, old = _agree(self.stop_requested, old)
        last = state.global_step == state.max_steps
        self._state_due = (old or stop) and not last
        control.should_save = self._state_due or state.global_step in self.steps
        control.should_training_stop |= stop and not last

    def save(self, step: int) -> None:
        """Write what `on_step_end` found due after `step`."""
        if step in self.steps:
            self.writers["weights"](step)
        if self._state_due:
            started = time.monotonic()
            self.writers["state"](step)
            self._saved_at = time.monotonic()
            self._cost = self._saved_at - started

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show loss, rate and speed beside the bar."""
        if logs and "loss" in logs:
            note = f"loss {logs['loss']:.4f}  lr {logs['learning_rate']:.2e}  {logs['tokens_per_second']:,.0f} tokens/s"
            self._bar.advance(1, note)


def _agree(*flags: bool) -> tuple[bool, ...]:
    """Each flag true on every process if it is true on any."""
    import torch
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return flags
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    agreed = torch.tensor(flags, dtype=torch.int32, device=device)
    dist.all_reduce(agreed, op=dist.ReduceOp.MAX)
    return tuple(bool(flag) for flag in agreed)


def write_checkpoint(model: PreTrainedModel, tensors: Mapping[str, Tensor] | None, source: Path, final: Path) -> None:
    """Publish the model's weights in the layout and dtype of `source`, with its config and tokenizer unchanged."""
    partial = partial_directory(final)
    shutil.rmtree(partial, ignore_errors=True)
    with open_checkpoint(source) as start:
        dtype = _stored_dtype(start.tensors.values())
    values = {name: tensor.to(dtype) for name, tensor in (tensors or model.state_dict()).items()}
    model.save_pretrained(partial, state_dict=values)
    copy_companions(source, partial)
    publish(partial, final)


def write_adapter(
    model: PeftModel, tensors: dict[str, Tensor] | None, source: Path, final: Path, *, merge: bool
) -> None:
    """Publish an adapter; with `merge` the checkpoint is the merged model and the adapter lies in `adapter/`."""
    partial = partial_directory(final)
    shutil.rmtree(partial, ignore_errors=True)
    adapter = partial / "adapter" if merge else partial
    adapter.mkdir(parents=True)
    save_adapter(model, tensors, adapter, source)
    if merge:
        merge_adapter(source, adapter, dtype="auto").save_pretrained(partial)
        copy_companions(source, partial)
    publish(partial, final)


def copy_companions(source: Path, target: Path) -> None:
    """Copy what lies beside the weights: config, tokenizer, generation defaults, which experts were kept."""
    (target / "generation_config.json").unlink(missing_ok=True)  # only if the source has one
    for path in source.iterdir():
        if path.is_file() and not any(path.match(pattern) for pattern in WEIGHT_FILES):
            shutil.copy2(path.resolve(), target / path.name)


def _stored_dtype(infos: Any) -> torch.dtype:
    """Dtype of most bytes on disk."""
    import torch

    size: dict[str, int] = {}
    for info in infos:
        size[info.dtype] = size.get(info.dtype, 0) + info.bytes
    return getattr(torch, DTYPES[max(size, key=lambda name: size[name])][1])  # type: ignore[no-any-return]
