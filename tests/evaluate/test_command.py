"""`emo-select eval` and the Python functions behind it, on a tiny EMO and the demo tasks."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from emo_select.cli import evaluate as command
from emo_select.errors import DataMissingError, SpecError, UsageError
from emo_select.evaluate import EvalOptions, curve, engine, evaluate_checkpoint, evaluate_keep_set, run
from emo_select.experts import KeepSet, prune_checkpoint
from emo_select.experts.methods import select_random
from emo_select.ownership import FILES
from emo_select.tables import Filters, load_layout, load_tree, make
from emo_select.tasks import Task, get_tasks

LIMIT = 6


@pytest.fixture(scope="module")
def tasks() -> list[Task]:
    """One multiple-choice and one generation task."""
    return get_tasks(["demo"])[:2]


@pytest.fixture(scope="module")
def keep_set(model: Path) -> KeepSet:
    config = json.loads((model / "config.json").read_text())
    return select_random(config, 5, seed=1, about={"model": str(model)})


def options(**changes: Any) -> EvalOptions:
    return EvalOptions(**{"limit": LIMIT, "device": "cpu", **changes})


def invoke(*words: str) -> Any:
    app = typer.Typer()
    app.callback()(lambda: None)
    command.register(app)
    return CliRunner().invoke(app, ["eval", *words, "--device", "cpu"], catch_exceptions=False)


def predictions(folder: Path) -> list[dict[str, Any]]:
    """All lines of all predictions files."""
    paths = sorted(folder.glob("task-*-predictions.jsonl"))
    return [json.loads(line) for path in paths for line in path.read_text().splitlines()]


def same_content(one: Path, other: Path) -> bool:
    """Whether the predictions agree, log-probabilities up to rounding."""
    pairs = zip(predictions(one), predictions(other), strict=True)
    return all(agree(a[key], b[key]) for a, b in pairs for key in ("metrics", "model_output", "label"))


def agree(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(agree(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(agree, one, other))
    return bool(one == (pytest.approx(other, abs=1e-4) if isinstance(other, float) else other))


def test_models_and_folders(model: Path, tasks: list[Task], tmp_path: Path) -> None:
    names = [task.name for task in tasks]
    result = invoke("--model", str(model), "--task", ",".join(names), "--limit", str(LIMIT), "--out", str(tmp_path),
                    "--json")
    assert json.loads(result.stdout)[str(model)].keys() == set(names)
    assert {path.name for path in tmp_path.iterdir()} == {FILES} | {
        f"task-{task.alias}-{kind}" for task in tasks for kind in ("metrics.json", "predictions.jsonl")}


def test_a_finished_evaluation_is_not_repeated(model: Path, tasks: list[Task], tmp_path: Path,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    first = evaluate_checkpoint(model, tasks, tmp_path, options())
    monkeypatch.setattr(run, "load_engine", lambda *args: pytest.fail("the model was loaded"))
    assert evaluate_checkpoint(model, tasks, tmp_path, options()) == first
    with pytest.raises(pytest.fail.Exception):
        evaluate_checkpoint(model, tasks, tmp_path, options(limit=LIMIT + 1))


def test_an_interrupted_evaluation_goes_on_from_its_responses(model: Path, tasks: list[Task], tmp_path: Path,
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    whole, killed, scored = tmp_path / "whole", tmp_path / "killed", engine.SharedPrefixLM._packed_scores
    asked: list[int] = []

    def stopping(self: Any, encoded: Any) -> Any:
        asked.append(len(encoded))
        for count, result in enumerate(scored(self, encoded)):
            if count == 7 and len(asked) == 1:
                raise KeyboardInterrupt
            yield result

    evaluate_checkpoint(model, tasks, whole, options())
    monkeypatch.setattr(engine.SharedPrefixLM, "_packed_scores", stopping)
    with pytest.raises(KeyboardInterrupt):
        evaluate_checkpoint(model, tasks, killed, options())
    [left] = killed.iterdir()
    left.write_text(left.read_text() + '["half a li')
    evaluate_checkpoint(model, tasks, killed, options())
    assert asked == [asked[0], asked[0] - 7]
    assert same_content(killed, whole)
    assert [path.name for path in killed.glob(".*")] == [FILES]


def test_a_keep_set_gives_the_numbers_of_the_pruned_checkpoint(model: Path, tasks: list[Task], keep_set: KeepSet,
                                                               tmp_path: Path) -> None:
    prune_checkpoint(str(model), keep_set, tmp_path / "pruned")
    evaluate_checkpoint(tmp_path / "pruned", tasks, tmp_path / "a", options())
    evaluate_keep_set(str(model), tasks, keep_set, tmp_path / "b", options())
    evaluate_checkpoint(model, tasks, tmp_path / "c", options())
    assert same_content(tmp_path / "a", tmp_path / "b")
    assert not same_content(tmp_path / "a", tmp_path / "c")


def test_keep_set_on_the_command_line(model: Path, tasks: list[Task], keep_set: KeepSet, tmp_path: Path) -> None:
    keep_set.save(tmp_path / "selection.json")
    result = invoke("-m", str(model), "-t", tasks[0].name, "--limit", "2", "--out", str(tmp_path / "out"),
                    "--keep-set", str(tmp_path / "selection.json"))
    assert tasks[0].name in result.stdout
    [path] = (tmp_path / "out").glob("*-metrics.json")
    assert json.loads(path.read_text())["model_config"]["keep_set"]


@pytest.mark.parametrize("method", ["layerwise", "reap", "random"])
def test_sweep_of_keep_k_on_one_loaded_model(model: Path, tasks: list[Task], tmp_path: Path, method: str,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    loads, load = [], curve.load_engine
    monkeypatch.setattr(curve, "load_engine", lambda *args: loads.append(1) or load(*args))
    result = invoke("-m", str(model), "-t", tasks[0].name, "--limit", "4", "--out", str(tmp_path), "-n", "3",
                    "--sweep-keep-k", "3,full,6", "--method", method, "--json")
    points = json.loads(result.stdout)
    folder = tmp_path / f"sweep-{method}"
    assert [point["keep_k"] for point in points] == [3, 6, 9] and len(loads) == 1
    assert points[0]["size"] < points[1]["size"] < points[2]["size"]
    assert json.loads((folder / "curve.json").read_text()) == points
    assert (folder / "curve.png").read_bytes().startswith(b"\x89PNG")
    selection = KeepSet.load(folder / "keepk-3" / f"selection-{tasks[0].name}.json")
    prune_checkpoint(str(model), selection, tmp_path / "pruned")
    alone = evaluate_checkpoint(tmp_path / "pruned", tasks[:1], tmp_path / "alone", options(limit=4))
    assert points[0]["value"] == alone[tasks[0].name]["primary_score"]
    assert same_content(folder / "keepk-3", tmp_path / "alone")


def test_the_curve_as_text() -> None:
    text = curve.as_text([curve.Point("t", 8, 10**9, "acc_raw", 0.5, 0.1, 25),
                          curve.Point("t", 16, 2 * 10**9, "acc_raw", 1.0, 0.0, 25)])
    assert text.splitlines()[0] == "t (acc_raw, n = 25)" and "0.500 ± 0.100" in text
    assert "1,000.0 MB" in text and text.count("█") == 60


def test_samples_pick_documents(model: Path, tasks: list[Task], tmp_path: Path) -> None:
    name = tasks[0].name
    evaluate_checkpoint(model, tasks[:1], tmp_path / "first", options(limit=6))
    invoke("-m", str(model), "-t", name, "--samples", f"{name}=5,2", "--out", str(tmp_path / "some"))
    first, some = (predictions(tmp_path / folder) for folder in ("first", "some"))
    assert [line["doc_id"] for line in some] == [2, 5]
    assert [line["native_id"] for line in some] == [first[2]["native_id"], first[5]["native_id"]]


@pytest.mark.parametrize(("words", "message"), [
    ([], "a run directory, or --model and --task"),
    (["-m", "x", "-t", "demo", "--limit", "2", "--samples", "demo_harbor=1"], "exclude each other"),
    (["-m", "x", "-t", "demo", "--samples", "no_such_file"], "does not exist"),
    (["-m", "x", "-t", "demo", "--samples", "demo=a,b"], "neither"),
    (["-m", "x", "-m", "y", "-t", "demo", "--sweep-keep-k", "8"], "give one --model"),
])
def test_mistakes(words: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        invoke(*words)


def test_a_sample_that_does_not_exist(model: Path, tasks: list[Task], tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="numbered 0 to"):
        evaluate_checkpoint(model, tasks[:1], tmp_path, options(limit=None, samples={tasks[0].name: [0, 10**6]}))


def test_missing_data_is_named_before_the_model_is_looked_for(tmp_path: Path) -> None:
    with pytest.raises(DataMissingError):
        evaluate_checkpoint("no/such-model", get_tasks(["arc_easy"], data_dir=tmp_path), tmp_path / "out", options())


def test_a_row_longer_than_the_context_is_counted(model: Path, tasks: list[Task], tmp_path: Path) -> None:
    evaluate_checkpoint(model, tasks, tmp_path, options(max_length=24))
    for task in tasks:
        [path] = tmp_path.glob(f"task-{task.alias}-metrics.json")
        assert json.loads(path.read_text())["row_issues"] == {
            "longer_than_context": {"documents": LIMIT, "first": list(range(LIMIT))}}


def own_task(folder: Path, kind: str, rows: list[dict[str, Any]], **keys: Any) -> Task:
    """A user's task of these rows, all of them test documents."""
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    base = {"name": "own", "kind": kind, "data": {"test": "rows.jsonl"}, "text": "{{ q }}"}
    (folder / "own.yaml").write_text(json.dumps({**base, **keys}))
    return get_tasks([str(folder / "own.yaml")])[0]


@pytest.fixture
def short_model(model: Path, tmp_path: Path) -> Path:
    """The tiny EMO with a context of 64 tokens."""
    folder = tmp_path / "short"
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 64}))
    return folder


@pytest.mark.parametrize("asked", [64, 300])
def test_answers_as_long_as_the_context_are_refused_before_loading(
    short_model: Path, tmp_path: Path, asked: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "load_engine", lambda *args: pytest.fail("the model was loaded"))
    task = own_task(tmp_path, "generation", [{"q": "sun", "a": "moon"}], answer="{{ a }}", max_tokens=asked)
    with pytest.raises(SpecError, match=rf"own generates up to {asked} tokens.*64 \(the model's context\)"):
        evaluate_checkpoint(short_model, [task], tmp_path / "out", options())
    with pytest.raises(SpecError, match=r"16 \(--max-length\)"):
        evaluate_checkpoint(short_model, [task], tmp_path / "out", options(max_length=16))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("texts", [["", "sun and moon"], ["", ""], ["s", "m"]])
def test_empty_and_short_prompts_are_continued(short_model: Path, tmp_path: Path, texts: list[str]) -> None:
    task = own_task(tmp_path, "generation", [{"q": text, "a": "moon"} for text in texts], answer="{{ a }}",
                    max_tokens=63, stops=["never"])
    evaluate_checkpoint(short_model, [task], tmp_path / "out", options())
    assert [bool(line["model_output"][0]["continuation"]) for line in predictions(tmp_path / "out")] == [True] * 2


def test_an_answer_without_tokens_never_wins_and_is_said(short_model: Path, tmp_path: Path,
                                                         capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"q": "the sun", "options": ["moon", ""], "right": 0}, {"q": "the sun", "options": ["", ""], "right": 0}]
    task = own_task(tmp_path, "multiple_choice", rows, choices="options", gold="{{ right }}")
    tokenizer = json.loads((short_model / "tokenizer.json").read_text())
    tokenizer["normalizer"] = {"type": "Strip", "strip_left": False, "strip_right": True}
    (short_model / "tokenizer.json").write_text(json.dumps(tokenizer))
    evaluate_checkpoint(short_model, [task], tmp_path / "out", options())
    first, second = (line["metrics"] for line in predictions(tmp_path / "out"))
    assert (first["predicted_index_raw"], first["acc_raw"]) == (0, 1)
    assert (second["predicted_index_raw"], second["acc_raw"], second["sum_logits_corr"]) == (None, 0, None)
    assert "own: 2 of 2 documents have an answer without a token of its own" in capsys.readouterr().err


def test_every_printed_score_names_metric_error_and_count(model: Path, tasks: list[Task], tmp_path: Path) -> None:
    printed = invoke("-m", str(model), "-t", tasks[0].name, "--limit", "6", "--out", str(tmp_path)).stdout
    assert re.search(rf"{tasks[0].name} +{tasks[0].headline_metric} 0\.\d{{4}} ± 0\.\d{{4}} \(n = 6\)", printed)
    data = json.loads(invoke("-m", str(model), "-t", tasks[0].name, "--limit", "6", "--out", str(tmp_path),
                             "--json").stdout)[str(model)][tasks[0].name]
    assert (data["metric"], data["documents"]) == (tasks[0].headline_metric, 6)
    assert data["value"] == data["metrics"][data["metric"]] and data["standard_error"] is not None


def test_tables_show_evaluations_and_measure_drops_against_them(model: Path, tasks: list[Task], keep_set: KeepSet,
                                                               tmp_path: Path) -> None:
    arguments = ("-m", str(model), "-t", tasks[0].name, "--output-dir", str(tmp_path))
    invoke(*arguments, "--limit", "6")
    invoke(*arguments, "--limit", "4", "--num-shots", "1")
    invoke(*arguments, "--limit", "6", "--sweep-keep-k", "3,6", "--method", "random")
    keep_set.save(tmp_path / "selection.json")
    invoke(*arguments, "--limit", "6", "--keep-set", str(tmp_path / "selection.json"))
    records = load_tree(tmp_path)
    [table], problems = make("summary", records, load_layout(), filters=Filters(models=(str(model),)))
    rows = {(row["keep-k"], row["method"], row["setting"]): row for row in table.records()}
    assert rows.keys() == {
        ("full", "as is", "first 6 documents"), ("full", "as is", "1-shot eval, first 4 documents"),
        (3, "random", "first 6 documents, masked"), (6, "random", "first 6 documents, masked")}
    assert rows["full", "as is", "first 6 documents"]["n"] == 6
    assert [problem.message for problem in problems if problem.kind == "evaluation"] == [
        "It is of a --keep-set; it has no row."]
