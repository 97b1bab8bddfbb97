"""No command replaces or deletes what this program did not make, nor a model that it reads."""

import hashlib
import json
import multiprocessing
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from emo_select import figures, ownership, storage
from emo_select.analysis.page import write_page
from emo_select.checkpoint import open_checkpoint, resolve
from emo_select.cli.app import app
from emo_select.errors import EmoSelectError, OwnershipError
from emo_select.evaluate import run as evaluating
from emo_select.experts import Scores
from emo_select.experts.methods import select_random
from emo_select.ownership import FILES, MARKER, made_as, require_replaceable
from emo_select.storage import publish, remove_directory, staged_directory, write_output
from emo_select.tables import Table, write_tables

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
    storage.link_tree(first, tmp_path / ".second.partial")
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


def test_a_file_is_replaced_only_as_we_wrote_it(tmp_path):
    file = tmp_path / "new" / "page.html"
    write_output(file, b"first")
    write_output(file, b"second")
    write_output(file.with_name("other"), b"x")
    record = json.loads((tmp_path / "new" / FILES).read_text())["files"]
    assert {name: [entry["size"] for entry in entries] for name, entries in record.items()} == {"page.html": [6],
                                                                                               "other": [1]}
    file.write_bytes(b"edited")  # as long as before
    with pytest.raises(OwnershipError, match=r"page\.html was not made by emo-select, or was changed since"):
        write_output(file, b"third")
    assert file.read_bytes() == b"edited"
    file.unlink()
    write_output(file, b"third")
    assert file.read_bytes() == b"third"
    assert sorted(path.name for path in file.parent.iterdir()) == [FILES, "other", "page.html"]


def test_files_of_others_links_and_folders_are_not_replaced(tmp_path):
    (tmp_path / "mine").write_text("years of work")
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    (tmp_path / "folder").mkdir()
    for name in ("mine", "link", "nowhere", "folder"):
        with pytest.raises(OwnershipError, match=f"{name} (was not made by emo-select|is no plain file)"):
            write_output(tmp_path / name, b"years of work")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "link", "mine", "nowhere"]


def test_a_record_of_files_does_not_make_a_folder_ours(tmp_path, thesis):
    write_output(thesis / "page.html", b"page")
    assert made_as(thesis) is None
    with pytest.raises(OwnershipError, match="not made by emo-select"):
        require_replaceable(thesis)


@pytest.mark.parametrize("there", [b"first", None])
@pytest.mark.parametrize("change", range(4))
def test_a_kill_at_any_change_leaves_a_file_that_may_be_replaced(tmp_path, monkeypatch, there, change):
    file, real, count = tmp_path / "page.html", Path.replace, 0
    if there is not None:
        write_output(file, there)

    def killed(self, target):
        nonlocal count
        count += 1
        if count == change // 2 + 1:
            if change % 2:
                real(self, target)
            raise KeyboardInterrupt
        return real(self, target)

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_output(file, b"second")
    monkeypatch.setattr(Path, "replace", real)
    write_output(file, b"third")
    assert file.read_bytes() == b"third"
    assert [entry["size"] for entry in json.loads((tmp_path / FILES).read_text())["files"]["page.html"]] == [5]


def write_often(folder: Path, name: str, letter: bytes) -> None:
    for number in range(20):
        write_output(folder / name, letter * (number + 1))


def test_two_processes_note_files_in_one_folder(tmp_path):
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=write_often, args=(tmp_path, name, letter))
               for name, letter in (("a", b"a"), ("b", b"b"), ("same", b"c"), ("same", b"d"))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0, 0]
    assert json.loads((tmp_path / FILES).read_text())["files"].keys() == {"a", "b", "same"}
    for name in ("a", "b", "same"):
        write_output(tmp_path / name, b"again")


def test_commands_refuse_files_of_others_before_work(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    select = ["select", "--model", model, "--method", "random", "-k", "8", "--out", "chosen"]
    assert run(*select)[0] == 0
    assert run(*select)[0] == 0  # our own
    for words, name in ((select, "chosen/selection.json"), (["report", "page.html", "-o", "empty"], "page.html"),
                        (["inspect", "chosen", "--calibration-curve", "--out", "curve"], "curve/calibration_curve.png"),
                        (["eval", "--model", model, "--task", "demo_harbor", "--sweep-keep-k", "8", "--method",
                          "random", "--limit", "1", "--device", "cpu", "--out", "scores"],
                         "scores/sweep-random/curve.json")):
        Path(name).parent.mkdir(exist_ok=True, parents=True)
        Path(name).write_text("years of work")
        before = state(tmp_path)
        code, text = run(*words)
        assert code == 2
        assert name in text
        assert "choose another name, or remove it" in text
        assert state(tmp_path) == before


def test_results_of_others_are_refused_before_the_model_is_loaded(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["eval", "--model", model, "--task", "demo_harbor", "--limit", "2", "--out", "scores"]
    Path("scores").mkdir()
    theirs = Path("scores/task-demo_harbor-predictions.jsonl")
    theirs.write_text("years of work")
    with monkeypatch.context() as patch:
        patch.setattr(evaluating, "load_engine", lambda *args: pytest.fail("the model was loaded"))
        code, text = run(*words)
    assert code == 2 and "predictions.jsonl was not made by emo-select" in text
    assert state(Path("scores")) == {theirs.name: hashlib.sha256(b"years of work").hexdigest()}
    theirs.unlink()
    assert run(*words)[0] == run(*words, "--force")[0] == 0
    theirs.write_text("mine now")
    assert run(*words, "--force")[0] == 2 and theirs.read_text() == "mine now"


def test_results_in_a_run_need_no_note(model, tmp_path):
    words = ["run", "--model", model, "--task", "demo_harbor", "--keep-k", "8", "--method", "random", "--limit", "2",
             "--stages", "select,prune,eval", "-o", tmp_path / "tree"]
    assert run(*words)[0] == 0
    [metrics] = (tmp_path / "tree").glob("*/*/results/checkpoint-0/*-metrics.json")
    metrics.write_text("{}")
    assert run(*words)[0] == 0 and "metrics" in json.loads(metrics.read_text())
    assert not list((tmp_path / "tree").rglob(FILES))


def test_what_the_python_api_saves_replaces_only_its_own(model, tmp_path):
    with open_checkpoint(model) as checkpoint:
        keep_set = select_random(checkpoint.config, 8)
    scores = Scores([], ["all"], [0], [0], {})
    for save, name in ((lambda: keep_set.save(tmp_path / "selection.json"), "selection.json"),
                       (lambda: scores.save(tmp_path), "scores.json")):
        (tmp_path / name).write_text("years of work")
        before = state(tmp_path)
        with pytest.raises(OwnershipError, match=f"{name} was not made by emo-select"):
            save()
        assert state(tmp_path) == before
        (tmp_path / name).unlink()
        save()
        save()


def test_summaries_of_calibration_curves(model, tmp_path):
    words = ["inspect", "--calibration-curve", "--model", model, "--task", "demo_harbor", "--keep-k", "8", "-n", "1,2",
             "--method", "easy_ep", "--device", "cpu", "--no-plot", "--out", tmp_path / "curve"]
    assert run(*words)[0] == run(*words)[0] == 0
    [summary] = (tmp_path / "curve").rglob("summary.json")
    summary.write_text("years of work")
    before = state(tmp_path)
    code, text = run(*words)
    assert code == 2 and "summary.json was not made by emo-select" in text and state(tmp_path) == before


def test_tables_and_pictures_are_written_all_or_none(selection, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("tables").mkdir()
    Path("tables/problems.csv").write_text("years of work")
    with pytest.raises(OwnershipError, match=r"tables/problems\.csv"):
        write_tables([Table(name, ["a"], [["b"]]) for name in ("summary", "problems")], Path("tables"), "csv")
    assert [path.name for path in Path("tables").iterdir()] == ["problems.csv"]
    Path("one").mkdir()
    Path("two").mkdir()
    shutil.copy(selection, "one/selection.json")
    shutil.copy(selection, "two/selection.json")
    Path("pictures").mkdir()
    Path("pictures/overlaps.png").write_text("years of work")
    code, text = run("inspect", "one", "two", "--out", "pictures")
    assert (code, "pictures/overlaps.png" in text) == (2, True)
    assert [path.name for path in Path("pictures").iterdir()] == ["overlaps.png"]
    Path("pictures/overlaps.png").unlink()
    assert run("inspect", "one", "two", "--out", "pictures")[0] == 0
    assert run("inspect", "one", "two", "--out", "pictures")[0] == 0


def test_figures_are_saved_all_or_none(tmp_path):
    drawn = {tmp_path / f"figure.{suffix}": figures.new_figure(1, 1) for suffix in ("png", "pdf")}
    assert figures.save_all(drawn) == figures.save_all(drawn) == list(drawn)
    (tmp_path / "figure.pdf").write_text("years of work")
    (tmp_path / "figure.png").unlink()
    with pytest.raises(OwnershipError, match=r"figure\.pdf was not made by emo-select"):
        figures.save_all(drawn)
    assert not (tmp_path / "figure.png").exists()


def test_a_page_of_others_is_refused_before_models_are_read(tmp_path):
    (tmp_path / "page.html").write_text("years of work")
    with pytest.raises(OwnershipError, match=r"page\.html was not made by emo-select"):
        write_page([tmp_path / "nowhere"], tmp_path / "page.html")
