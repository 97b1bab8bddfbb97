"""Tokens per second of the engine with EMO's router and with a standard one, side by side in one run.

    python benchmarks/pretraining.py [--device cuda] [--hidden 1024] [--layers 8] [--steps 20]

Alternates the two models step by step on random tokens and prints the ratio of their times. On a GPU also what
torch.compile and the grouped product give.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from emo_select.pretrain.engine.build import Machine, build_trainer
from emo_select.pretrain.recipe import Recipe
from emo_select.pretrain.tokens import TokenData


def recipe(arguments: argparse.Namespace, pool: bool) -> Recipe:
    """One of the two models; everything but the pools is the same."""
    length = arguments.length
    return Recipe.model_validate({
        "name": "emo" if pool else "standard", "tokens": 4 * length * (arguments.steps + 2),
        "tokenizer": {"vocab_size": 32000, "eos_token_id": 0, "pad_token_id": 1},
        "model": {"hidden_size": arguments.hidden, "layers": arguments.layers, "heads": arguments.hidden // 64,
                  "experts": {"count": 64, "shared": 1, "top_k": 8, "width": arguments.hidden // 2}},
        "objective": {"pool": {"smallest": 8, "largest": 63} if pool else None},
        "data": {"sequence_length": length, "mask_documents": False, "repetition_filter": False},
        "batch": {"sequences": 4, "micro_batch": 4}, "optimizer": {"learning_rate": 1e-4},
        "save": {"every": 10**6, "temporary_every": None},
    })


def tokens(folder: Path, count: int) -> TokenData:
    """Random documents of some hundred tokens."""
    rng = np.random.default_rng(0)
    ids = rng.integers(2, 32000, count)
    ids[rng.random(count) < 1 / 300] = 0
    ids.astype("<u2").tofile(folder / "part.npy")
    return TokenData((folder / "part.npy",), ("random",), "uint16", 32000, 0, 1, None, "random")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=10)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        times = measured(arguments, Path(folder))
    per_step = 4 * arguments.length
    for name, seconds in times.items():
        print(f"{name:<10}{per_step / np.median(seconds):>12,.0f} tokens/s")
    print(f"EMO takes {np.median(times['emo']) / np.median(times['standard']):.3f} of the standard router's time")


def measured(arguments: argparse.Namespace, folder: Path) -> dict[str, list[float]]:
    """Seconds of each step of the two models, alternating; the first two steps warm up."""
    data = tokens(folder, 4 * arguments.length * (arguments.steps + 4))
    machine = Machine(device=torch.device(arguments.device), save_async=False)
    trainers = {name: build_trainer(recipe(arguments, name == "emo"), data, folder / name, machine=machine)
                for name in ("emo", "standard")}
    times: dict[str, list[float]] = {name: [] for name in trainers}
    for trainer in trainers.values():
        trainer.data_loader.reshuffle(1)
    batches = {name: iter(trainer.data_loader) for name, trainer in trainers.items()}
    for step in range(arguments.steps + 2):
        for name, trainer in trainers.items():
            batch = next(batches[name])
            started = _now(machine)
            trainer.train_module.train_batch(batch)
            trainer.train_module.optim_step()
            trainer.train_module.zero_grads()
            if step >= 2:
                times[name].append(_now(machine) - started)
    return times


def _now(machine: Machine) -> float:
    if not machine.on_gpu:
        return time.process_time()  # a busy machine's wall time says nothing
    torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    main()
