"""The published trainer's toy runs as recipes of ours, and what they reached."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from olmo_core.train.callbacks import Callback
from safetensors.torch import load_file
from torch import Tensor

from emo_select.pretrain.recipe import Recipe
from emo_select.pretrain.tokens import TokenData


class Given:
    """The pool sizes that the original drew, in its order; the dry run before the first step gets any."""

    def __init__(self, flat: Tensor, per_step: Tensor, first_step: int) -> None:
        self.steps = {first_step + index: part for index, part in enumerate(torch.split(flat, per_step.tolist()))}
        self.used: dict[int, int] = {}

    def draw(self, documents, layers: int, *, step: int, micro_batch: int, rank: int) -> Tensor:
        count = layers * sum(documents)
        if step not in self.steps:
            return torch.full((layers, sum(documents)), 10)
        at = self.used.get(step, 0)
        self.used[step] = at + count
        return self.steps[step][at:at + count].view(layers, -1)


class Recorder(Callback):
    """Every metric of every step."""

    def __init__(self) -> None:
        self.steps: dict[int, dict[str, float]] = {}

    def log_metrics(self, step: int, metrics: dict[str, float]) -> None:
        self.steps.setdefault(step, {}).update(metrics)


@dataclass(frozen=True)
class GoldenRun:
    """One folder of the reference data."""

    folder: Path
    data_folder: Path

    @cached_property
    def told(self) -> dict[str, Any]:
        return json.loads((self.folder / "run.json").read_text())

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        return load_file(self.folder / "data.safetensors")

    @property
    def start(self) -> dict[str, Tensor]:
        return load_file(self.folder / "start.safetensors")

    @property
    def final(self) -> dict[str, Tensor]:
        return load_file(self.folder / "final.safetensors")

    def data(self) -> TokenData:
        told = self._data()
        files = sorted(self.data_folder.glob("part*.npy"))
        return TokenData(files=tuple(files), labels=tuple(path.stem for path in files), dtype="uint32",
                         vocab_size=told["vocab_size"], eos_token_id=told["eos_token_id"],
                         pad_token_id=told["pad_token_id"], tokenizer=None, fingerprint="golden")

    def _data(self) -> dict[str, Any]:
        return json.loads((self.data_folder / "data.json").read_text())

    def draws(self, rank: str = "") -> Given | None:
        if f"{rank}pool_sizes" not in self.tensors:
            return None
        first = min(map(int, self.told["steps"]))
        return Given(self.tensors[f"{rank}pool_sizes"], self.tensors[f"{rank}pool_sizes_per_step"], first)

    def recipe(self, **changes: Any) -> Recipe:
        config, data = self.told["config"], self._data()
        balance = "local" if "local" in self.folder.name else "global"
        anneals = "cos" not in config["scheduler"]["_CLASS_"].lower()
        content = {
            "name": self.folder.name, "seed": config["init_seed_of_experiment"],
            "tokens": self._tokens(anneals),
            "tokenizer": {key: data[key] for key in ("vocab_size", "eos_token_id", "pad_token_id")},
            "model": _model(config["model"]),
            "objective": {"pool": _pool(config["model"]), "balance": balance},
            "data": {"sequence_length": data["sequence_length"], "chunk": data["chunk"], "seed": config["data_seed"],
                     "mask_documents": config["generate_doc_lengths"]},
            "batch": {"sequences": config["global_batch_size_in_tokens"] // data["sequence_length"],
                      "micro_batch": config["rank_microbatch_size_in_tokens"] // data["sequence_length"]},
            "optimizer": _optimizer(config),
            "schedule": {"shape": "linear", "warmup_steps": 0} if anneals else {
                "warmup_steps": config["scheduler"]["warmup"], "final_fraction": config["scheduler"]["alpha_f"]},
            "save": {"every": 1000, "temporary_every": None},
        }
        return Recipe.model_validate(content | changes)

    def _tokens(self, anneals: bool) -> int:
        config = self.told["config"]
        if anneals:
            return len(self.told["steps"]) * config["global_batch_size_in_tokens"]
        return config["max_duration"]["value"]


def _model(told: dict[str, Any]) -> dict[str, Any]:
    experts = told["block"].get("feed_forward_moe")
    sizes: dict[str, Any] = {
        "hidden_size": told["d_model"], "layers": told["n_layers"], "init_std": told["init_std"],
        "heads": told["block"]["sequence_mixer"]["n_heads"], "init_seed": told["init_seed"],
    }
    if experts is None:
        return sizes | {"dense": {"width": told["block"]["feed_forward"]["hidden_size"]}}
    router = experts["router"]
    return sizes | {"experts": {"count": experts["num_experts"], "shared": router.get("num_shared_experts", 0),
                                "top_k": router["top_k"], "width": experts["hidden_size"]}}


def _pool(told: dict[str, Any]) -> dict[str, int] | None:
    router = told["block"].get("feed_forward_moe", {}).get("router", {})
    if "max_document_expert_pool" not in router:
        return None
    return {name: router[f"{short}_document_expert_pool"]
            for name, short in (("smallest", "min"), ("largest", "max"), ("evaluation", "eval"))}


def _optimizer(config: dict[str, Any]) -> dict[str, Any]:
    told = config["optim"]
    return {"learning_rate": told["lr"], "weight_decay": told["weight_decay"], "clip": config["max_grad_norm"],
            "skip_spikes": "skip" in told["_CLASS_"].lower()}


Weights = dict[str, Tensor]


def check(run: GoldenRun, seen: dict[int, dict[str, float]], start: Weights, final: Weights) -> None:
    """Losses, gradient norms and rates of every step, and the way that every tensor travelled."""
    pairs = {"train/CE loss": "ce_loss", "train/Z loss": "lm_z_loss", "optim/LR (group 0)": "lr",
             "train/load balancing loss": "lb_loss_weighted_sum_of_layers", "optim/total grad norm": "grad_norm",
             "train/router Z loss": "router_z_loss_weighted_sum_of_layers"}
    for step, want in run.told["steps"].items():
        for ours, theirs in pairs.items():
            if theirs not in want:
                continue
            got = seen[int(step)][ours]
            tolerance = {"lr": 1e-6, "grad_norm": 1e-4}.get(theirs, 0) * abs(want[theirs]) or 2e-5
            if theirs == "lr":
                tolerance = max(tolerance if want["lr"] else 0, 1e-9)
            assert abs(got - want[theirs]) <= tolerance, (step, ours, got, want[theirs])
    for name, want in run.final.items():
        way = (want - start[name]).norm()
        assert (final[name] - want).norm() <= 1e-3 * way + 1e-9, name
