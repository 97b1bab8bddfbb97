"""Carry out a stored job: in this process, or as one of several that `torchrun` starts.

`python -m emo_select.finetune FOLDER` is what each of several processes runs.
"""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emo_select import ownership
from emo_select.checkpoint import open_checkpoint, read_config
from emo_select.checkpoint.card import write_card
from emo_select.errors import EmoSelectError
from emo_select.finetune.job import Job
from emo_select.models.families import family_of, is_moe
from emo_select.progress import Bar, configure, track
from emo_select.storage import discard, partial_directory, publish, read_json, write_json
from emo_select.tree import numbered_checkpoints

if TYPE_CHECKING:
    from types import FrameType

    from emo_select.finetune.freezing import FrozenPart
    from emo_select.finetune.saving import Keeper
    from emo_select.finetune.trainer import RecipeTrainer


HISTORY, ERROR = "history.json", "error.json"  # in the working folder
ROUTING_LOG = "routing.json"


def launch(job: Job, processes: int) -> None:
    """Run the job in `processes` processes of this machine; raises what the first failing one reported."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}",
               "-m", "emo_select.finetune", str(job.folder)]  # fmt: skip
    error = job.folder / ERROR
    error.unlink(missing_ok=True)
    child = subprocess.Popen(command)
    try:
        code = child.wait()
    except BaseException:
        child.terminate()  # the workers write their state and end
        child.wait()
        raise
    if code:
        told = read_json(error)["message"] if error.exists() else f"a training process ended with status {code}"
        raise EmoSelectError(told if told.endswith(".") else f"{told}; its output is above.")


def train(job: Job) -> None:
    """Train as the job says, from its state if there is one; checkpoints, plot and report are in place afterwards."""
    from transformers import set_seed

    from emo_select.finetune.reporting import reporting

    _set_imports_aside()
    set_seed(job.training.seed)
    with track("Finetuning") as bar:
        trainer = _trainer(job, bar)
        with _stop_on_signal(trainer.keeper), reporting(trainer, job.execution.report_to, job.out):
            trainer.train(resume_from_checkpoint=str(job.state) if job.state.exists() else None)
    if trainer.is_world_process_zero():
        _finish(job, trainer)
    trainer.accelerator.wait_for_everyone()


@cache
def _set_imports_aside() -> None:
    """Spare every training the search for garbage among a million objects that libraries made when imported."""
    import emo_select.finetune.trainer  # noqa: F401

    gc.freeze()


def _trainer(job: Job, bar: Bar) -> RecipeTrainer:
    from emo_select.finetune import recipe
    from emo_select.finetune.batches import Packed, Padded
    from emo_select.finetune.reporting import run_name
    from emo_select.finetune.routing import RoutingMeter
    from emo_select.finetune.saving import Keeper
    from emo_select.finetune.trainer import RecipeTrainer

    config = read_config(job.model)
    model, frozen, watched = _prepared_model(job, config)
    size = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    keeper = Keeper(count=job.training.checkpoints, bar=bar, state_bytes=3 * size)
    trainer = RecipeTrainer(
        model=model,
        args=recipe.training_arguments(
            job.training, job.execution, device=job.device, world=job.world, micro_batch=job.micro_batch,
            config=config, scratch=job.folder, name=run_name(job.out),
        ),
        train_dataset=job.tokens(),
        data_collator=Packed() if job.training.packing else Padded(job.pad_token),
        keeper=keeper,
        frozen=frozen,
        watched=watched,
        routing=RoutingMeter(config) if is_moe(config) else None,
        loss_limit=job.training.loss_limit,
        last_good=lambda: _last_good(job.out),
    )  # fmt: skip
    keeper.writers = {
        "weights": lambda step: _write_weights(job, trainer, step),
        "state": lambda step: _write_state(job, trainer),
    }
    return trainer


def _prepared_model(job: Job, config: dict[str, Any]) -> tuple[Any, list[FrozenPart], list[str]]:
    """The model to train, its parts that must not move, and the parameters that have to receive gradients."""
    from transformers.utils import logging

    from emo_select.finetune import freezing, lora, recipe
    from emo_select.finetune.autocast import cast_experts
    from emo_select.models import load_model

    logging.disable_progress_bar()  # one bar is enough
    precision = recipe.precision(job.execution, job.device)
    model: Any = load_model(
        str(job.model), dtype=precision.weights, trust_remote_code=job.execution.trust_remote_code, dequantize=True
    )
    model.config.use_cache = False
    if is_moe(config):  # load balancing is part of the recipe, whatever the checkpoint returns to other users
        model.config.get_text_config().output_router_logits = True
    if precision.autocast and is_moe(config):
        cast_experts(model, family_of(config).experts_module)
    adapters = job.training.lora
    if adapters is None:
        return model, freezing.freeze(model, config, job.training.freeze), freezing.routed_parameters(model, config)
    with open_checkpoint(job.model) as checkpoint:
        targets = lora.lora_targets(checkpoint.plain(), adapters)
    model = lora.add_adapters(model, targets, adapters)
    watched = lora.expert_adapters(model, family_of(config).experts_module) if is_moe(config) else []
    return model, lora.held_adapters(model, config, adapters), watched


def _write_weights(job: Job, trainer: RecipeTrainer, step: int) -> None:
    """Publish `checkpoint-<step>`; every process takes part, the main one writes."""
    from emo_select.finetune import saving
    from emo_select.finetune.state import whole_tensors

    tensors = whole_tensors(trainer.model)
    if trainer.is_world_process_zero():
        model = trainer.accelerator.unwrap_model(trainer.model)
        final = job.out / f"checkpoint-{step}"
        describe = partial(write_card, start=job.model, training=job.training, step=step)
        if job.training.lora is None:
            saving.write_checkpoint(model, tensors, job.model, final, describe)
        else:
            saving.write_adapter(model, tensors, job.model, final, describe, merge=job.training.lora.merge)
    trainer.accelerator.wait_for_everyone()


def _write_state(job: Job, trainer: RecipeTrainer) -> None:
    """Replace the training state on disk by the present one; a crash leaves the older."""
    partial = partial_directory(job.state)
    if trainer.is_world_process_zero():
        discard(partial)
    trainer.accelerator.wait_for_everyone()
    trainer.save_training_state(partial)
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        publish(partial, job.state, ownership.TRAINING_STATE)
    trainer.accelerator.wait_for_everyone()


def _finish(job: Job, trainer: RecipeTrainer) -> None:
    """Write what the training measured; the report comes last and marks the training as complete."""
    from emo_select.finetune.routing import plot_routing

    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    history = [{key: value for key, value in entry.items() if not key.startswith("routing_")} for entry in steps]
    if trainer.routing is not None and trainer.routing.snapshots:
        measured = {"layers": trainer.routing.layers, "snapshots": trainer.routing.snapshots}
        write_json(job.out / ROUTING_LOG, measured)
        if job.execution.plots:
            plot_routing(trainer.routing.layers, trainer.routing.snapshots, job.out / "routing.png")
    write_json(job.folder / HISTORY, history)


def _last_good(out: Path) -> str:
    return str(out / f"checkpoint-{max(numbered_checkpoints(out), default=0)}")


@contextmanager
def _stop_on_signal(keeper: Keeper) -> Iterator[None]:
    """Let SIGTERM and the first Ctrl-C end training after the step at hand, with its state written.

    The signal is sent again once that has happened, so that the program ends as it would have.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []

    def request(signum: int, frame: FrameType | None) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(signum)
        keeper.stop_requested = True

    previous = {number: signal.signal(number, request) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        if received:
            os.kill(os.getpid(), received[0])


def main(folder: str) -> None:
    """Entry point of each of several processes; only the first one talks."""
    first = os.environ.get("RANK", "0") == "0"
    configure(quiet=not first)
    job = Job.read(Path(folder))
    try:
        train(job)
    except EmoSelectError as error:
        if first:
            write_json(job.folder / ERROR, {"message": str(error)})
        raise SystemExit(error.exit_code) from error
