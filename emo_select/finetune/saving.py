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

from emo_select.checkpoint import ShardedWriter, TensorSpec, open_checkpoint
from emo_select.checkpoint.header import DTYPES
from emo_select.finetune.lora import save_adapter
from emo_select.finetune.recipe import checkpoint_steps
from emo_select.models.adapters import merge_adapter
from emo_select.ownership import FINETUNED
from emo_select.progress import Bar
from emo_select.tree import discard, partial_directory, publish

if TYPE_CHECKING:
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


Describe = Callable[[Path], None]
"""Writes the card of a folder that is complete but for it."""


def write_checkpoint(model: PreTrainedModel, tensors: Mapping[str, Tensor], source: Path, final: Path,
                     describe: Describe) -> None:
    """Publish `tensors` (named as in memory) in the layout and dtypes of `source`, with its other files unchanged."""
    partial = partial_directory(final)
    discard(partial)
    partial.mkdir(parents=True)
    _write_tensors(model, tensors, source, partial)
    copy_companions(source, partial)
    describe(partial)
    publish(partial, final, FINETUNED)


def _write_tensors(model: PreTrainedModel, tensors: Mapping[str, Tensor], source: Path, folder: Path) -> None:
    import torch
    from transformers.core_model_loading import revert_weight_conversion

    split = revert_weight_conversion(model, dict(tensors))
    with open_checkpoint(source) as start:
        planned: dict[str, list[TensorSpec]] = {}
        for name, info in start.tensors.items():
            planned.setdefault(info.shard, []).append(TensorSpec(name, info.dtype, info.shape))
        with ShardedWriter(folder, planned) as out:
            for name in out.missing():
                out.write(name, split[name].to(getattr(torch, DTYPES[start.tensors[name].dtype][1])))


def write_adapter(model: PeftModel, tensors: dict[str, Tensor], source: Path, final: Path,
                  describe: Describe, *, merge: bool) -> None:
    """Publish an adapter; with `merge` the checkpoint is the merged model and the adapter lies in `adapter/`."""
    from emo_select.models import load_model

    partial = partial_directory(final)
    discard(partial)
    adapter = partial / "adapter" if merge else partial
    adapter.mkdir(parents=True)
    save_adapter(model, tensors, adapter, source)
    if merge:
        merged = merge_adapter(load_model(str(source), dtype="auto"), adapter)
        _write_tensors(merged, merged.state_dict(), source, partial)
        copy_companions(source, partial)
    describe(partial)
    publish(partial, final, FINETUNED)


def copy_companions(source: Path, target: Path) -> None:
    """Copy what lies beside the weights: config, tokenizer, generation defaults, which experts were kept."""
    for path in source.iterdir():
        if path.is_file() and not any(path.match(pattern) for pattern in WEIGHT_FILES):
            shutil.copy2(path.resolve(), target / path.name)
