"""The default table and the results table, reading trees with records, labels, the cache, and all formats."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import typer
from table_trees import add_run, demo_tree
from typer.testing import CliRunner

from emo_select.cli import table as commands
from emo_select.errors import SpecError, UnknownNameError, UsageError
from emo_select.spec import RunSpec
from emo_select.storage import write_json
from emo_select.tables import Filters, Records, Table, load_layout, load_tree, make, render
from emo_select.tables.pool import Estimate, over_seeds, over_tasks
from emo_select.tables.summary import summarise
from emo_select.tables.words import other_settings


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return demo_tree(tmp_path_factory.mktemp("summary"))


def rows(records: Records, kind: str = "summary", **options: object) -> list[dict[str, object]]:
    tables, _ = make(kind, records, load_layout(), **options)  # type: ignore[arg-type]
    return [dict(row) for table in tables for row in table.records()]


def test_summary_has_averages_drops_sizes_and_errors(tree: Path) -> None:
    row = next(row for row in rows(load_tree(tree)) if row["keep-k"] == 4 and row["method"] == "random")
    # 40 documents, right where doc % 16 < keep-k - 1 before and < keep-k + 1 after finetuning, two equal tasks
    assert (row["model"], row["group"], row["tasks"], row["seeds"]) == ("demo/emo", "demo", "2/2", 1)
    assert (row["before"], row["after"]) == (pytest.approx(9 / 40), pytest.approx(15 / 40))
    assert row["drop before"] == pytest.approx(38 / 40 - 9 / 40)  # the full model was run as layerwise only
    assert row["± before"] == pytest.approx(math.sqrt(2 * 0.05**2) / 2)
    assert (row["disk GB"], row["memory GB"]) == (pytest.approx(0.001), pytest.approx(0.64))


def test_seeds_are_pooled_and_their_spread_enters_the_error(tmp_path: Path) -> None:
    for seed in (0, 1, 2):
        paths = add_run(tmp_path, keep_k=4, method="random", trained=False, calibration={"seed": seed})
        file = next(paths.result(0).glob("*metrics.json"))
        content = json.loads(file.read_text())
        content["metrics"] |= dict.fromkeys(("acc_raw", "primary_score"), 0.3 + seed / 10)
        write_json(file, content)
    [row] = rows(load_tree(tmp_path))
    assert (row["seeds"], row["before"], row["after"]) == (3, pytest.approx(0.4), None)
    assert row["± before"] == pytest.approx(math.sqrt(0.05**2 + 0.01 / 3))


@pytest.mark.parametrize(("values", "expected"), [
    ([Estimate(0.2, 0.1), Estimate(0.4, 0.1)], Estimate(pytest.approx(0.3), pytest.approx(math.sqrt(0.01 + 0.01)), 2)),
    ([Estimate(0.2, None), Estimate(0.4, 0.1)], Estimate(pytest.approx(0.3), pytest.approx(0.1), 2)),
    ([Estimate(0.2, 0.1)], Estimate(0.2, 0.1, 1)),
])
def test_over_seeds(values: list[Estimate], expected: Estimate) -> None:
    assert over_seeds(values) == expected


def test_over_tasks_has_no_error_where_one_task_has_none() -> None:
    assert over_tasks([Estimate(0.2, 0.3), Estimate(0.4, 0.4)]) == Estimate(pytest.approx(0.3), pytest.approx(0.25), 1)
    assert over_tasks([Estimate(0.2, None), Estimate(0.4, 0.4)]).error is None


def test_an_incomplete_group_has_no_average_and_is_named(tree: Path, tmp_path: Path) -> None:
    shutil.copytree(tree, tmp_path / "tree")
    shutil.rmtree(next((tmp_path / "tree" / "demoemo").glob("demo_copy_keepk_8*layerwise")))
    found, problems = summarise(load_tree(tmp_path / "tree"), load_layout())
    row = next(row for row in found if row.setting.model == "demoemo" and row.setting.keep_k == 8
               and row.setting.method == "layerwise")
    assert (row.found, row.tasks, row.before, row.drop_before) == (1, 2, None, None)
    assert [problem.kind for problem in problems] == ["incomplete"] and "1 of 2" in problems[0].message


def test_full_model_is_known_from_the_keep_set_and_drop_is_empty_without_one(tmp_path: Path) -> None:
    add_run(tmp_path, keep_k=8)
    [row] = rows(load_tree(tmp_path))
    assert row["keep-k"] == 8 and row["drop before"] is None
    add_run(tmp_path, keep_k=16)
    assert {row["keep-k"] for row in rows(load_tree(tmp_path))} == {8, "full"}


def test_a_model_that_skips_selection_has_one_row_without_drop(tmp_path: Path) -> None:
    add_run(tmp_path, model="acme/dense", keep_k=1, selects=False)
    [row] = rows(load_tree(tmp_path))
    assert (row["model"], row["keep-k"], row["before"] is not None) == ("acme/dense", "full", True)


def test_other_settings_are_told_in_words(tmp_path: Path) -> None:
    for seed in (0, 1):
        add_run(tmp_path, keep_k=8, method="random", calibration={"seed": seed}, evaluation={"limit": 100},
                training={"freeze": "routed"})
    [row] = rows(load_tree(tmp_path))
    assert (row["setting"], row["seeds"]) == ("first 100 documents, freeze routed", 2)
    next((tmp_path / "demoemo").glob("*/run.json")).unlink()
    assert {str(row["setting"]).split()[0] for row in rows(load_tree(tmp_path))} == {"first", "variant"}


@pytest.mark.parametrize(("fields", "words"), [
    ({"training": {"lora": {}}}, "LoRA"), ({"training": {"lora": {"rank": 8, "merge": True}}}, "LoRA rank 8 merged"),
    ({"calibration": {"file": "/data/own.jsonl"}, "score": "gate_mass"}, "ranked by gate mass, texts of own.jsonl"),
    ({"calibration": {"leave_out_shots": True}, "method": "random"}, "without shot rows"),
    ({"training": {"weight_decay": 0.1}, "evaluation": {"max_length": 512}}, "inputs of 512 tokens, weight decay 0.1"),
    ({"training": {"loss_limit": 7.5}}, "training loss limit 7.5"), ({"calibration": {"num_examples": 3}}, None),
])
def test_settings_read_as_words(fields: dict[str, Any], words: str | None) -> None:
    assert other_settings(RunSpec.parse({"model": "a/b", "task": "t", "keep_k": 4, **fields})) == words


def test_a_model_evaluated_as_it_is_is_what_drops_are_measured_against(tmp_path: Path) -> None:
    paths = add_run(tmp_path, keep_k=8, trained=False)
    file = next(paths.result(0).glob("*metrics.json"))
    content = json.loads(file.read_text())
    content["task_config"] |= {"task_core": "demo_lookup", "num_shots": 0, "default_shots": 0}
    content |= {"metrics": {"acc_raw": 0.75, "primary_score": 0.75}, "model_config": {"model": "demo/emo"}}
    write_json(tmp_path / "demoemo" / "evaluations" / file.name, content)
    plain, pruned = rows(load_tree(tmp_path))
    assert (plain["method"], plain["keep-k"], plain["before"]) == ("as is", "full", 0.75)
    assert pruned["drop before"] == pytest.approx(0.75 - 21 / 40)
    [full, _] = rows(load_tree(tmp_path), "methods")
    assert (full["keep-k"], full["layerwise"]) == ("full", "0.750±.050")


def test_results_count_wins_on_shared_tasks_and_ties_for_both(tmp_path: Path) -> None:
    demo_tree(tmp_path, methods=["layerwise"], keep_ks=[16, 8])
    better = next((tmp_path / "demoemo").glob("demo_copy_keepk_8*")) / "results" / "checkpoint-0"
    file = next(better.glob("*metrics.json"))
    content = json.loads(file.read_text())
    content["metrics"] |= {"acc_raw": 0.9, "primary_score": 0.9}
    write_json(file, content)
    wins = {(r["stage"], r["keep-k"], r["model"]): (r["wins"], r["of"]) for r in rows(load_tree(tmp_path), "results")}
    assert wins["before", 8, "demo/emo"] == (2, 2) and wins["before", 8, "demo/stdmoe"] == (1, 2)
    assert wins["after", "full", "demo/emo"] == wins["after", "full", "demo/stdmoe"] == (2, 2)


def test_filters_by_id_folder_and_label_and_errors_name_near_matches(tree: Path) -> None:
    records, layout = load_tree(tree), load_layout()
    for name in ("demo/emo", "demoemo"):
        chosen = Filters(models=(name,), methods=("random",), keep_ks=(4,), groups=("demo",), tasks=("demo_copy",))
        assert [run.directory.split("/")[0] for run in chosen.apply(records, layout).runs] == ["demoemo"]
    with pytest.raises(UnknownNameError, match=r"demo/stdmoe|demostdmoe"):
        Filters(models=("demo/stdmo",)).apply(records, layout)
    with pytest.raises(UnknownNameError, match="primary_score"):
        make("summary", records, layout, metrics=["primary_scor"])


def test_a_filter_keeps_the_full_model_that_drops_are_measured_against(tree: Path) -> None:
    whole = {(row["model"], row["method"]): row for row in rows(load_tree(tree)) if row["keep-k"] == 4}
    for filters in (Filters(keep_ks=(4,)), Filters(keep_ks=(4,), methods=("random",))):
        found = rows(load_tree(tree), filters=filters)
        assert found and {row["keep-k"] for row in found} == {4}
        assert all(row == whole[row["model"], row["method"]] for row in found)


def test_models_come_in_the_order_asked(tree: Path) -> None:
    for names in (("demo/stdmoe", "demo/emo"), ("demo/emo", "demo/stdmoe")):
        for kind in ("summary", "methods", "results"):
            found = dict.fromkeys(row["model"] for row in rows(load_tree(tree), kind, filters=Filters(models=names)))
            assert tuple(found) == names, kind


def test_a_value_that_is_not_a_number_is_none_and_is_named(tmp_path: Path) -> None:
    for task, value in (("demo_lookup", float("nan")), ("demo_copy", 0.5)):
        file = next(add_run(tmp_path, task=task, keep_k=8, trained=False).result(0).glob("*metrics.json"))
        content = json.loads(file.read_text())
        content["metrics"] |= {"acc_raw": value, "primary_score": value}
        file.write_text(json.dumps(content))
    tables, problems = make("summary", load_tree(tmp_path), load_layout())
    [row] = tables[0].records()
    assert (row["tasks"], row["before"]) == ("1/2", None) and "nan" not in render(tables[0], "text")
    assert {problem.message for problem in problems} >= {
        "acc_raw is NaN: it has no value.", "demo has no average: 1 of 2 tasks are there."}


def test_a_group_that_stands_for_fewer_tasks_than_listed_is_named(tmp_path: Path) -> None:
    add_run(tmp_path, task="arc_easy_merged", keep_k=8)
    _, problems = make("summary", load_tree(tmp_path), load_layout())
    [partial] = [problem for problem in problems if problem.kind == "part of a group"]
    assert partial.path == "mc9" and partial.message.startswith("Its averages are over 1 of its 9 tasks; not here: arc")


def test_one_headline_metric_with_error_and_count_in_every_table(tmp_path: Path) -> None:
    add_run(tmp_path, task="arc_easy_merged", keep_k=8)  # its primary metric is acc_raw here; 40 documents
    records = load_tree(tmp_path)
    [summary], [methods] = rows(records), rows(records, "methods")
    assert (summary["metric"], summary["n"], methods["metric"], methods["n"]) == ("acc_raw", 40, "acc_raw", 40)
    assert methods["layerwise"] == f"{summary['before']:.3f}±.050 → {summary['after']:.3f}±.050"
    [before, _] = rows(records, "results")
    assert (before["mc9 (acc_raw)"], before["± mc9"], before["n"]) == (summary["before"], 0.05, 40)


def test_labels_rename_reorder_and_group(tree: Path, tmp_path: Path) -> None:
    labels = tmp_path / "labels.yaml"
    labels.write_text("models: {demo/stdmoe: Standard}\ngroups: {mine: {tasks: [demo_copy], label: copying}}\n"
                      "methods: {random: {label: Chance}}\n")
    layout = load_layout(labels)
    tables, _ = make("summary", load_tree(tree), layout)
    found = tables[0].records()
    assert found[0]["model"] == "Standard" and {row["group"] for row in found} == {"copying", "demo"}
    assert layout.method("random").label == "Chance" and layout.method("random").short == "rd"


@pytest.mark.parametrize(("text", "message"), [
    ("modles: {}", "models"), ("models: {a: {lable: x}}", "lable"), ("models: 3", "must map"), ("[", "not valid YAML"),
    ("- 1", "must be a mapping"),
])
def test_wrong_labels_are_one_sentence(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "labels.yaml"
    file.write_text(text)
    with pytest.raises((SpecError, UnknownNameError), match=message):
        load_layout(file)


def test_cache_is_used_until_a_file_changes_and_never_trusted_when_damaged(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shutil.copytree(tree, tmp_path / "tree")
    first = load_tree(tmp_path / "tree")
    [cache] = (tmp_path / "cache" / "emo-select").iterdir()
    metrics = next((tmp_path / "tree").rglob("*metrics.json"))
    before = metrics.stat()
    text = metrics.read_text()
    metrics.write_text(text.replace('"num_instances": 40', '"num_instances": 41'))
    os.utime(metrics, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert load_tree(tmp_path / "tree").runs == first.runs  # same size, same time stamp: the cache is believed
    os.utime(metrics)
    changed = load_tree(tmp_path / "tree").runs
    assert changed != first.runs and changed == load_tree(tmp_path / "tree", cached=False).runs
    cache.write_text('{"format": 2, "files": {')
    assert load_tree(tmp_path / "tree").runs == changed


def test_a_tree_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no run tree"):
        load_tree(tmp_path / "nothing")


def test_other_folders_and_damaged_records_are_named(tmp_path: Path) -> None:
    paths = add_run(tmp_path, keep_k=8)
    (tmp_path / "demoemo" / "notes").mkdir()
    (tmp_path / "demoemo" / "activations").mkdir()
    paths.record.write_text('{"spec": 1}')
    records = load_tree(tmp_path)
    assert {(problem.kind, problem.path.split("/")[1].split("_")[0]) for problem in records.problems} == {
        ("not a run", "notes"), ("run.json", "demo")}
    assert records.runs[0].setting.keep_k == 8


# ---- formats ----

CELLS = Table("t", ["a|b", "n", "x"], [["50% & _c_ | {d}", 3, 0.25], ["12", None, float("nan")]])


@pytest.mark.parametrize(("style", "text"), [
    ("csv", "a|b,n,x\n50% & _c_ | {d},3,0.2500\n12,,\n"),
    ("tsv", "a|b\tn\tx\n50% & _c_ | {d}\t3\t0.2500\n12\t\t\n"),
])
def test_separated(style: str, text: str) -> None:
    assert render(CELLS, style) == text


def test_markdown_and_latex_escape_what_would_break_a_row() -> None:
    markdown = render(CELLS, "markdown").splitlines()
    assert markdown[0].startswith("| a\\|b") and "\\| {d}" in markdown[2] and "| 12 " in markdown[3]
    latex = render(CELLS, "latex")
    assert "50\\% \\& \\_c\\_ | \\{d\\}" in latex and "\\toprule" in latex


def run(*arguments: str) -> tuple[int, str]:
    app = typer.Typer()
    app.callback()(lambda: None)
    commands.register(app)
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "300"})
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout


def test_command_prints_text_and_json(tree: Path) -> None:
    code, text = run("table", "-o", str(tree), "-m", "demo/emo", "-k", "4")
    assert code == 0 and text.splitlines()[0].split()[:3] == ["model", "keep-k", "method"]
    code, text = run("table", "results", "-o", str(tree), "--json")
    content = json.loads(text)
    assert code == 0 and content["problems"] == [] and content["tables"][0]["name"] == "results"
    code, text = run("table", "-o", str(tree), "--format", "latex")
    assert code == 0 and text.startswith("\\begin{tabular}")


def test_commands_plot_report_and_compare(tree: Path, tmp_path: Path) -> None:
    code, text = run("report", str(tmp_path / "r.html"), "-o", str(tree), "--title", "T", "--examples", "1")
    assert code == 0 and (tmp_path / "r.html").read_text().startswith("<!doctype html>")
    code, text = run("compare", "demo/emo", "demo/stdmoe", "-o", str(tree), "--json", "--before")
    assert code == 0 and json.loads(text)["tables"][0]["name"] == "comparison"
    pytest.importorskip("matplotlib")
    code, text = run("plot", "pareto", "-o", str(tree), "--to", str(tmp_path), "--format", "svg", "--stage", "before")
    assert code == 0 and text == f"{tmp_path}/pareto-before.svg\n"
