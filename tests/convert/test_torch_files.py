"""Pickled weights (*.bin) become safetensors; everything else in such a file is refused."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from emo_select.checkpoint import open_checkpoint
from emo_select.cli.app import app
from emo_select.convert.torch_files import to_safetensors
from emo_select.errors import CheckpointError, ModelError, SpecError

SOURCE = Path(__file__).parents[1] / "golden" / "models" / "emo_shared1"


@pytest.fixture
def pickled(tmp_path: Path) -> Path:
    """A model as published years ago: two pickles, an index, a tokenizer file."""
    folder = tmp_path / "old model"
    folder.mkdir()
    shutil.copy(SOURCE / "config.json", folder)
    (folder / "vocab.json").write_text("{}")
    tensors = list(load_file(SOURCE / "model.safetensors").items())
    for number, part in enumerate((tensors[:20], tensors[20:]), 1):
        torch.save(dict(part), folder / f"pytorch_model-0000{number}-of-00002.bin")
    (folder / "pytorch_model.bin.index.json").write_text("{}")
    return folder


def test_the_refusal_names_the_command_that_converts(pickled: Path, tmp_path: Path,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match=r"pickles .*: emo-select convert '.*old model' --to safetensors"):
        open_checkpoint(pickled)
    out = tmp_path / "new"
    result = CliRunner().invoke(app, ["convert", str(pickled), "--to", "safetensors", "--out", str(out), "--json"])
    assert result.exit_code == 0
    assert json.loads(result.stdout)["tensors"] == len(load_file(SOURCE / "model.safetensors"))
    with open_checkpoint(out) as found, open_checkpoint(SOURCE) as original:
        assert found.tensors.keys() == original.tensors.keys()
        assert all(torch.equal(found.read(name), original.read(name)) for name in original.tensors)
    assert not list(out.glob("*.bin*")) and (out / "vocab.json").exists()
    before = (out / "model.safetensors").stat().st_mtime_ns
    to_safetensors(str(pickled), out)  # the same call again finds its own work
    assert (out / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(SpecError, match="already there"):
        torch.save({"x": torch.ones(2)}, pickled / "pytorch_model-00002-of-00002.bin")
        to_safetensors(str(pickled), out)


def test_a_file_that_could_run_something_is_refused(pickled: Path, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, (f"touch {tmp_path / 'ran'}",)

    torch.save({"x": Evil()}, pickled / "pytorch_model-00002-of-00002.bin")
    with pytest.raises(CheckpointError, match="holds more than weights"):
        to_safetensors(str(pickled), tmp_path / "new")
    assert not (tmp_path / "ran").exists() and not (tmp_path / "new").exists()
    torch.save({"step": 3}, pickled / "pytorch_model-00002-of-00002.bin")
    with pytest.raises(CheckpointError, match="more than tensors"):
        to_safetensors(str(pickled), tmp_path / "new")


def test_damaged_old_and_absent_files(pickled: Path, tmp_path: Path) -> None:
    file = pickled / "pytorch_model-00002-of-00002.bin"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="damaged"):
        to_safetensors(str(pickled), tmp_path / "new")
    torch.save({"x": torch.ones(2, 3)}, file, _use_new_zipfile_serialization=False)
    assert to_safetensors(str(pickled), tmp_path / "new", dry_run=True)["tensors"] == 21
    with pytest.raises(ModelError, match="no weights in PyTorch's own files"):
        to_safetensors(str(SOURCE), tmp_path / "new")
