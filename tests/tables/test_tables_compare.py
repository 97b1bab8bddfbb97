"""Comparisons document by document."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from table_trees import add_run, demo_tree

from emo_select.errors import UsageError
from emo_select.tables import load_layout
from emo_select.tables.compare import (
    COLUMNS,
    Options,
    compare,
    comparison_tables,
    flips_table,
    keep_set_overlap,
    paired_bootstrap,
)
from emo_select.tables.selection import keep_set_of
from emo_select.tree import RunPaths

BEFORE = Options(checkpoint="first")


def test_two_runs_flip_the_documents_that_only_one_answers(tmp_path: Path) -> None:
    small = add_run(tmp_path, keep_k=4, docs=48).directory
    large = add_run(tmp_path, keep_k=8, docs=48).directory
    [found], problems = compare(str(small), str(large), options=BEFORE)
    # right where doc % 16 < keep-k - 1: documents 3..6 of each 16 are won by the larger one
    assert problems == [] and (found.gained, found.lost, found.changed, found.docs) == (12, 0, 12, 48)
    assert (found.a, found.b) == (9 / 48, 21 / 48)
    assert [flip.before.doc for flip in found.flips] == [3, 4, 5, 6, 19, 20, 21, 22, 35, 36, 37, 38]
    assert found.low < 12 / 48 < found.high and found.low > 0
    assert flips_table([found]).rows[0][2:] == [3, "id-3", 1, 0, 1, 0.0, 1.0]


def test_overlap_is_the_mean_jaccard_index_over_layers(tmp_path: Path) -> None:
    a, b = (add_run(tmp_path, keep_k=8, method=method).directory for method in ("layerwise", "random"))
    one, other = keep_set_of(a), keep_set_of(b)
    assert one and other and one.experts == 16
    wanted = np.mean([len(set(x or ()) & set(y or ())) / len(set(x or ()) | set(y or ()))
                      for x, y in zip(one.kept, other.kept, strict=True)])
    assert keep_set_overlap(a, b) == pytest.approx(wanted) and keep_set_overlap(a, a) == 1
    assert keep_set_overlap(a, tmp_path) is None


def test_bootstrap_by_counts_has_the_distribution_of_plain_resampling() -> None:
    """Mean and spread against a bootstrap that draws indices; 20,000 draws put both within 2 %."""
    rng = np.random.default_rng(1)
    difference = rng.choice([-1.0, 0.0, 0.0, 1.0, 1.0, 0.5], size=200)
    ours = paired_bootstrap(difference, 20_000, seed=0)
    plain = difference[rng.integers(200, size=(20_000, 200))].mean(axis=1)
    assert ours.mean() == pytest.approx(plain.mean(), abs=0.002)
    assert ours.std() == pytest.approx(plain.std(), rel=0.02)
    assert np.quantile(ours, [0.025, 0.975]) == pytest.approx(np.quantile(plain, [0.025, 0.975]), abs=0.005)


def test_two_models_pair_their_settings_and_average_their_groups(tmp_path: Path) -> None:
    root = demo_tree(tmp_path)
    found, problems = compare("demo/emo", "demo/stdmoe", str(root), BEFORE)
    assert len(found) == 2 * (1 + 2 * 2) and problems == []
    [table] = comparison_tables(found, load_layout(), BEFORE)
    means = [row for row in table.rows if str(row[2]).startswith("mean of demo (2)")]
    assert len(means) == 5 and all(row[9] == 0 and row[10] == 0 for row in means)  # equal models


def test_two_trees_pair_equal_runs_and_name_those_without_predictions(tmp_path: Path) -> None:
    one, other = (demo_tree(tmp_path / name, models=["demo/emo"]) for name in ("one", "other"))
    lost = next((other / "demoemo").glob("demo_copy_keepk_4*random/results/checkpoint-0/*predictions.jsonl"))
    lost.unlink()
    found, problems = compare(str(one), str(other), options=BEFORE)
    assert len(found) == 9 and [problem.kind for problem in problems] == ["no comparison"]
    assert "no predictions" in problems[0].message


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    paths = add_run(tmp_path, keep_k=4)
    file = next(paths.result(0).glob("*predictions.jsonl"))
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines[:6], "{", *lines[7:]]))
    other = add_run(tmp_path, keep_k=8)
    with pytest.raises(UsageError, match=rf"{file.name}, line 7"):
        compare(str(paths.directory), str(other.directory), options=BEFORE)


def rewritten(folder: Path, change: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]) -> None:
    """Replace the predictions before finetuning."""
    file = next(RunPaths(folder).result(0).glob("*predictions.jsonl"))
    lines = change([json.loads(line) for line in file.read_text().splitlines()])
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def another_order(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**line, "doc_id": place} for place, line in enumerate(lines[::-1])]


@pytest.mark.parametrize("asked", [False, True])
def test_the_same_answers_in_another_order_are_the_same(tmp_path: Path, asked: bool) -> None:
    runs = [add_run(tmp_path / name, keep_k=8).directory for name in ("one", "other")]
    if asked:  # ids say nothing, the hash of the question does
        for run in runs:
            rewritten(run, lambda lines: [{**line, "native_id": -1, "question_hash": f"{line['doc_id'] // 2:016x}"}
                                          for line in lines])
    rewritten(runs[1], another_order)
    [found], problems = compare(*map(str, runs), options=BEFORE)
    if asked:  # every question stands there twice: the n-th ones belong together
        assert found.docs == 40 and problems == []
    else:
        assert (found.docs, found.gained, found.lost, found.changed, problems) == (40, 0, 0, 0, [])


def test_documents_of_one_side_only_are_counted_and_none_in_common_is_refused(tmp_path: Path) -> None:
    a, b = (add_run(tmp_path, keep_k=keep_k).directory for keep_k in (4, 8))
    rewritten(b, lambda lines: lines[10:])
    [found], [problem] = compare(str(a), str(b), options=BEFORE)
    assert found.docs == 30 and "30 documents are on both sides, of 40 in A and 30 in B" in problem.message
    rewritten(b, lambda lines: [{**line, "native_id": f"other-{line['doc_id']}"} for line in lines])
    with pytest.raises(UsageError, match="share no document: none of 40 and 30 questions is the same"):
        compare(str(a), str(b), options=BEFORE)


def test_files_that_do_not_say_which_document_is_which_pair_by_position_where_labels_agree(tmp_path: Path) -> None:
    a, b = (add_run(tmp_path, keep_k=keep_k).directory for keep_k in (4, 8))
    for run in (a, b):
        rewritten(run, lambda lines: [{**line, "native_id": -1} for line in lines])
    rewritten(b, lambda lines: [{**line, "label": line["doc_id"] % 2} for line in lines])
    [found], problems = compare(str(a), str(b), options=BEFORE)
    assert found.docs == 20 and [problem.kind for problem in problems] == ["unmatched", "pairing"]


def test_experts_of_two_models_have_no_overlap(tmp_path: Path) -> None:
    root = demo_tree(tmp_path)
    models, _ = compare("demo/emo", "demo/stdmoe", str(root), BEFORE)
    assert {one.overlap for one in models} == {None}


def test_the_metric_is_the_headline_and_both_sides_have_errors(tmp_path: Path) -> None:
    a, b = (add_run(tmp_path, task="arc_easy_merged", keep_k=keep_k).directory for keep_k in (4, 8))
    for run in (a, b):
        file = next(RunPaths(run).result(0).glob("*metrics.json"))
        content = json.loads(file.read_text())
        content["task_config"]["primary_metric"] = "acc_per_char"
        file.write_text(json.dumps(content))
    [found], _ = compare(str(a), str(b), options=BEFORE)
    row = dict(zip(COLUMNS, found.cells(load_layout()), strict=True))
    assert row["metric"] == "acc_raw" and row["± A"] == pytest.approx(np.std([1] * 9 + [0] * 31, ddof=1) / 40**0.5)


def test_nothing_in_common_or_an_unknown_name_is_an_error(tmp_path: Path) -> None:
    a = add_run(tmp_path, task="demo_lookup", keep_k=4).directory
    b = add_run(tmp_path, task="demo_copy", keep_k=4).directory
    with pytest.raises(UsageError, match="no run in common"):
        compare(str(a), str(b))
    with pytest.raises(UsageError, match="demo/emo"):
        compare(str(a), "demo/other", str(tmp_path))
