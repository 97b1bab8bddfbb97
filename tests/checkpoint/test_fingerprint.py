"""A fingerprint covers all that a result can depend on, and nothing else; no byte is read twice."""

import json
import os
import shutil
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from emo_select.checkpoint import demo_names, hashes, open_checkpoint, resolve
from emo_select.checkpoint.hashes import content_hash
from emo_select.errors import CheckpointError

SMALL_FILES = {
    "config.json": "forward", "tokenizer.json": "forward", "tokenizer_config.json": "forward", "vocab.txt": "forward",
    "special_tokens_map.json": "forward", "merges.txt": "forward", "spiece.model": "forward",
    "chat_template.jinja": "forward", "additional_chat_templates/tools.jinja": "forward",
    "generation_config.json": "whole", "modeling_own.py": "whole",
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of a demo model with every kind of file that can come with one."""
    folder = tmp_path / "model"
    shutil.copytree(resolve(demo_names()[0]), folder)
    (folder / "additional_chat_templates").mkdir()
    for name in SMALL_FILES:
        if not (folder / name).exists():
            (folder / name).write_text("{}")
    return folder


def both(folder: Path) -> tuple[str, str]:
    with open_checkpoint(folder) as checkpoint:
        return checkpoint.fingerprint, checkpoint.forward_fingerprint


def resharded(folder: Path) -> None:
    """The same tensors in two shards with an index."""
    tensors = load_file(folder / "model.safetensors")
    parts = [dict(list(tensors.items())[i::2]) for i in range(2)]
    weight_map = {}
    for number, part in enumerate(parts, 1):
        name = f"model-{number:05d}-of-00002.safetensors"
        save_file(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize("name", SMALL_FILES)
def test_every_small_file_counts_for_what_it_can_change(model, name):
    whole, forward = both(model)
    text = (model / name).read_text()
    changed = text[:-2] + ', "changed": 1}' if name == "config.json" else text + " "
    (model / name).write_text(changed)
    new_whole, new_forward = both(model)
    assert new_whole != whole
    assert (new_forward != forward) == (SMALL_FILES[name] == "forward")


def test_every_tensor_counts(model):
    seen = {both(model)}
    path = model / "model.safetensors"
    data = bytearray(path.read_bytes())
    with open_checkpoint(model) as checkpoint:
        last_bytes = [info.offset + info.bytes - 1 for info in checkpoint.tensors.values()]
    for at in last_bytes:  # a sign flipped in place
        data[at] ^= 0x80
        path.write_bytes(data)
        seen.add(both(model))
        data[at] ^= 0x80
    assert len(seen) == len(last_bytes) + 1
    path.write_bytes(data)
    assert both(model) in seen


def test_how_it_lies_on_disk_does_not_count(model):
    resharded(model)
    before = both(model)
    index = model / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"] = dict(reversed(content["weight_map"].items()))
    index.write_text(json.dumps(content))
    for path in model.rglob("*"):
        os.utime(path, (1, 1))
    (model / "README.md").write_text("# A model")
    (model / "config.json").write_text(json.dumps(json.loads((model / "config.json").read_text()), sort_keys=True))
    assert both(model) == before
    model.rename(model.with_name("moved"))
    assert both(model.with_name("moved")) == before


def big(path: Path, age: float = 10.0) -> Path:
    path.write_bytes(os.urandom(hashes.SMALL))
    os.utime(path, (time.time() - age,) * 2)
    return path


def test_a_large_file_is_read_once(tmp_path, monkeypatch):
    path = big(tmp_path / "weights")
    first = content_hash(path)
    monkeypatch.setattr(hashes, "_read", None)
    assert content_hash(path) == first
    assert content_hash(tmp_path / "." / "weights") == first


def test_a_change_is_seen_by_size_time_and_inode(tmp_path):
    path = big(tmp_path / "weights")
    first = content_hash(path)
    other = big(tmp_path / "other")
    os.utime(other, ns=(path.stat().st_mtime_ns,) * 2)
    other.replace(path)  # same name, size and time
    second = content_hash(path)
    os.utime(path, (1, 1))
    assert first != second == content_hash(path)


def test_what_changed_just_now_is_not_remembered(tmp_path):
    path = big(tmp_path / "weights", age=0)
    first = content_hash(path)
    seen = path.stat()
    with path.open("r+b") as file:
        file.write(bytes(8))
    os.utime(path, ns=(seen.st_atime_ns, seen.st_mtime_ns))
    assert content_hash(path) != first


def test_a_damaged_or_unwritable_memory_costs_only_time(tmp_path, monkeypatch):
    path, place = big(tmp_path / "weights"), tmp_path / "cache"
    monkeypatch.setenv("EMO_SELECT_CACHE_DIR", str(place))
    first = content_hash(path)
    [record] = (place / "hashes").iterdir()
    record.write_text('["nonsense"')
    assert content_hash(path) == first
    monkeypatch.setenv("EMO_SELECT_CACHE_DIR", str(path))  # a file
    assert content_hash(path) == first


def test_records_of_files_that_are_gone_and_the_oldest_are_dropped(tmp_path, monkeypatch):
    monkeypatch.setenv("EMO_SELECT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(hashes, "MOST", 4)
    paths = [big(tmp_path / str(number)) for number in range(4)]
    for number, path in enumerate(paths):
        content_hash(path)
        os.utime(hashes._place(path), (number, number))
    paths[3].unlink()
    content_hash(last := big(tmp_path / "last"))
    assert {*(tmp_path / "cache/hashes").iterdir()} == {hashes._place(path) for path in (paths[2], last)}


def test_the_hub_s_cache_names_large_files_by_their_hash(tmp_path, monkeypatch):
    (tmp_path / "blobs").mkdir()
    blob = tmp_path / "blobs" / ("ab" * 32)
    blob.write_bytes(b"never read")
    link = tmp_path / "snapshots" / "main" / "model.safetensors"
    link.parent.mkdir(parents=True)
    link.symlink_to(blob)
    monkeypatch.setattr(hashes, "_read", None)
    assert content_hash(link) == "ab" * 32


def test_what_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name, words in {"pipe": "not a file", "none": "cannot be read", ".": "not a file"}.items():
        with pytest.raises(CheckpointError, match=words):
            content_hash(tmp_path / name)
