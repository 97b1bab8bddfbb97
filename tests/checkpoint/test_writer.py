"""Writing checkpoints shard by shard: readable by others, resumable, never half there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from emo_select.checkpoint import ShardedWriter, TensorSpec, assign_shards, open_checkpoint
from emo_select.errors import CheckpointError

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(5, dtype=torch.bfloat16), "c": torch.zeros(0, 4),
           "d": torch.arange(4), "e": torch.tensor(2.5)}
SPECS = [TensorSpec("a", "F32", (2, 3)), TensorSpec("b", "BF16", (5,)), TensorSpec("c", "F32", (0, 4)),
         TensorSpec("d", "I64", (4,)), TensorSpec("e", "F32", ())]


def test_others_read_what_was_written(tmp_path: Path) -> None:
    with ShardedWriter(tmp_path, assign_shards(SPECS)) as out:
        for name in ("d", "a", "e", "c", "b"):
            out.write(name, TENSORS[name])
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    found = load_file(tmp_path / "model.safetensors")
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], TENSORS[name]) and found[name].dtype == TENSORS[name].dtype for name in found)


def test_shards_hold_at_most_what_they_may() -> None:
    shards = assign_shards(SPECS, 34)
    assert [[spec.name for spec in specs] for specs in shards.values()] == [["a", "b", "c"], ["d"], ["e"]]
    assert list(shards)[1] == "model-00002-of-00003.safetensors"
    assert all(sum(spec.bytes for spec in specs) <= 34 or len(specs) == 1 for specs in shards.values())
    assert [spec for specs in shards.values() for spec in specs] == SPECS
    assert list(assign_shards([])) == ["model.safetensors"]


def test_sharded_with_index(tmp_path: Path) -> None:
    with ShardedWriter(tmp_path, assign_shards(SPECS, 30)) as out:
        for name in out.missing():
            out.write(name, TENSORS[name])
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in TENSORS.values())
    (tmp_path / "config.json").write_text("{}")
    checkpoint = open_checkpoint(tmp_path)
    assert len(checkpoint.shards) > 1
    assert all(torch.equal(checkpoint.read(name), TENSORS[name]) for name in TENSORS)


def test_finished_shards_survive_a_crash(tmp_path: Path) -> None:
    shards = assign_shards(SPECS, 30)
    with pytest.raises(RuntimeError), ShardedWriter(tmp_path, shards) as out:
        out.write("a", TENSORS["a"])
        out.write("b", TENSORS["b"])
        raise RuntimeError
    visible = {path.name for path in tmp_path.glob("model*")}
    assert visible == {"model-00001-of-00004.safetensors"}  # no index, no half shard
    inode = (tmp_path / "model-00001-of-00004.safetensors").stat().st_ino
    with ShardedWriter(tmp_path, shards) as out:
        assert out.done("a") and not out.done("d") and "a" not in out.missing()
        out.write("a", torch.full((2, 3), 9.0))  # already there: ignored
        for name in out.missing():
            out.write(name, TENSORS[name])
    assert (tmp_path / "model-00001-of-00004.safetensors").stat().st_ino == inode
    assert torch.equal(load_file(tmp_path / "model-00001-of-00004.safetensors")["a"], TENSORS["a"])
    assert not list(tmp_path.glob(".*"))


def test_a_shard_of_another_plan_is_written_again(tmp_path: Path) -> None:
    for value, dtype in ((1.0, "F32"), (2.0, "F64")):
        with ShardedWriter(tmp_path, {"model.safetensors": [TensorSpec("x", dtype, (3,))]}) as out:
            out.write("x", torch.full((3,), value, dtype=torch.float32 if dtype == "F32" else torch.float64))
    assert load_file(tmp_path / "model.safetensors")["x"].tolist() == [2.0] * 3


def test_mistakes_publish_nothing(tmp_path: Path) -> None:
    shards = assign_shards(SPECS)
    with pytest.raises(CheckpointError, match="planned as F32"), ShardedWriter(tmp_path, shards) as out:
        out.write("a", TENSORS["a"].double())
    with pytest.raises(CheckpointError, match="planned as F32"), ShardedWriter(tmp_path, shards) as out:
        out.write("a", TENSORS["a"].T)
    with pytest.raises(CheckpointError, match="needs 24 bytes"), ShardedWriter(tmp_path, shards) as out:
        out.write_bytes("a", [memoryview(bytes(20))])
    with pytest.raises(CheckpointError, match=r"5 tensors were never written.* a"), ShardedWriter(tmp_path, shards):
        pass
    assert not list(tmp_path.glob("model*"))
