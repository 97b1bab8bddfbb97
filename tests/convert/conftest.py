"""Training checkpoints of the reference data, and copies of them that a test may damage."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def cases(shared_dir: Path) -> Path:
    """Folder of the conversion cases."""
    return shared_dir / "golden" / "conversion"


@pytest.fixture
def copied(cases: Path, tmp_path: Path) -> Callable[[str], Path]:
    """A training checkpoint of the reference data as a folder of one's own."""
    def copy(case: str) -> Path:
        target = tmp_path / "run" / "step20"
        shutil.copytree(cases / case / "checkpoint", target)
        for path in (target, *target.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
        return target
    return copy
