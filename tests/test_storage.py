"""Storage publishes whole files and directories or nothing, and locks die with their process."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from emo_select import storage
from emo_select.errors import CheckpointError, DiskSpaceError, LockedError
from emo_select.ownership import MARKER
from emo_select.storage import exclusive, link_tree, staged_directory


def test_a_failing_body_publishes_nothing_and_the_same_key_continues(tmp_path):
    final = tmp_path / "out"
    with pytest.raises(RuntimeError), staged_directory(final, "a") as folder:
        (folder / "first").write_text("1")
        raise RuntimeError
    assert not final.exists()
    with staged_directory(final, "a") as folder:
        assert (folder / "first").read_text() == "1"
        (folder / "second").write_text("2")
    assert sorted(path.name for path in final.iterdir()) == [MARKER, "first", "second"]
    assert list(tmp_path.iterdir()) == [final]


def test_another_key_starts_empty_and_replaces_the_old_directory_whole(tmp_path):
    final = tmp_path / "out"
    with staged_directory(final, "a") as folder:
        (folder / "old").touch()
    with pytest.raises(RuntimeError), staged_directory(final, "b") as folder:
        (folder / "half").touch()
        raise RuntimeError
    assert sorted(path.name for path in final.iterdir()) == [MARKER, "old"]
    with staged_directory(final, "c") as folder:
        assert list(folder.iterdir()) == []
        (folder / "new").touch()
    assert sorted(path.name for path in final.iterdir()) == [MARKER, "new"]


def test_a_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "x.json"
    storage.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        storage.write_json(path, {"a": object()})
    assert storage.read_json(path) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_damaged_json_is_named(tmp_path):
    (tmp_path / "x.json").write_text('{"a": ')
    with pytest.raises(CheckpointError, match=r"x\.json is not valid JSON"):
        storage.read_json(tmp_path / "x.json")


def test_the_lock_names_its_holder_and_dies_with_it(tmp_path):
    lock = tmp_path / ".lock"
    hold = f"from pathlib import Path; from emo_select.storage import exclusive; import time\n" \
           f"with exclusive(Path({str(lock)!r})): print('held', flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    with pytest.raises(LockedError, match=f"process {process.pid}"), exclusive(lock):
        pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    with exclusive(lock):
        assert json.loads((tmp_path / ".lock.holder").read_text())["pid"] == os.getpid()


def test_waiting_for_a_lock(tmp_path):
    lock = tmp_path / ".lock"
    hold = f"from pathlib import Path; from emo_select.storage import exclusive; import time\n" \
           f"with exclusive(Path({str(lock)!r})): print('held', flush=True); time.sleep(1); print(time.time())"
    process = subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    with exclusive(lock, wait=True):
        got = time.time()
    assert got >= float(process.communicate()[0])


def test_links_share_bytes_and_survive_the_original(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "weights").write_bytes(b"x" * 10)
    link_tree(tmp_path / "a", tmp_path / "c")
    linked = tmp_path / "c" / "b" / "weights"
    assert linked.stat().st_ino == (tmp_path / "a" / "b" / "weights").stat().st_ino
    (tmp_path / "a" / "b" / "weights").unlink()
    assert linked.read_bytes() == b"x" * 10


def test_too_little_space_is_said_before_writing(tmp_path):
    with pytest.raises(DiskSpaceError, match=r"needs 1000000000000\.00 GB"):
        storage.require_space(tmp_path / "not" / "there", 10**21, "This")
