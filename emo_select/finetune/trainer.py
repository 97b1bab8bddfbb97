"""Hugging Face's trainer with what the recipe adds: item counts, frozen rows, measurements, our own files.

The published losses divide by the number of unshifted labels of a whole optimiser step, load balancing included.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from emo_select.errors import NumericError
from emo_select.finetune.freezing import FrozenPart, Holder
from emo_select.finetune.randomness import load_random, random_file, save_random
from emo_select.finetune.routing import RoutingMeter
from emo_select.finetune.saving import Keeper
from emo_select.finetune.state import load_optimizer, load_weights, save_state
from emo_select.progress import say
from emo_select.storage import read_json, write_json

SCHEDULE, ROUTING = "schedule.json", "routing.json"
SCHEDULE_KEYS = ("last_epoch", "_step_count", "_last_lr")  # the rest are functions, which a new scheduler has


class GradientCheck(TrainerCallback):
    """Stops a training whose routed experts receive no gradient at its first step: it would train next to nothing."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = frozenset(names)

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Look at the watched parameters before the first update."""
        if not self._names or state.global_step or model is None:
            return
        watched = [parameter.grad for name, parameter in model.named_parameters() if name in self._names]
        if not any(gradient is not None and bool(gradient.abs().sum() > 0) for gradient in watched):
            raise NumericError("No routed expert received a gradient at the first step; check the LoRA targets.")


class RecipeTrainer(Trainer):
    """Trains by the recipe; `keeper` decides what is written when. The logs are in `state.log_history`."""

    def __init__(
        self,
        *args: Any,
        keeper: Keeper,
        frozen: Sequence[FrozenPart] = (),
        watched: Sequence[str] = (),
        routing: RoutingMeter | None = None,
        loss_limit: float = math.inf,
        last_good: Callable[[], str] = lambda: "none",
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.remove_callback(PrinterCallback)
        self.add_callback(keeper)
        self.add_callback(GradientCheck(watched))
        self.keeper, self.routing = keeper, routing
        self._loss_limit, self._last_good = loss_limit, last_good
        self._frozen = frozen
        self._holder: Holder | None = None
        self._sums: dict[str, Tensor] = {}
        self._since = time.monotonic()

    def create_accelerator_and_postprocess(self) -> None:
        """As the trainer, but several CPU processes shard too: accelerate offers FSDP2 on GPUs only, yet it runs."""
        super().create_accelerator_and_postprocess()
        if self.args.fsdp_plugin_args is not None and not self.is_fsdp_enabled:
            self.accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
            self.accelerator.state.distributed_type = DistributedType.FSDP
            self.is_fsdp_enabled: bool = True

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        """Labels of the whole step, unshifted, packed or not: the published divisor."""
        self._loss_shifts_labels = False
        return super()._get_num_items_in_batch([{"labels": batch["labels"]} for batch in batch_samples], device)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of one micro-batch; rows that must not move lose their gradient."""
        if self._holder is None:
            self._holder = Holder(model, self._frozen)
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        self._holder.clear_gradients()
        return loss

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW over what trains; after each of its steps the held parts are as before."""
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        optimizer.register_step_post_hook(self._restore_held)
        return optimizer

    def _restore_held(self, *_: Any) -> None:
        if self._holder is not None:
            self._holder.restore()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The model's own loss; its parts and the routing are measured on the way."""
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        with torch.no_grad():
            self._measure(inputs, outputs, loss)
        return (loss, outputs) if return_outputs else loss

    def _measure(self, inputs: dict[str, Any], outputs: Any, loss: Tensor) -> None:
        mask = inputs.get("attention_mask")
        real = (torch.ones_like(inputs["input_ids"]) if mask is None else mask).flatten().bool()
        self._add("tokens", real.sum())
        balance = getattr(outputs, "aux_loss", None)
        if balance is not None:
            balance = balance * self.accelerator.num_processes  # as the trainer scales the whole loss
            self._add("lb_loss", balance)
            self._add("ce_loss", loss - self._balance_weight() * balance)
        if self.routing is not None and getattr(outputs, "router_logits", None):
            self.routing.add(outputs.router_logits, real)

    def _balance_weight(self) -> float:
        return float(getattr(self.accelerator.unwrap_model(self.model).config, "router_aux_loss_coef", 0.0))

    def _add(self, name: str, value: Tensor) -> None:
        self._sums[name] = self._sums.get(name, 0) + value

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the parts of the loss, speed and routing to a step's numbers; stop a training that diverges."""
        if "loss" in logs:
            logs |= self._drained()
            self._require_convergence(logs)
        super().log(logs, start_time)

    def _drained(self) -> dict[str, Any]:
        """Means over processes of the loss parts, sum of the tokens, and the routing snapshot where one is due."""
        gathered = {name: self.accelerator.gather(value.reshape(1)) for name, value in self._sums.items()}
        now, self._sums = time.monotonic(), {}
        speed = float(gathered.pop("tokens").sum()) / max(now - self._since, 1e-9)
        self._since = now
        numbers: dict[str, Any] = {name: float(values.mean()) for name, values in gathered.items()}
        if self.routing is not None:
            numbers |= self.routing.drain(self.state.global_step, self.state.max_steps)
        return {**numbers, "tokens_per_second": speed}

    def _require_convergence(self, logs: dict[str, float]) -> None:
        loss, norm = logs["loss"], logs.get("grad_norm", 0.0)
        if math.isfinite(loss) and math.isfinite(norm) and loss <= self._loss_limit:
            return
        raise NumericError(
            f"Training diverged at step {self.state.global_step} (loss {loss:g}, gradient norm {norm:g}, limit "
            f"{self._loss_limit:g}); the last good checkpoint is {self._last_good()}; lower --lr or raise --loss-limit."
        )

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.keeper.save(self.state.global_step)

    def save_training_state(self, folder: Path) -> None:
        """Write everything a resumed training needs; every process calls this."""
        writes = self.is_world_process_zero()
        folder.mkdir(parents=True, exist_ok=True)
        save_state(self.model_wrapped, self._plain_optimizer(), folder, writes=writes)
        save_random(random_file(folder, self.args.process_index))
        if writes:
            schedule = self.lr_scheduler.state_dict()
            write_json(folder / SCHEDULE, {key: schedule[key] for key in SCHEDULE_KEYS})
            write_json(folder / ROUTING, self.routing.snapshots if self.routing else [])
            self.state.save_to_json(str(folder / "trainer_state.json"))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_weights(self.model if model is None else model, Path(resume_from_checkpoint))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None and not load_random(random_file(Path(checkpoint), self.args.process_index)):
            say("The training goes on with another number of processes; random numbers are drawn anew.")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        folder = Path(checkpoint)
        load_optimizer(self.model_wrapped, self._plain_optimizer(), folder)
        self.lr_scheduler.load_state_dict(self.lr_scheduler.state_dict() | read_json(folder / SCHEDULE))
        if self.routing is not None:
            self.routing.snapshots = read_json(folder / ROUTING)

    def _plain_optimizer(self) -> torch.optim.Optimizer:
        """The optimiser inside accelerate's wrapper."""
        return getattr(self.optimizer, "optimizer", self.optimizer)  # type: ignore[return-value]
