"""No command replaces or deletes what this program did not make, nor a model that it reads."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from emo_select import ownership, tree
from emo_select.checkpoint import open_checkpoint, resolve
from emo_select.cli.app import app
from emo_select.errors import EmoSelectError, OwnershipError
from emo_select.experts.methods import select_random
from emo_select.ownership import MARKER, require_replaceable
from emo_select.tree import publish, remove_directory, staged_directory

CALIBRATION = ["--task", "demo_harbor", "--num-examples", "2", "--device", "cpu"]


def run(*words: object) -> tuple[int, str]:
    found = CliRunner().invoke(app, [str(word) for word in words])
    if isinstance(found.exception, EmoSelectError):
        return found.exception.exit_code, str(found.exception)
    if found.exception is not None and not isinstance(found.exception, SystemExit):
        raise found.exception
    return found.exit_code, found.output


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A user's model."""
    shutil.copytree(resolve("demo/emo"), tmp_path / "mine" / "model")
    return tmp_path / "mine" / "model"


@pytest.fixture
def selection(model: Path, tmp_path: Path) -> Path:
    with open_checkpoint(model) as checkpoint:
        select_random(checkpoint.config, 8, about={"model": str(model)}).save(tmp_path / "selection.json")
    return tmp_path / "selection.json"


@pytest.fixture
def thesis(tmp_path: Path) -> Path:
    """A folder with a user's work."""
    (tmp_path / "results" / "chapter").mkdir(parents=True)
    (tmp_path / "results" / "chapter" / "text.md").write_text("years of work")
    return tmp_path / "results"


def state(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in folder.rglob("*") if path.is_file()}


def made(folder: Path, what: str = ownership.OUTPUT) -> Path:
    with staged_directory(folder, "key", what) as partial:
        (partial / "file").write_text("ours")
    return folder


def test_what_we_made_is_replaced_and_anything_else_is_not(tmp_path, thesis):
    ours = made(made(tmp_path / "ours"))
    assert json.loads((ours / MARKER).read_text())["made_by"] == "emo-select"
    before = state(thesis)
    with pytest.raises(OwnershipError, match="not made by emo-select"), staged_directory(thesis, "key"):
        raise AssertionError
    with pytest.raises(OwnershipError, match="not made by emo-select"):
        remove_directory(thesis)
    (tmp_path / "ready").mkdir()
    with pytest.raises(OwnershipError, match="not made by emo-select"):
        publish(tmp_path / "ready", thesis)
    assert state(thesis) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours", "ready", "results"]


def test_an_empty_folder_is_free_and_files_and_links_are_not(tmp_path, thesis):
    (tmp_path / "empty").mkdir()
    made(tmp_path / "empty")
    (tmp_path / "link").symlink_to(made(tmp_path / "ours"))
    for name, words in {"link": "symbolic link", "results/chapter/text.md": "not made by"}.items():
        with pytest.raises(OwnershipError, match=words):
            made(tmp_path / name)


def test_a_source_and_folders_above_it_are_never_replaced(tmp_path):
    ours = made(tmp_path / "ours")
    (ours / "deeper").mkdir()
    for source, words in {ours: "is the model", ours / "deeper": "is a folder above the model"}.items():
        with pytest.raises(OwnershipError, match=words):
            require_replaceable(ours, source)
    require_replaceable(ours / "deeper" / "new", ours)


def test_what_was_made_as_something_else_is_kept_where_nobody_asked_to_replace_it(tmp_path):
    ours = made(tmp_path / "ours", ownership.PRUNED)
    require_replaceable(ours, what=ownership.PRUNED)
    with pytest.raises(OwnershipError, match="a pruned model"):
        require_replaceable(ours, what=ownership.STATISTICS)


def test_hard_links_to_a_marker_are_not_written_through(tmp_path):
    first = made(tmp_path / "first", ownership.PRUNED)
    tree.link_tree(first, tmp_path / ".second.partial")
    publish(tmp_path / ".second.partial", tmp_path / "second", ownership.FINETUNED)
    assert [ownership.made_as(tmp_path / name) for name in ("first", "second")] == ["pruned model", "finetuned model"]


def test_folders_from_before_markers_are_known_by_their_records(tmp_path):
    folders = {"run/selected_model": "pruned model", "run/finetuned_model/checkpoint-3": "finetuned model",
               "out/checkpoint-0": "finetuned model", "run/results/checkpoint-0": "results", "run/notes": None,
               "activations/task": "expert statistics", "other/checkpoint-0": None, "other/selected_model": None}
    for name in folders:
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "file").touch()
    (tmp_path / "activations/task/file").unlink()
    for name in ("run/run.json", "out/training.json", "activations/task/scores.json",
                 "activations/task/scores.safetensors"):
        (tmp_path / name).touch()
    assert {name: ownership.made_as(tmp_path / name) for name in folders} == folders


def test_activations(model, thesis, tmp_path):
    before = state(tmp_path)
    for out in (thesis, model, model.parent):
        code, output = run("activations", "--model", model, *CALIBRATION, "--out", out)
        assert code == 2 and "choose another output" in " ".join(output.split())
    assert state(tmp_path) == before
    for _ in range(2):
        assert run("activations", "--model", model, *CALIBRATION, "--out", tmp_path / "new")[0] == 0


def test_prune(model, selection, thesis, tmp_path):
    before = state(tmp_path)
    for out in (model, model.parent, thesis, tmp_path):
        code, output = run("prune", selection, "--force", "--out", out)
        assert code == 2 and "choose another output" in " ".join(output.split())
    assert state(tmp_path) == before
    for _ in range(2):
        assert run("prune", selection, "--force", "--out", tmp_path / "pruned")[0] == 0
    code, output = run("prune", selection, "--model", tmp_path / "pruned", "--force", "--out", tmp_path / "pruned")
    assert code == 2 and open_checkpoint(tmp_path / "pruned").config["num_experts"] == 8


def test_merge_back(model, selection, thesis, tmp_path):
    assert run("prune", selection, "--out", tmp_path / "pruned")[0] == 0
    before = state(tmp_path)
    for out in (model, model.parent, thesis, tmp_path / "pruned"):
        code, output = run("merge-back", tmp_path / "pruned", "--into", model, "--force", "--out", out)
        assert code == 2 and "choose another output" in " ".join(output.split())
    assert state(tmp_path) == before


def test_finetune_keeps_checkpoints_of_others(model, tmp_path):
    for name in ("checkpoint-0", "checkpoint-500"):
        shutil.copytree(model, tmp_path / "trained" / name)
    before = state(tmp_path)
    for out in (tmp_path / "trained", model):
        code, _ = run("finetune", "--model", model, "--task", "demo_harbor", "--out", out, "--force")
        assert code == 2
    assert state(tmp_path) == before


def test_a_run_of_somebody_else_is_not_touched(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["run", "--model", model, "--task", "demo_harbor", "--keep-k", "8", "--method", "random", "--limit", "2",
             "--stages", "select,prune,eval", "-o", "tree"]
    code, output = run(*words, "--dry-run", "--json")
    directory = Path(json.loads(output[output.index("["):])[0]["directory"])
    (directory / "results" / "checkpoint-0").mkdir(parents=True)
    (directory / "results" / "checkpoint-0" / "task-demo_harbor-metrics.json").write_text("{}")
    before = state(tmp_path / "tree")
    code, output = run(*words)
    assert code == 2 and "was not made by emo-select" in " ".join(output.split())
    assert state(tmp_path / "tree") == before
    shutil.rmtree(directory)
    assert run(*words)[0] == 0


def test_a_selection_finds_its_model_again_and_no_other(model, tmp_path, monkeypatch):
    shutil.copytree(resolve("demo/stdmoe"), tmp_path / "elsewhere" / "model")
    monkeypatch.chdir(model.parent)
    assert run("select", "--model", "model", "--task", "demo_harbor", "--keep-k", "8", "--method", "random",
               "-o", tmp_path / "tree")[0] == 0
    [selection] = (tmp_path / "tree").glob("*/*/selection.json")
    shutil.copy(selection, tmp_path / "selection.json")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert run("prune", selection, "--out", tmp_path / "a")[0] == 0
    code, output = run("prune", tmp_path / "selection.json", "--out", tmp_path / "b")
    assert code == 2 and "made on other weights" in output
    assert run("prune", tmp_path / "selection.json", "--model", "model", "--out", tmp_path / "b")[0] == 0
