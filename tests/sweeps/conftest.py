"""A real one-node Slurm, and sweeps of the shipped tiny model."""

from __future__ import annotations

import os
import shutil
import subprocess
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from emo_select.spec import checked
from emo_select.sweeps.control import Control
from emo_select.sweeps.profile import Profile
from emo_select.sweeps.spec import SweepSpec
from emo_select.sweeps.store import Submission
from emo_select.tree import Tree

SYSTEM_PATH = os.environ["PATH"] + ":/usr/sbin:/sbin"
PROGRAMS = ("munged", "slurmctld", "slurmd", "slurmdbd", "mariadbd")


@pytest.fixture(scope="session")
def slurm(shared_dir: Path) -> Iterator[None]:
    """A Slurm of its own for this test run, shared by its worker processes; the last one that leaves stops it."""
    scripts = shared_dir / "slurm"
    if not scripts.is_dir():
        pytest.skip(f"needs the scripts in {scripts}, which are not part of the repository")
    missing = [name for name in PROGRAMS if shutil.which(name, path=SYSTEM_PATH) is None]
    if missing:
        pytest.skip(f"needs Slurm's packages ({', '.join(missing)} missing); .ci/run installs them")
    state = Path("/tmp") / f"emo-slurm-{os.environ.get('PYTEST_XDIST_TESTRUNUID', uuid.uuid4().hex)[:8]}"
    user = state / "users" / os.environ.get("PYTEST_XDIST_WORKER", "main")
    user.mkdir(parents=True)
    started = subprocess.run([scripts / "start-slurm.sh", state], capture_output=True, text=True, timeout=300)
    if started.returncode:
        pytest.skip(f"Slurm did not start here: {started.stderr.strip()[-300:]}")
    os.environ["SLURM_CONF"] = started.stdout.strip()
    yield
    user.rmdir()
    if not any(user.parent.iterdir()):
        subprocess.run([scripts / "stop-slurm.sh", state], timeout=120, check=True)
        shutil.rmtree(state)


@pytest.fixture
def make_sweep(tmp_path: Path) -> Iterator[Callable[..., Control]]:
    """A sweep of the shipped model in a tree of its own: `make_sweep(profile={…}, root=…, **keys of the file)`.

    What a failing test leaves in the queue is taken back, or it would slow down the tests after it.
    """
    made: list[Control] = []

    def make(root: Path = tmp_path / "tree", profile: dict[str, object] | None = None, keep_weights: str = "all",
             **keys: object) -> Control:
        base = {"name": "test", "models": ["demo/emo"], "tasks": ["demo_harbor"], "keep_k": [8],
                "execution": {"device": "cpu"}}
        sweep = checked(SweepSpec, {**base, **keys})
        settings = checked(Profile, {"time": "00:20:00", "cpus": 1, **(profile or {})})
        made.append(Control(Tree(root), Submission(sweep=sweep, keep_weights=keep_weights, profile=settings)))
        return made[-1]

    yield make
    for control in made if "SLURM_CONF" in os.environ else ():
        control.cancel()
