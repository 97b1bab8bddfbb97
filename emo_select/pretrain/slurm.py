"""A run as one Slurm job: as many nodes as it takes, requeued at its time limit, going on from its last checkpoint."""

from __future__ import annotations

import math
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from emo_select import storage
from emo_select.errors import EmoSelectError, SpecError
from emo_select.sweeps.profile import Profile

SCRIPT = ".job/slurm.sh"


def submit(out: Path, processes: int, profile: Profile) -> str:
    """Hand the run to Slurm; returns the job's id. Raises `SpecError` where there is no Slurm."""
    if shutil.which("sbatch") is None:
        raise SpecError("There is no Slurm here (`sbatch` is missing); leave --profile out.")
    path = out / SCRIPT
    storage.write_bytes(path, script(out, processes, profile).encode())
    done = subprocess.run(["sbatch", "--parsable", str(path)], check=False, capture_output=True, text=True)
    if done.returncode:
        raise EmoSelectError(f"Slurm did not take the run: {done.stderr.strip().splitlines()[-1]}")
    return done.stdout.strip().split(";")[0]


def script(out: Path, processes: int, profile: Profile) -> str:
    """The batch script: one task per node, in it torchrun with one process per GPU.

    Before the time limit the training is told to stop, saves a checkpoint, and the job goes back into the queue.
    """
    per_node = min(processes, profile.gpus or processes)
    if processes % per_node:
        raise SpecError(f"{processes} processes do not fill nodes of {per_node} GPUs; choose a multiple for --gpus.")
    nodes = processes // per_node
    options = {
        "job-name": f"emo-{out.name}", "nodes": nodes, "ntasks-per-node": 1, "cpus-per-task": profile.cpus * per_node,
        "gpus-per-node": per_node if profile.gpus else None, "time": profile.minutes, "partition": profile.partition,
        "account": profile.account, "qos": profile.qos, "constraint": profile.constraint, "mem": profile.memory,
        "signal": f"B:USR1@{math.ceil(min(profile.signal_before, profile.minutes * 30))}",
        "output": str(out.absolute() / ".job" / "slurm-%j.log"), "open-mode": "append", **profile.extra,
    }
    lines = [f"#SBATCH --{key}={value}" for key, value in options.items() if value is not None and value is not True]
    lines += [f"#SBATCH --{key}" for key, value in {**options, "requeue": True}.items() if value is True]
    return "\n".join(["#!/bin/bash", *lines, *profile.setup, *_body(out, nodes, per_node, profile)]) + "\n"


def _body(out: Path, nodes: int, per_node: int, profile: Profile) -> list[str]:
    python = profile.python or shlex.quote(sys.executable)
    place = ["--standalone"] if nodes == 1 else [
        f"--nnodes={nodes}", "--rdzv-backend=c10d", "--rdzv-id=$SLURM_JOB_ID", "--rdzv-endpoint=$head:29400"]
    work = " ".join(["srun", python, "-m", "torch.distributed.run", *place, f"--nproc-per-node={per_node}",
                     "-m", "emo_select.pretrain.engine", shlex.quote(str(out.absolute()))])
    return [
        'head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
        'again() { kill -TERM "$work"; wait "$work"; scontrol requeue "$SLURM_JOB_ID"; }',
        "trap again USR1",
        f"{work} &",
        "work=$!",
        'wait "$work"',
    ]
