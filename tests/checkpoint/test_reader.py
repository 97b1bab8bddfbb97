"""Reading checkpoints: what is there is read exactly, what is broken is named."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from emo_select.checkpoint import open_checkpoint, resolve
from emo_select.checkpoint.finite import all_finite
from emo_select.checkpoint.reader import runs
from emo_select.errors import CheckpointError, UsageError

INDEX = "model.safetensors.index.json"


@pytest.fixture
def sharded(golden: Path, tmp_path: Path) -> Path:
    """A copy of a sharded checkpoint that a test may break."""
    shutil.copytree(golden / "models" / "emo_sharded", tmp_path / "model", ignore=shutil.ignore_patterns("expected*"))
    return tmp_path / "model"


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """One shard of a few tensors."""
    tensors = {"b": torch.arange(12.0).reshape(4, 3), "a": torch.ones(2, dtype=torch.bfloat16), "c": torch.empty(0, 5)}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


@pytest.mark.parametrize("name", ["emo_sharded", "emo_shared1", "emo_bf16"])
def test_tensors_equal_the_reference_reader_s(golden: Path, name: str) -> None:
    with open_checkpoint(golden / "models" / name) as checkpoint:
        expected = {k: t for shard in checkpoint.shards for k, t in load_file(checkpoint.directory / shard).items()}
        assert checkpoint.tensors.keys() == expected.keys()
        assert all(torch.equal(checkpoint.read(key), expected[key]) for key in expected)
        assert checkpoint.total_bytes == sum(t.nbytes for t in expected.values())


def test_rows_come_in_the_order_asked_for(tiny: Path) -> None:
    checkpoint = open_checkpoint(tiny)
    whole = checkpoint.read("b")
    for rows in ([2], [0, 1, 3], [3, 0, 1], [], [1, 1]):
        assert torch.equal(checkpoint.read("b", rows), whole[rows])
        assert b"".join(map(bytes, checkpoint.pieces("b", rows))) == whole[rows].numpy().tobytes()
    for rows in ([4], [-1]):
        with pytest.raises(IndexError):
            checkpoint.read("b", rows)


def test_reads_into_given_memory(tiny: Path) -> None:
    checkpoint = open_checkpoint(tiny)
    out = torch.zeros(3, 2, 3)
    checkpoint.read_into("b", out[1], [1, 2])
    assert torch.equal(out[1], checkpoint.read("b")[1:3]) and not out[0].any() and not out[2].any()
    double, strided = torch.zeros(4, 3, dtype=torch.float64), torch.zeros(4, 4)[:, :3]
    for wrong in (double, strided, torch.zeros(3, 3), torch.zeros(5, 3)):
        with pytest.raises(ValueError, match="b"):
            checkpoint.read_into("b", wrong)


def test_large_tensors_come_in_pieces(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("emo_select.checkpoint.reader.PIECE_BYTES", 16)
    checkpoint = open_checkpoint(tiny)
    sizes = [len(piece) for piece in checkpoint.pieces("b", [0, 1, 3])]
    assert sizes == [16, 8, 12]


def test_runs() -> None:
    assert list(runs([3, 4, 5, 9, 2, 3])) == [(3, 3), (9, 1), (2, 2)]
    assert list(runs([])) == []


def test_a_shard_cut_at_any_byte_is_named(tiny: Path) -> None:
    whole = (tiny / "model.safetensors").read_bytes()
    for size in range(len(whole)):
        (tiny / "model.safetensors").write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"model\.safetensors"):
            open_checkpoint(tiny)
    (tiny / "model.safetensors").write_bytes(whole + b"\0")
    with pytest.raises(CheckpointError, match="longer"):
        open_checkpoint(tiny)


def test_a_flipped_header_byte_never_reads_outside(tiny: Path) -> None:
    whole = (tiny / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    for at in range(8 + length):
        (tiny / "model.safetensors").write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1:])
        try:
            checkpoint = open_checkpoint(tiny)
        except CheckpointError:
            continue
        assert all(checkpoint.read(name).shape == info.shape for name, info in checkpoint.tensors.items())


@pytest.mark.parametrize("header", [
    b"[]", b"{", b'{"a": 1}',
    b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0]}}',
    b'{"a": {"dtype": "F9", "shape": [2], "data_offsets": [0, 8]}}',
    b'{"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}',
    b'{"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}',
    b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}',
    b"[" * 100000,
], ids=range(9))
def test_a_nonsense_header_is_refused(tiny: Path, header: bytes) -> None:
    (tiny / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        open_checkpoint(tiny)


def test_a_missing_shard_is_named(sharded: Path) -> None:
    (sharded / "model-00003-of-00004.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00003-of-00004\.safetensors.* is missing"):
        open_checkpoint(sharded)


def test_an_index_that_does_not_fit_is_refused(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    elsewhere = next(s for s in index["weight_map"].values() if s != index["weight_map"]["model.norm.weight"])
    for name, shard, says in (("model.norm.weight", elsewhere, "says that"),
                              ("extra", "model-00001-of-00004.safetensors", "extra"),
                              ("extra", "model-00009-of-00004.safetensors", "missing"),
                              ("extra", "../model/model-00001-of-00004.safetensors", "not a valid index"),
                              ("extra", 3, "not a valid index")):
        changed = {"weight_map": {**index["weight_map"], name: shard}}
        (sharded / INDEX).write_text(json.dumps(changed))
        with pytest.raises(CheckpointError, match=says):
            open_checkpoint(sharded)
    (sharded / INDEX).write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        open_checkpoint(sharded)


def test_a_tensor_in_two_shards_is_refused(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    twice = next(name for name, shard in index["weight_map"].items() if shard == "model-00001-of-00004.safetensors")
    shutil.copy(sharded / "model-00001-of-00004.safetensors", sharded / "copy.safetensors")
    index["weight_map"]["more"] = "copy.safetensors"
    del index["weight_map"][twice]
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=f"{twice} is in two shards.*does not say which"):
        open_checkpoint(sharded)


def test_a_shard_laid_over_others_counts_where_the_index_names_it(sharded: Path, capsys: pytest.CaptureFixture[str]
                                                                 ) -> None:
    from safetensors.torch import save_file

    index = json.loads((sharded / INDEX).read_text())
    save_file({"model.norm.weight": torch.full((64,), 7.0), "not.listed": torch.ones(1)},
              sharded / "overlay.safetensors")
    for shard in ("overlay.safetensors", index["weight_map"]["model.norm.weight"]):
        index["weight_map"]["model.norm.weight"] = shard
        (sharded / INDEX).write_text(json.dumps(index))
        with open_checkpoint(sharded) as checkpoint:
            overlaid = "overlay" in index["weight_map"]["model.norm.weight"]
            assert bool((checkpoint.read("model.norm.weight") == 7).all()) == overlaid
            assert ("not.listed" in checkpoint.tensors) == overlaid


def test_folders_without_config_or_weights(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="JSON object"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"never unpickled")
    with pytest.raises(CheckpointError, match="convert them once"):
        open_checkpoint(tmp_path)


def test_a_shard_that_shrinks_while_open_is_an_error(tiny: Path) -> None:
    checkpoint = open_checkpoint(tiny)
    (tiny / "model.safetensors").write_bytes((tiny / "model.safetensors").read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="became shorter"):
        [checkpoint.read(name) for name in checkpoint.tensors]


def test_fingerprint_follows_config_names_and_bytes(tiny: Path) -> None:
    first = open_checkpoint(tiny).fingerprint
    assert open_checkpoint(tiny).fingerprint == first
    data = bytearray((tiny / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (tiny / "model.safetensors").write_bytes(data)
    second = open_checkpoint(tiny).fingerprint
    (tiny / "config.json").write_text('{"a": 1}')
    assert len({first, second, open_checkpoint(tiny).fingerprint}) == 3


def test_finite() -> None:
    dtypes = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    for name, dtype in dtypes.items():
        limits = torch.finfo(dtype)
        values = torch.tensor([0.0, -1.5, limits.max, limits.min, limits.tiny], dtype=dtype)
        assert all_finite(bytes(values.view(torch.uint8).tolist()), name)
        for bad in (torch.inf, -torch.inf, torch.nan):
            values[1] = bad
            assert not all_finite(bytes(values.view(torch.uint8).tolist()), name)
    assert all_finite(b"\xff" * 8, "I64") and all_finite(b"", "F32")


def test_sources(tmp_path: Path) -> None:
    assert resolve(str(tmp_path)) == tmp_path.resolve()
    for missing, says in ((str(tmp_path / "no"), "no folder"), ("./no", "no folder"), ("gpt2", "no folder"),
                          ("allenai/Emo_1b14b_1t", "did you mean 'allenai/Emo_1b14b_1T'"),
                          ("demo/nothing", "Unknown model"), ("bad name/x y", "no model|neither")):
        with pytest.raises(UsageError, match=says):
            resolve(missing)


def test_opening_imports_no_torch(tiny: Path) -> None:
    import subprocess
    import sys

    code = ("import sys; from emo_select.checkpoint import open_checkpoint; from emo_select.models import families\n"
            "import emo_select.experts.prune\n"
            f"c = open_checkpoint({str(tiny)!r}); c.fingerprint; list(c.pieces('b'))\n"
            "sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))")
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
