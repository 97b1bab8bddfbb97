"""Puts model, data, optimiser and trainer of the engine together."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from olmo_core.config import DType
from olmo_core.data import NumpyDataLoaderConfig
from olmo_core.distributed.parallel import DataParallelType
from olmo_core.distributed.utils import get_world_size, is_distributed
from olmo_core.nn.attention import AttentionBackendName
from olmo_core.train import Duration, Trainer, TrainerConfig
from olmo_core.train.callbacks import Callback, CheckpointerCallback, ConfigSaverCallback
from olmo_core.train.train_module import TransformerDataParallelConfig, TransformerTrainModuleConfig
from olmo_core.utils import seed_all

from emo_select.errors import SpecError
from emo_select.pretrain.engine import cpu, grouped, model, pools
from emo_select.pretrain.plan import check_divides
from emo_select.pretrain.recipe import Recipe
from emo_select.pretrain.tokens import TokenData


@dataclass(frozen=True)
class Start:
    """Where annealing begins: the step of the checkpoint, the rate it stored, its tokens."""

    step: int = 0
    rate: float | None = None
    tokens: int = 0


@dataclass(frozen=True)
class Machine:
    """How the run is carried out. None of it changes what is computed but for rounding."""

    device: torch.device = field(default_factory=lambda: torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    compile: bool = True
    save_async: bool = True
    workers: int = 0

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"


def build_trainer(
    recipe: Recipe,
    data: TokenData,
    folder: Path,
    *,
    machine: Machine | None = None,
    start: Start | None = None,
    callbacks: dict[str, Callback] | None = None,
    draws: pools.Draws | None = None,
    stop_at: int | None = None,
) -> Trainer:
    """A trainer that writes its checkpoints to `folder`. Under torch.distributed the model is sharded by FSDP2.

    `draws` replaces the recipe's pool sizes; `stop_at` ends after that step without changing the schedule.
    """
    machine, start = machine or Machine(), start or Start()
    check_divides(recipe, get_world_size())
    seed_all(recipe.seed)
    built = _config(recipe, machine)
    network = built.build(init_device="meta")
    module = _train_module(recipe, machine, start).build(network, device=machine.device)
    _fit_out(network, machine)
    loader = NumpyDataLoaderConfig(
        global_batch_size=recipe.batch_tokens, seed=recipe.data.seed, num_workers=machine.workers,
        work_dir=str(folder / "cache"), target_device_type=machine.device.type,
    )
    rows = model.dataset(recipe, data, folder / "cache")
    batches = loader.build(rows.build(), dp_process_group=module.dp_process_group)
    drawn = draws or pools.draws_of(recipe)
    watched: dict[str, Callback] = dict(callbacks or {})
    if drawn is not None:
        watched["pools"] = pools.Pools(network, recipe, drawn)
    config = _trainer_config(recipe, folder, machine, start, stop_at)
    trainer = config.build(module, batches)
    for name, callback in watched.items():
        trainer.add_callback(name, callback)
    trainer.callbacks["config_saver"].config = {
        "model": built.as_config_dict(), "dataset": rows.as_config_dict(), "data_loader": loader.as_config_dict(),
        "init_seed": recipe.seed, "recipe": recipe.model_dump(mode="json"),
    }
    return trainer


def _config(recipe: Recipe, machine: Machine) -> Any:
    backend = None
    if machine.on_gpu and recipe.data.mask_documents:
        backend = document_backend()
    return model.transformer(recipe, backend)


def document_backend() -> AttentionBackendName:
    """The flash attention of this machine, needed to mask between documents on a GPU. Raises `SpecError`."""
    for name in (AttentionBackendName.flash_3, AttentionBackendName.flash_2):
        try:
            name.assert_supported()
        except Exception:  # the engine raises what the import raised
            continue
        return name
    raise SpecError("data.mask_documents needs flash attention on a GPU: pip install flash-attn, or --set "
                    "data.mask_documents=false (another model: attention crosses documents).")


def _fit_out(network: torch.nn.Module, machine: Machine) -> None:
    if machine.on_gpu:
        grouped.use_torch(network)
    else:
        cpu.prepare(network)


def _train_module(recipe: Recipe, machine: Machine, start: Start) -> TransformerTrainModuleConfig:
    parallel = TransformerDataParallelConfig(
        name=DataParallelType.fsdp, param_dtype=DType.bfloat16 if machine.on_gpu else DType.float32,
        reduce_dtype=DType.float32,
    )
    return TransformerTrainModuleConfig(
        rank_microbatch_size=recipe.batch.micro_batch * recipe.data.sequence_length,
        max_sequence_length=recipe.data.sequence_length,
        optim=model.optimizer(recipe, fused=machine.on_gpu),
        scheduler=model.schedule(recipe, start.step, start.rate),
        max_grad_norm=recipe.optimizer.clip,
        z_loss_multiplier=recipe.objective.lm_z_weight,
        compile_model=machine.compile and machine.on_gpu,
        dp_config=parallel if is_distributed() else None,
        autocast_precision=DType.bfloat16 if machine.on_gpu and not is_distributed() else None,
    )


def _trainer_config(recipe: Recipe, folder: Path, machine: Machine, start: Start, stop_at: int | None) -> TrainerConfig:
    anneals = recipe.schedule.shape == "linear"
    last = Duration.steps(start.step + recipe.steps) if anneals else Duration.tokens(recipe.tokens)
    return TrainerConfig(
        save_folder=str(folder), work_dir=str(folder / "cache"), save_overwrite=True, max_duration=last,
        hard_stop=None if stop_at is None else Duration.steps(stop_at),
        metrics_collect_interval=1 if not machine.on_gpu else 10, cancel_check_interval=5,
        async_bookkeeping=machine.on_gpu,
        callbacks={
            "checkpointer": CheckpointerCallback(
                save_interval=recipe.save.every, ephemeral_save_interval=recipe.save.temporary_every,
                save_async=machine.save_async and machine.on_gpu, max_checkpoints=None),
            "config_saver": ConfigSaverCallback(),
        },
    )
