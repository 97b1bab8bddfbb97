"""Two models or tasks never share a folder, whatever their names have in common; one model never has two."""

import json
import multiprocessing
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from emo_select import names, record
from emo_select.checkpoint import resolve
from emo_select.cli.app import app
from emo_select.errors import LockedError, ModelError
from emo_select.pipeline import Wanted, execute, expand, plan, reopen
from emo_select.spec import Execution, RunSpec
from emo_select.sweeps.spec import expand_sweep, read_sweep
from emo_select.tree import Tree

STAGES = ("activations", "select", "prune", "eval")
SETTINGS = {"evaluation": {"limit": 2}}
TASK = "name: sums\nkind: multiple_choice\ntext: '{{{{ question }}}}'\nchoices: options\n" \
       "gold: '{{{{ answer }}}}'\ndata: {data}\nsplits: {{train: 0.4, validation: 0.3, test: 0.3}}\n"


def copy(folder: Path, flip: int = 0) -> Path:
    """A model of its own: a byte of the last tensor is another one."""
    shutil.copytree(resolve("demo/emo"), folder)
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= flip
    (folder / "model.safetensors").write_bytes(data)
    return folder


def runs(root, models, tasks=("demo_harbor",), method="random"):
    wanted = Wanted(list(map(str, models)), list(map(str, tasks)), ["8"], [method], SETTINGS)
    return expand(wanted, Tree(Path(root)), Execution(device="cpu"))


def done(found):
    for run in found:
        execute(run, plan(run, STAGES))
    return found


def invoke(*words):
    result = CliRunner().invoke(app, ["--quiet", *map(str, words)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def task_file(folder: Path, answers: int) -> Path:
    folder.mkdir(exist_ok=True)
    rows = [{"question": f"{n} + 1?", "options": ["yes", "no"], "answer": (n + answers) % 2} for n in range(20)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "task.yaml").write_text(TASK.format(data="rows.jsonl"))
    return folder / "task.yaml"


@pytest.mark.parametrize("pair", [("m1.5", "m15"), ("a/bc", "ab/c"), ("ü/ckpt", "ö/ckpt")])
def test_models_whose_names_come_to_the_same_lie_apart(pair, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    models = [f"./{name}" for name in pair]
    for number, name in enumerate(models):
        copy(tmp_path / name, number)
    first, second = done(runs("tree", models))
    assert "belongs to the model" in " ".join(capsys.readouterr().err.split())
    assert first.paths.directory.parent.name == RunSpec(model=models[0], task="t", keep_k=1).model_directory
    assert first.paths.directory != second.paths.directory
    assert [record.load(run.paths).spec.model for run in (first, second)] == models
    again = runs("tree", reversed(models))  # also when asked for in another order
    assert [run.paths.directory for run in again] == [second.paths.directory, first.paths.directory]
    assert not any(step.action == "run" for run in again for step in plan(run, STAGES))
    rows = invoke("table", "results", "-o", "tree", "--json")
    assert all(model in rows for model in models)
    compared = invoke("compare", *models, "-o", "tree", "--json", "--resamples", 100)
    assert {row["model"] for row in json.loads(compared)["tables"][0]["rows"]} == {" → ".join(models)}
    for model, other in (models, reversed(models)):
        alone = invoke("table", "-o", "tree", "--model", model, "--json")
        assert model in alone and other not in alone


def test_one_path_is_one_model_and_two_are_two(tmp_path, monkeypatch):
    places = []
    for number, name in enumerate(("here", "there")):
        copy(tmp_path / name / "ckpt", number)
        monkeypatch.chdir(tmp_path / name)
        [run] = done(runs(tmp_path / "tree", ["ckpt"]))
        for spelling in ("./ckpt", tmp_path / name / "ckpt", f"../{name}/ckpt"):
            [same] = runs(tmp_path / "tree", [spelling])
            assert same.paths.directory == run.paths.directory
        places.append(run.paths.directory)
    assert places[0].parent.name == "ckpt" and places[1].parent.name.startswith("ckpt-")
    monkeypatch.chdir(tmp_path)
    for place, name in zip(places, ("here", "there"), strict=True):
        assert reopen(place, Execution()).source.directory == tmp_path / name / "ckpt"
    labels = invoke("table", "results", "-o", "tree", "--json")
    assert all(str(tmp_path / name / "ckpt") in labels for name in ("here", "there"))


def test_other_weights_at_the_same_path_are_stale_in_the_same_place(tmp_path):
    copy(tmp_path / "m")
    [run] = done(runs(tmp_path / "tree", [tmp_path / "m"]))
    shutil.rmtree(tmp_path / "m")
    copy(tmp_path / "m", 1)
    [again] = runs(tmp_path / "tree", [tmp_path / "m"])
    assert again.paths.directory == run.paths.directory
    assert {step.stage for step in plan(again, STAGES) if step.action == "run"} == {"select", "prune", "eval"}


def test_a_model_that_moved_keeps_its_folder_and_its_results(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    copy(tmp_path / "a" / "bc")
    [run] = done(runs("tree", ["./a/bc"]))
    (tmp_path / "ab").mkdir()
    (tmp_path / "a" / "bc").rename(tmp_path / "ab" / "c")
    [moved] = runs("tree", ["./ab/c"])
    assert moved.paths.directory == run.paths.directory
    assert not any(step.action == "run" for step in plan(moved, STAGES))


def test_task_files_with_one_name_are_two_tasks(tmp_path):
    files = [task_file(tmp_path / name, number) for number, name in enumerate(("a", "b"))]
    first, second = done(runs(tmp_path / "tree", ["demo/emo"], files, "easy_ep"))
    assert first.spec.task == "sums" and second.spec.task.startswith("sums-")
    assert [record.load(run.paths).task_file for run in (first, second)] == list(map(str, files))
    assert len(list((tmp_path / "tree" / "demoemo" / "activations").glob("sums*"))) == 2
    answers = [run.paths.result(0).joinpath("task-sums_rc_test-predictions.jsonl").read_text()
               for run in (first, second)]
    assert answers[0] != answers[1]
    shutil.copytree(tmp_path / "a", tmp_path / "copied")
    assert runs(tmp_path / "tree", ["demo/emo"], [tmp_path / "copied" / "task.yaml"])[0].spec.task == "sums"
    task_file(tmp_path / "a", 5)  # edited: the same task, to be done again
    [edited] = runs(tmp_path / "tree", ["demo/emo"], files[:1], "easy_ep")
    assert edited.paths.directory == first.paths.directory
    assert any(step.action == "run" for step in plan(edited, STAGES))


def test_evaluations_of_two_models_are_two_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(("m1.5", "m15")):
        copy(tmp_path / name, number)
    words = ["eval", "--model", "./m1.5", "--model", "./m15", "-t", "demo_harbor", "--limit", 2]
    invoke(*words, "-o", "tree")
    invoke(*words, "--out", "out")
    for folder, pattern in (("tree", "*/evaluations/*-metrics.json"), ("out", "*/*-metrics.json")):
        found = [json.loads(path.read_text())["model_config"]["model"] for path in Path(folder).glob(pattern)]
        assert sorted(found) == ["./m1.5", "./m15"]


def test_an_evaluation_that_fails_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(("good", "bad")):
        copy(tmp_path / name, number)
    (tmp_path / "bad/tokenizer.json").write_text("{}")
    words = ["eval", "-t", "demo_harbor", "--limit", 2, "-o", "tree"]
    with pytest.raises(ModelError):
        invoke(*words, "--model", "./bad")
    assert not (tmp_path / "tree").exists()
    with pytest.raises(ModelError):
        invoke(*words, "--model", "./good", "--model", "./bad")
    assert [path.name for path in (tmp_path / "tree").iterdir()] == ["good"]
    assert list((tmp_path / "tree").glob("good/evaluations/*-metrics.json"))


def take(note: Path, letter: str, results) -> None:
    try:
        names.claim(note, letter, f"/models/{letter}")
        results.put(letter)
    except LockedError:
        results.put("")


def test_of_processes_that_claim_a_name_at_once_one_has_it(tmp_path):
    context = multiprocessing.get_context("fork")
    for number in range(20):
        note, results = tmp_path / str(number) / names.MODEL_NOTE, context.Queue()
        workers = [context.Process(target=take, args=(note, letter, results)) for letter in "abcd"]
        for worker in workers:
            worker.start()
        said = [results.get() for _ in workers]
        for worker in workers:
            worker.join()
        assert [letter for letter in said if letter] == [names.holder_of(note).name]
        assert [path.name for path in note.parent.iterdir()] == [names.MODEL_NOTE]


def test_a_sweep_gives_the_same_names(tmp_path):
    for number, name in enumerate(("m1.5", "m15")):
        copy(tmp_path / name, number)
    (tmp_path / "sweep.yaml").write_text(
        "name: two\nmodels: [./m1.5, ./m15]\ntasks: [demo_harbor]\nkeep_k: [8]\nmethods: [random]\n")
    tree = Tree(tmp_path / "tree")
    first, second = expand_sweep(read_sweep(tmp_path / "sweep.yaml"), tree)
    assert [run.spec.model_path for run in (first, second)] == [str(tmp_path / name) for name in ("m1.5", "m15")]
    assert first.spec.model_directory == "m15" != second.spec.model_directory
    names.claim(tree.root / "m15" / names.MODEL_NOTE, "./m15", str(tmp_path / "m15"))
    first, second = expand_sweep(read_sweep(tmp_path / "sweep.yaml"), tree)
    assert second.spec.model_directory == "m15" != first.spec.model_directory


def test_trees_from_before_there_were_notes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    copy(tmp_path / "m15")
    [run] = done(runs("tree", ["./m15"]))
    (run.paths.directory.parent / names.MODEL_NOTE).unlink()
    content = json.loads(run.paths.record.read_text())
    for key in ("model_path", "model_folder"):
        del content["spec"][key]
    run.paths.record.write_text(json.dumps({**content, "model_fingerprint": ""}))
    [again] = runs("tree", ["./m15"])
    assert again.paths.directory == run.paths.directory
    copy(tmp_path / "m1.5", 1)
    [other] = runs("tree", ["./m1.5"])
    assert other.paths.directory.parent != run.paths.directory.parent
    assert "./m15" in invoke("table", "results", "-o", "tree")
