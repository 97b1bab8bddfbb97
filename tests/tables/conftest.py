"""Unpacked golden trees, and a small tree made of real run records."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest

GOLDEN = Path(__file__).parents[1] / "golden" / "tables"


def unpack(archive: Path, to: Path) -> Path:
    with tarfile.open(archive) as tar:
        tar.extractall(to, filter="data")
    return to


@pytest.fixture(scope="session")
def golden_trees(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Case name -> root of its run tree."""
    folder = tmp_path_factory.mktemp("golden")
    return {
        case: unpack(GOLDEN / case / "tree.tar.gz", folder / case) / "selective_evals_final"
        for case in ("main", "quirk_seed_names")
    }


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the cache out of the home directory; shared by the tests of a session."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
