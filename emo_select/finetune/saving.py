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

from emo_select.checkpoint import Checkpoint, ShardedWriter, TensorSpec, open_checkpoint
from emo_select.checkpoint.companions import copy_companions
from emo_select.checkpoint.header import DTYPES
from emo_select.checkpoint.quantised import without_quantization
from emo_select.checkpoint.tokenizer import FILES
from emo_select.errors import CheckpointError
from emo_select.finetune.lora import save_adapter
from emo_select.finetune.recipe import checkpoint_steps
from emo_select.models.adapters import merge_adapter
from emo_select.ownership import FINETUNED
from emo_select.progress import Bar, say_once
from emo_select.storage import discard, partial_directory, publish, write_json

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor
    from transformers import PreTrainedModel

SAVING_SHARE = 0.05  # of the time at most, spent on writing training state
BYTES_PER_SECOND = 500e6  # assumed of the disk until the first state has been written


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
    _describe_plainly(source, partial)
    describe(partial)
    publish(partial, final, FINETUNED)


def _describe_plainly(source: Path, folder: Path) -> None:
    """config.json of weights that were quantised in `source` and are trained and stored as plain numbers."""
    with open_checkpoint(source) as start:
        if start.formats.method is not None:
            write_json(folder / "config.json", without_quantization(start.config))


def _write_tensors(model: PreTrainedModel, tensors: Mapping[str, Tensor], source: Path, folder: Path) -> None:
    import torch
    from transformers.core_model_loading import revert_weight_conversion

    split = revert_weight_conversion(model, dict(tensors))
    with open_checkpoint(source) as stored:
        start = stored.plain()
        _require_all(split, start)
        planned: dict[str, list[TensorSpec]] = {}
        for name, info in start.tensors.items():
            planned.setdefault(info.shard, []).append(TensorSpec(name, info.dtype, info.shape))
        with ShardedWriter(folder, planned) as out:
            for name in out.missing():
                if name in split:
                    out.write(name, split[name].to(getattr(torch, DTYPES[start.tensors[name].dtype][1])))
                else:
                    out.write_bytes(name, start.pieces(name))


def _require_all(split: Mapping[str, Tensor], start: Checkpoint) -> None:
    """What the model does not load (prediction layers, frequencies) is carried over as it is, and said so.

    Raises `CheckpointError` where something that was trained has no place in the start folder.
    """
    carried = [name for name in start.tensors if name not in split]
    stored = {split[name].data_ptr() for name in start.tensors if name in split}
    tied = "lm_head.weight" if start.config.get("tie_word_embeddings") else ""
    homeless = [name for name, tensor in split.items()
                if name not in start.tensors and name != tied and tensor.data_ptr() not in stored]
    if carried and homeless:
        raise CheckpointError(f"{start.directory} has {carried[0]} where training has {homeless[0]}, so the trained "
                              "weights cannot be stored in its layout.")
    if carried:
        say_once(f"{len(carried)} tensors that the model does not use, such as {carried[0]}, are kept as they are.")


def write_adapter(model: PeftModel, tensors: dict[str, Tensor], source: Path, final: Path,
                  describe: Describe, *, merge: bool) -> None:
    """Publish an adapter; with `merge` the checkpoint is the merged model and the adapter lies in `adapter/`."""
    from emo_select.models import load_model

    partial = partial_directory(final)
    discard(partial)
    adapter = partial / "adapter" if merge else partial
    adapter.mkdir(parents=True)
    save_adapter(model, tensors, adapter, "../../checkpoint-0" if merge else "../checkpoint-0")
    for name in FILES:  # who loads an adapter looks for the tokenizer beside it
        if (source / name).is_file():
            shutil.copyfile(source / name, adapter / name)
    if merge:
        merged = merge_adapter(load_model(str(source), dtype="auto", dequantize=True), adapter)
        _write_tensors(merged, merged.state_dict(), source, partial)
        copy_companions(source, partial)
        _describe_plainly(source, partial)
    describe(partial)
    publish(partial, final, FINETUNED)
