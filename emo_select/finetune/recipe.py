"""The published recipe in the trainer's terms: batches, schedule, precision, sharding.

Source: EMO paper (arXiv 2605.06663), finetuning appendix, and the released launcher's defaults.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emo_select.errors import SpecError, UsageError
from emo_select.finetune.reporting import PROJECT
from emo_select.models.families import family_of, is_moe

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from emo_select.spec import Execution, Training

LARGEST_MICRO_BATCH = 8  # the published micro-batch for short prompts
MICRO_BATCH_TOKENS = 8192  # what long prompts are held to: 2 × 4096 as published for them


@dataclass(frozen=True)
class Precision:
    """Dtype of the weights in memory, and whether they are cast to bfloat16 for each product (master weights)."""

    weights: str
    autocast: bool


def precision(execution: Execution, device: str) -> Precision:
    """bfloat16 over float32 master weights on a GPU and float32 on a CPU, unless the flags say otherwise."""
    dtype = execution.dtype if execution.dtype != "auto" else ("float32" if device == "cpu" else "bfloat16")
    if dtype == "float16":
        raise SpecError("float16 overflows in training without loss scaling; use --dtype bfloat16 or float32.")
    if dtype == "bfloat16" and execution.master_weights:
        return Precision("float32", autocast=True)
    return Precision(dtype, autocast=False)


def training_device(execution: Execution) -> str:
    """`cpu` or `cuda`; `auto` takes a GPU where there is one."""
    import torch

    if execution.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return execution.device.partition(":")[0]


def require_machine(execution: Execution) -> str:
    """The device to train on; raises `UsageError` where this machine cannot train as asked."""
    device = training_device(execution)
    precision(execution, device)
    require_gpus(execution, device)
    require_tracker(execution)
    return device


def require_gpus(execution: Execution, device: str) -> None:
    """Raise `UsageError` when more GPUs are asked for than there are. On a CPU, `num_gpus` counts processes."""
    import torch

    wanted, there = execution.num_gpus or 1, torch.cuda.device_count()
    if device == "cuda" and wanted > there:
        raise UsageError(f"Training asks for {wanted} of the {there} GPUs here; lower --gpus, or write --device cpu.")


def require_tracker(execution: Execution) -> None:
    """Raise `UsageError` when the tracker to report to is not installed."""
    tracker = execution.report_to
    if tracker == "none":
        return
    found = importlib.util.find_spec(tracker)
    if found is None or found.origin is None:  # a folder of logs in the working directory looks like a package
        raise UsageError(f"--report-to {tracker} needs the package {tracker}; run `pip install {tracker}`.")


def micro_batch_size(training: Training, execution: Execution, world: int, longest: int) -> int:
    """Examples per device and forward pass: as asked, else 8, halved until `longest` tokens each fit the budget."""
    share, rest = divmod(training.batch_size, world)
    if rest:
        raise SpecError(f"A batch of {training.batch_size} does not divide by {world} processes; change --batch-size.")
    asked = execution.micro_batch_size
    if asked is not None:
        if share % asked:
            raise SpecError(
                f"Micro-batches of {asked} do not divide the {share} examples per device; change --micro-batch-size."
            )
        return asked
    fitting = (size for size in range(min(LARGEST_MICRO_BATCH, share), 1, -1) if not share % size)
    return next((size for size in fitting if size * longest <= MICRO_BATCH_TOKENS), 1)


def checkpoint_steps(total: int, count: int) -> list[int]:
    """`count` evenly spaced steps, the last of them `total`; fewer when there are fewer steps."""
    return sorted({round(total * (index + 1) / count) for index in range(count)} - {0})


def training_arguments(
    training: Training,
    execution: Execution,
    *,
    device: str,
    world: int,
    micro_batch: int,
    config: Mapping[str, Any],
    scratch: Path,
    name: str,
) -> TrainingArguments:
    """The recipe as the trainer takes it: AdamW, linear decay after a warm-up of `training.warmup` of the steps."""
    from transformers import TrainingArguments

    return TrainingArguments(
        output_dir=str(scratch),
        num_train_epochs=training.epochs,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=training.batch_size // (micro_batch * world),
        learning_rate=training.lr,
        lr_scheduler_type="linear",
        warmup_steps=training.warmup,
        weight_decay=training.weight_decay,
        max_grad_norm=training.clip,
        optim="adamw_torch_fused",
        seed=training.seed,
        bf16=precision(execution, device).autocast,
        activation_checkpointing=execution.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False},
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",  # checkpoints and training state are written by our own trainer
        report_to=execution.report_to,
        project=PROJECT,
        run_name=name,
        disable_tqdm=True,
        remove_unused_columns=False,
        use_cpu=device == "cpu",
        ddp_backend="gloo" if device == "cpu" and world > 1 else None,
        dataloader_pin_memory=device == "cuda",
        **sharding(config, world),
    )


def sharding(config: Mapping[str, Any], world: int) -> dict[str, Any]:
    """The arguments for full sharding per decoder layer (FSDP2) on several processes; none on one."""
    if world == 1:
        return {}
    layers = family_of(config).layer_classes if is_moe(config) else ()
    wrap = {"transformer_layer_cls_to_wrap": [*layers]} if layers else {}  # dense: what the model class says
    return {"fsdp": True, "fsdp_config": {"version": 2, "reshard_after_forward": True, **wrap}}
