"""The training loop: deterministic, resumable at any moment, and published as a checkpoint."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from emo_select import storage
from emo_select.demo.tokenizer import END, MAX_LENGTH, PAD, build_tokenizer, save_tokenizer
from emo_select.errors import NumericError, SpecError
from emo_select.faults import translated
from emo_select.models import EmoConfig, EmoForCausalLM, register
from emo_select.ownership import PRETRAINED
from emo_select.pretrain.demo.config import Optimizer, PretrainConfig
from emo_select.pretrain.demo.documents import Documents, step_generator
from emo_select.pretrain.model_objective import EmoObjective, Losses
from emo_select.progress import Bar, say, track

STATE, REPORT = "state.safetensors", "pretraining.json"
SHOWN = ("cross_entropy", "balance", "z", "entropy", "peak_load")
LOG_EVERY = 50  # steps between two entries of the recorded curve
POOLS = 1  # stream of random numbers beside that of the documents


def build_model(config: PretrainConfig, tokenizer: Any) -> EmoForCausalLM:
    """A model with weights drawn from the seed."""
    register()
    torch.manual_seed(config.seed)
    return EmoForCausalLM(EmoConfig(
        **config.model.model_dump(exclude={"rope_theta"}),
        rope_parameters={"rope_type": "default", "rope_theta": config.model.rope_theta},
        vocab_size=tokenizer.get_vocab_size(),
        eos_token_id=tokenizer.token_to_id(END),
        pad_token_id=tokenizer.token_to_id(PAD),
        max_position_embeddings=MAX_LENGTH,
        router_aux_loss_coef=config.objective.balance_weight,
    ))


def learning_rate(step: int, optimizer: Optimizer) -> float:
    """Rate of step 1, 2, …: linear up over `warmup_steps`, then a cosine down to `final_fraction` of the peak."""
    if step <= optimizer.warmup_steps:
        return optimizer.learning_rate * step / optimizer.warmup_steps
    done = (step - optimizer.warmup_steps) / max(1, optimizer.steps - optimizer.warmup_steps)
    cosine = (1 + math.cos(math.pi * done)) / 2
    return optimizer.learning_rate * (optimizer.final_fraction + (1 - optimizer.final_fraction) * cosine)


class Trainer:
    """Model, optimiser and data of one run. `state` and `restore` move all that a step depends on."""

    def __init__(self, config: PretrainConfig) -> None:
        self.config = config
        tokenizer = build_tokenizer()
        self.documents = Documents(tokenizer, seed=config.seed, **config.data.model_dump())
        self.model = build_model(config, tokenizer).train()
        pool = config.objective.pool
        self.objective = EmoObjective(
            self.model,
            (pool.smallest, pool.largest) if pool else None,
            **config.objective.model_dump(exclude={"pool"}),
            divisor="tokens", same_for_all_layers=True,  # the demo's variant; docs/pretrain.md says why
        )
        rates = config.optimizer
        self.parameters = dict(self.model.named_parameters())
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), betas=(0.9, rates.beta2), weight_decay=rates.weight_decay)
        self.step, self.seconds = 0, 0.0
        self.curve: list[dict[str, float]] = []

    def advance(self) -> Losses:
        """One optimiser step. Raises `NumericError` where the loss is not finite."""
        started = time.process_time()
        self.step += 1
        batch, draws = self.documents.batch(self.step), step_generator(self.config.seed, self.step, POOLS)
        with self.objective(batch, draws) as losses:
            if not torch.isfinite(losses.total):
                raise NumericError(f"The loss of step {self.step} is not finite; lower optimizer.learning_rate.")
            losses.total.backward()
        self._update()
        self.seconds += time.process_time() - started
        return losses

    def _update(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.config.optimizer.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.config.optimizer)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def state(self) -> bytes:
        """Weights, moments, step and curve as one safetensors file."""
        tensors: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            tensors[f"weight.{name}"] = parameter.detach()
            moments = self.optimizer.state[parameter]
            tensors |= {f"{moment}.{name}": moments[moment] for moment in ("exp_avg", "exp_avg_sq")}
        told = {"step": self.step, "seconds": self.seconds, "curve": self.curve}
        data: bytes = save(tensors, {"progress": json.dumps(told)})
        return data

    def restore(self, file: Path) -> None:
        """Continue from a file that `state` made; the next step is then the one it would have been."""
        from safetensors import safe_open

        with safe_open(file, "pt") as reader:
            told = json.loads(reader.metadata()["progress"])
        self.step, self.seconds, self.curve = told["step"], told["seconds"], told["curve"]
        tensors = load_file(file)
        for name, parameter in self.parameters.items():
            with torch.no_grad():
                parameter.copy_(tensors[f"weight.{name}"])
            self.optimizer.state[parameter] = {
                "step": torch.tensor(float(self.step)),
                **{moment: tensors[f"{moment}.{name}"] for moment in ("exp_avg", "exp_avg_sq")},
            }


@translated()
def pretrain(config: PretrainConfig, out_dir: Path) -> dict[str, Any]:
    """Train and publish a checkpoint folder; returns what `pretraining.json` in it says.

    A state is kept beside `out_dir` every `save_every` steps. After a crash the same call continues there, and the
    published weights are those of an undisturbed run to the last bit (same machine, same number of threads). A
    finished run is not repeated. Raises `SpecError` where `out_dir` holds anything else.
    """
    if done := _finished(config, out_dir):
        return done
    lock = out_dir.with_name(f".{out_dir.name}.lock")
    with storage.exclusive(lock), storage.staged_directory(out_dir, _key(config), PRETRAINED) as folder:
        trainer = Trainer(config)
        _train(trainer, folder / STATE)
        report = _report(trainer)
        _write_checkpoint(trainer, folder, report)
        (folder / STATE).unlink(missing_ok=True)
    return report


def _finished(config: PretrainConfig, out_dir: Path) -> dict[str, Any] | None:
    """The report of the same run if `out_dir` has it; an absent or empty folder is free to be used."""
    if not out_dir.exists() or (out_dir.is_dir() and not any(out_dir.iterdir())):
        return None
    report = out_dir / REPORT
    if report.is_file() and (told := storage.read_json(report))["config"] == config.model_dump():
        say(f"{out_dir} is finished; delete it to train again.")
        return dict(told)
    raise SpecError(f"{out_dir} holds something else; choose another --output-dir.")


def _key(config: PretrainConfig) -> str:
    return json.dumps({"config": config.model_dump(), "torch": torch.__version__}, sort_keys=True)


def _train(trainer: Trainer, state: Path) -> None:
    if state.exists():
        trainer.restore(state)
    steps = trainer.config.optimizer.steps
    with track(f"Pretraining {trainer.config.name}", steps) as bar:
        bar.advance(trainer.step)
        while trainer.step < steps:
            losses = trainer.advance()
            _show(trainer, losses, bar)
            if trainer.step % trainer.config.save_every == 0:
                storage.write_bytes(state, trainer.state())


def _show(trainer: Trainer, losses: Losses, bar: Bar) -> None:
    values = {name: round(float(getattr(losses, name)), 5) for name in SHOWN}
    if trainer.step % LOG_EVERY == 0:
        trainer.curve.append({"step": trainer.step, **values})
    bar.advance(1, "  ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in values.items()))


def _report(trainer: Trainer) -> dict[str, Any]:
    return {
        "config": trainer.config.model_dump(),
        "steps": trainer.step,
        "parameters": sum(parameter.numel() for parameter in trainer.parameters.values()),
        "cpu_seconds": round(trainer.seconds, 1),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "curve": trainer.curve,
    }


def _write_checkpoint(trainer: Trainer, folder: Path, report: Mapping[str, Any]) -> None:
    trainer.model.to(getattr(torch, trainer.config.dtype)).save_pretrained(folder)
    save_tokenizer(folder)
    storage.write_json(folder / REPORT, report)
