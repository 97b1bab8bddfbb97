"""Tiny checkpoints with a tokenizer."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from word_tokenizer import add_tokenizer

GOLDEN = Path(__file__).parents[1] / "golden"
@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An emo checkpoint (4 layers, 31 routed + 1 shared experts, 96 tokens) with a tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    shutil.copytree(GOLDEN / "models" / "emo_shared1", folder)
    add_tokenizer(folder, 90)
    return folder


@pytest.fixture
def copy_of_tiny(tiny: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    folder = tmp_path / "damaged"
    shutil.copytree(tiny, folder)
    return folder
