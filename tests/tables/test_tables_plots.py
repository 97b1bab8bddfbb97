"""Figures: what they show, that they are files of their kind, and that names are only text."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from table_trees import add_run, demo_tree

from emo_select.errors import UnknownNameError, UsageError
from emo_select.tables import load_layout, load_tree
from emo_select.tables.plots import pareto_front, plot

pytest.importorskip("matplotlib", reason="needs matplotlib: pip install 'emo-select[plots]'")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = demo_tree(tmp_path_factory.mktemp("plots"))
    for n in (1, 10):
        for seed in (0, 1):
            for task in ("demo_lookup", "demo_copy"):
                add_run(root, task=task, keep_k=4, calibration={"num_examples": n, "seed": seed})
    return root


def names(files: list[Path]) -> list[str]:
    return [file.name for file in files]


def test_every_kind_that_has_data_is_drawn_and_is_the_same_file_again(tree: Path, tmp_path: Path) -> None:
    records, layout = load_tree(tree), load_layout()
    files, problems = plot(records, layout, tmp_path / "one", formats=["svg"])
    assert names(files) == [f"{kind}-after.svg" for kind in ("keep-k", "methods", "calibration", "drops", "pareto")]
    assert [(problem.kind, problem.path) for problem in problems] == [
        ("not drawn", "keep-k"), ("not drawn", "methods"), ("not drawn", "drops")]  # numbers of calibration examples
    again, _ = plot(records, layout, tmp_path / "two", kinds=["drops"], formats=["svg"])
    assert again[0].read_bytes() == files[3].read_bytes()
    text = files[0].read_text()
    assert "demo/emo, layerwise" in text and "full model" in text and "weights (MB)" in text
    assert "keep-k 4" in files[2].read_text() and "all" in files[2].read_text()


@pytest.mark.parametrize(("suffix", "start"), [("png", b"\x89PNG"), ("pdf", b"%PDF"), ("svg", b"<?xml")])
def test_formats(tree: Path, tmp_path: Path, suffix: str, start: bytes) -> None:
    [file], _ = plot(load_tree(tree), load_layout(), tmp_path, kinds=["pareto"], formats=[suffix], stage="before")
    assert file.name == f"pareto-before.{suffix}" and file.read_bytes().startswith(start)


def test_names_with_markup_and_formulas_are_plain_text(tmp_path: Path) -> None:
    for keep_k in (4, 8, 16):
        add_run(tmp_path / "tree", task="_$x^{_<b>&", keep_k=keep_k)
    [file], _ = plot(load_tree(tmp_path / "tree"), load_layout(), tmp_path, kinds=["keep-k"], formats=["svg"])
    assert "_$x^{_&lt;b&gt;&amp;" in file.read_text()


def test_a_kind_without_data_or_of_no_name_is_an_error(tmp_path: Path) -> None:
    add_run(tmp_path, keep_k=4)
    records = load_tree(tmp_path)
    with pytest.raises(UsageError, match="nothing to show"):
        plot(records, load_layout(), tmp_path, kinds=["keep-k"])
    with pytest.raises(UnknownNameError, match="keep-k"):
        plot(records, load_layout(), tmp_path, kinds=["keepk"])


def test_every_setting_is_a_series_of_its_own(tmp_path: Path) -> None:
    """One finished run of the default recipe must not hide the runs of other settings."""
    add_run(tmp_path / "tree", keep_k=8)
    for lora in ({}, {"rank": 8}):
        for keep_k in (4, 8, 16):
            add_run(tmp_path / "tree", keep_k=keep_k, training={"lora": lora})
    files, problems = plot(load_tree(tmp_path / "tree"), load_layout(), tmp_path / "out", formats=["svg"])
    assert names(files) == [f"{kind}-after.svg" for kind in ("keep-k", "drops", "pareto")]
    for file in (files[0], files[2]):
        text = file.read_text()
        assert all(f"demo/emo, {name}" in text for name in ("layerwise", "layerwise, LoRA", "layerwise, LoRA rank 8"))
    assert {problem.path: problem.message for problem in problems} == {
        "methods": "It needs runs of two methods on the same model and tasks.",
        "calibration": "It needs runs with a number of calibration examples.",
        "drops": "3 settings beside each model's first one: see the report."}


def test_series_differ_in_colour_marker_or_dash(tree: Path) -> None:
    from emo_select.tables.plots import _view

    view, _ = _view(load_tree(tree), load_layout(), None)
    looks = [(view.colour(s.model, s.note()), *map(str, view.mark(s.method, s.note()).values()))
             for s in {replace(row.setting, keep_k=1) for row in view.rows}]
    assert len(set(looks)) == len(looks) >= 6


def test_a_stage_that_few_settings_have_is_not_chosen_and_never_silent(tmp_path: Path) -> None:
    for keep_k in (2, 4, 8):
        add_run(tmp_path / "tree", keep_k=keep_k, trained=keep_k == 2)
    records = load_tree(tmp_path / "tree")
    files, _ = plot(records, load_layout(), tmp_path / "out", formats=["svg"])
    assert names(files)[0] == "keep-k-before.svg"
    with pytest.raises(UsageError, match="2 settings with a value before finetuning only; --stage before draws them"):
        plot(records, load_layout(), tmp_path / "out", stage="after")


def test_front_keeps_what_nothing_smaller_or_equal_beats() -> None:
    assert pareto_front([(3, 5), (1, 2), (2, 2), (1, 1), (4, 4), (5, 6)]) == [(1, 2), (3, 5), (5, 6)]
