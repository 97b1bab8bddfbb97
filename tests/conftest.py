"""Shared set-up: one thread, no network, and where the golden data lies."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported anywhere
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start, too

import pytest
import torch

from emo_select import progress

torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session", autouse=True)
def no_waiting_for_the_disk() -> Iterator[None]:
    """Flushing guards against power cuts, which no test makes; on a busy disk it takes most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def cache_of_their_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests leave the user's cache folder alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def talkative() -> None:
    """Talk is shown, whatever a test before has asked the program for."""
    progress.configure(quiet=False)
    progress._state.said.clear()  # what is said once is said once per test


@pytest.fixture(autouse=True)
def no_data_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands put --data-dir into the environment; it must not reach the next test."""
    monkeypatch.setenv("EMO_SELECT_DATA_DIR", "")


@pytest.fixture(scope="session")
def golden() -> Path:
    """Reference numbers kept in the repository."""
    return ROOT / "tests" / "golden"


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Larger reference data beside the repository (task examples, datasets); tests that need it skip without it."""
    directory = ROOT.parent / "shared"
    if not directory.is_dir():
        pytest.skip(f"needs the reference data in {directory}, which is not part of the repository")
    return directory
