"""Filling a folder from the Hub, with huggingface_hub's own code against a local server."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hub_server import serve

from emo_select.errors import DataMissingError, TaskError, UsageError
from emo_select.tasks import fetch, get_tasks
from emo_select.tasks.hub import choose_files
from emo_select.tasks.sources import read_rows, split_files

ROWS = [{"id": f"own_{number}", "question": f"What is {number} + 1?", "answerKey": "B",
         "choices": {"text": ["no", str(number + 1)], "label": ["A", "B"]}} for number in range(400)]


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, compression="none")


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    """A Hub with a data set of ARC's shape (its train split in two files) and a model with code beside it."""
    root = tmp_path / "hub"
    base = root / "datasets/allenai/ai2_arc"
    converted = base / "c0ffee/ARC-Easy"
    write_parquet(converted / "train/0000.parquet", ROWS[:200])
    write_parquet(converted / "train/0001.parquet", ROWS[200:300])
    write_parquet(converted / "validation/0000.parquet", ROWS[300:350])
    write_parquet(converted / "test/0000.parquet", ROWS[350:])
    (base / "c0ffee/ai2_arc.py").write_text("raise SystemExit('a loading script ran')")
    (base / "REFS").write_text(json.dumps({"refs/convert/parquet": "c0ffee"}))
    model = root / "models/someone/tiny/beef"
    model.mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "tokenizer.json", "modeling.py", "pytorch_model.bin"):
        (model / name).write_text(f"content of {name}")
    (root / "models/someone/tiny/REFS").write_text(json.dumps({"main": "beef"}))
    return root


def run(arguments: list[str], endpoint: str, home: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(home),
                   "HF_HUB_DISABLE_XET": "1", "HF_HUB_DOWNLOAD_TIMEOUT": "5"}
    environment.pop("EMO_SELECT_DATA_DIR", None)
    program = "from emo_select.cli.app import main; main()"
    return subprocess.run([sys.executable, "-c", program, *arguments], env=environment, capture_output=True, text=True,
                          timeout=120, check=False)


def test_fills_a_folder_that_the_task_then_reads(hub: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    command = ["fetch", "-t", "arc_easy", "-m", "someone/tiny", "--to", str(folder), "--yes"]
    with serve(hub) as (endpoint, asked):
        result = run(command, endpoint, tmp_path / "home")
        assert result.returncode == 0, result.stderr
        assert "allenai/ai2_arc: 4 files" in result.stdout
        assert f"--data-dir {folder}" in result.stdout
        asked.clear()
        again = run(command, endpoint, tmp_path / "home")
        assert "to fetch: 0.0 MB in 0 files" in again.stdout
        assert not [line for line in asked if "/resolve/" in line]
    task = get_tasks(["arc_easy"], folder)[0]
    assert task.available
    assert (len(task.docs("train")), len(task.docs("test"))) == (350, 50)
    assert task.docs("test")[0]["native_id"] == "own_350"
    kept = {path.name for path in (folder / "models/someone/tiny").iterdir() if path.name[0] != "."}
    assert kept == {"config.json", "model.safetensors", "tokenizer.json", "modeling.py"}  # no pickled weights
    assert not (folder / ".partial").exists()


def test_a_broken_download_goes_on_where_it_stopped(hub: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    weights = bytes(range(256)) * 50_000  # more than one of the pieces in which huggingface_hub writes
    (hub / "models/someone/tiny/beef/model.safetensors").write_bytes(weights)
    command = ["fetch", "-m", "someone/tiny", "--to", str(folder), "--yes"]
    with serve(hub, {"model.safetensors": 12_000_000}) as (endpoint, asked):
        result = run(command, endpoint, tmp_path / "home")
        if result.returncode:
            assert "run the same command to go on" in result.stderr
            result = run(command, endpoint, tmp_path / "home")
    assert result.returncode == 0, result.stderr
    starts = [line.rpartition("bytes=")[2] for line in asked if "bytes=" in line and "model.safetensors" in line]
    assert starts and all(int(start.split("-")[0]) >= 10_000_000 for start in starts)
    assert (folder / "models/someone/tiny/model.safetensors").read_bytes() == weights


def test_a_file_of_somebody_elses_is_not_replaced(hub: Path, tmp_path: Path) -> None:
    """Refused before anything is downloaded; what was fetched is replaced where the Hub has another one now."""
    folder = tmp_path / "data"
    mine = folder / "models/someone/tiny/config.json"
    mine.parent.mkdir(parents=True)
    mine.write_text("{}")
    command = ["fetch", "-m", "someone/tiny", "--to", str(folder)]
    with serve(hub) as (endpoint, asked):
        refused = run(command, endpoint, tmp_path / "home")
        assert refused.returncode == 2 and "config.json was not made by emo-select" in refused.stderr.replace("\n", " ")
        assert mine.read_text() == "{}" and not [line for line in asked if "/resolve/" in line]
        mine.unlink()
        assert run(command, endpoint, tmp_path / "home").returncode == 0
        (hub / "models/someone/tiny/beef").rename(hub / "models/someone/tiny/cafe")
        (hub / "models/someone/tiny/REFS").write_text('{"main": "cafe"}')
        (hub / "models/someone/tiny/cafe/config.json").write_text("of a later revision")
        assert run(command, endpoint, tmp_path / "home").returncode == 0
    assert mine.read_text() == "of a later revision"


def test_sizes_first_and_nothing_downloaded_without_a_yes(hub: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    with serve(hub) as (endpoint, asked):
        result = run(["fetch", "-t", "arc_easy", "--to", str(folder), "--dry-run"], endpoint, tmp_path / "home")
        assert result.returncode == 0, result.stderr
        assert "allenai/ai2_arc: 4 files" in result.stdout
        assert not [line for line in asked if "/resolve/" in line]
    assert not folder.exists()


def test_a_task_downloads_what_it_needs_into_the_cache(hub: Path, tmp_path: Path) -> None:
    """Data folder, then cache, then Hub; the second time the cache answers without a question."""
    with serve(hub) as (endpoint, asked):
        program = ("from emo_select.tasks import get_tasks; t = get_tasks(['arc_easy'])[0]; t.require_data();"
                   "print(len(t.docs('train')), len(t.docs('test')))")
        environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home"),
                       "HF_HUB_DISABLE_XET": "1"}
        for _ in range(2):
            asked_before = len(asked)
            result = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True,
                                    timeout=120, check=False)
            assert result.stdout == "350 50\n", result.stderr
        assert len(asked) == asked_before


def test_missing_data_is_one_sentence_with_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMO_SELECT_DATA_DIR", str(tmp_path))
    task = get_tasks(["boolq"])[0]
    assert not task.available
    with pytest.raises(DataMissingError, match="emo-select fetch --task boolq_merged --to DIR"):
        task.require_data()
    with pytest.raises(DataMissingError, match="Nothing was fetched"):
        fetch.make_plan(["boolq"], [], tmp_path)
    with pytest.raises(UsageError, match="--task"):
        fetch.make_plan([], [], tmp_path)
    for model in ("demo/any", str(tmp_path)):
        with pytest.raises(UsageError, match="on this machine already"):
            fetch.make_plan([], [model], tmp_path)


@pytest.mark.parametrize(
    "names, config, expected",
    [
        (["c/train/0000.parquet", "d/train/0000.parquet"], "c", ["c/train/0000.parquet"]),
        (["data/train-00000-of-00001.parquet", "data/train.py"], "default", ["data/train-00000-of-00001.parquet"]),
        (["train.parquet"], "default", ["train.parquet"]),
        (["train.parquet"], "c", []),
        (["c/train-00001-of-00002.parquet", "c/train-00000-of-00002.parquet"], "c",
         ["c/train-00000-of-00002.parquet", "c/train-00001-of-00002.parquet"]),
        (["plain_text/train/0000.parquet"], "default", ["plain_text/train/0000.parquet"]),
        (["a/train/0000.parquet", "b/train/0000.parquet"], "default", []),
        (["script.py"], "default", []),
    ],
)
def test_which_files_hold_a_split(names: list[str], config: str, expected: list[str]) -> None:
    assert choose_files(names, config, "train") == expected


@pytest.mark.parametrize(
    "names, config, found",
    [
        (["default/train.parquet"], "default", 1),
        (["train.jsonl"], "default", 1),
        (["plain/train/0000.parquet", "plain/train/0001.parquet"], "default", 2),
        (["c/train/0001.parquet"], "c", 0),
        (["c/train-00000-of-00002.parquet"], "c", 0),
        (["c/train-00000-of-00002.parquet", "c/train-00001-of-00002.parquet"], "c", 2),
        (["other/train.parquet"], "c", 0),
        (["a/train.parquet", "b/train.parquet"], "default", 0),
    ],
)
def test_which_local_files_hold_a_split(names: list[str], config: str, found: int, tmp_path: Path) -> None:
    """A split that misses a shard is absent, not short."""
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    files = split_files(tmp_path, config, "train")
    assert [file.relative_to(tmp_path).as_posix() for file in files] == names[:found]


def test_damaged_files_are_named(tmp_path: Path) -> None:
    for name, content in (("a.parquet", b"PAR1 no"), ("b.jsonl", b"{"), ("c.json", b"{}"), ("d.csv", b"a,b\n1\n"),
                          ("e.csv", b"a\n\xff\n"), ("f.txt", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(TaskError, match=name):
            read_rows(tmp_path / name)
