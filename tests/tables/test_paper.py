"""The paper's tables byte for byte, from published table files and from a tree, and its figures."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from emo_select.cli.app import app
from emo_select.errors import UnknownNameError, UsageError
from emo_select.tables import load_layout, load_tree, make, render, write_tables
from emo_select.tables.paper import from_files, from_records, paper_tables
from emo_select.tables.paper_plots import paper_plots

GOLDEN = Path(__file__).parents[1] / "golden" / "paper_tables"
INPUT = GOLDEN / "input"
MMLU_AFTER = "prune_eval_tables_final/acc_raw/mmlu_merged.csv"


def as_csv(folder: Path, **options: bool) -> dict[str, str]:
    tables, _ = paper_tables(from_files(folder), **options)
    return {table.name: render(table, "csv") for table in tables}


def rows(text: str) -> list[list[str]]:
    return list(csv.reader(text.splitlines()))


def copied(tmp_path: Path, change: Callable[[list[list[str]]], list[list[str]]], file: str = MMLU_AFTER) -> Path:
    """The golden input with the rows of one file changed."""
    root = tmp_path / "input"
    shutil.copytree(INPUT, root)
    path = root / file
    with path.open("w", newline="") as out:
        csv.writer(out, lineterminator="\n").writerows(change(rows((INPUT / file).read_text())))
    return root


def test_tables_equal_what_the_authors_had() -> None:
    ours = as_csv(INPUT)
    theirs = {path.stem: path.read_text() for path in (GOLDEN / "labels_joined").glob("*.csv")}
    assert len(ours) == 8 and len(theirs) == 7
    assert [name for name, text in theirs.items() if ours[name] != text] == []


def test_the_labels_that_the_paper_scripts_look_for_give_the_same(tmp_path: Path) -> None:
    names = {"moe 130B": "moe", "specialized moe 130B": "specialized moe + globallb + 1shardexp + randpool",
             "moe 1T + emo-anneal": "moe 1T + twolevel anneal"}
    root = tmp_path / "input"
    shutil.copytree(INPUT, root)
    for path in root.glob("prune*/**/*.csv"):
        lines = path.read_text().splitlines()
        for old, new in names.items():
            lines = [new + line[len(old):] if line.startswith(f"{old} (keepk") else line for line in lines]
        path.write_text("\n".join(lines) + "\n")
    assert as_csv(root) == as_csv(INPUT)


def test_the_other_category_is_that_of_the_main_tables() -> None:
    found = {(row[0], row[1]): row[2:] for row in rows(as_csv(INPUT)["other_category"])}
    label = "specialized moe 1T + anneal (keepk 8)"
    [source] = [row for row in rows((INPUT / MMLU_AFTER).read_text()) if row[0] == label]
    column = rows((INPUT / MMLU_AFTER).read_text())[0].index("mmlu_merged_other (lw)")
    assert found["", "# Total Experts"][2] == "MMLU other (ft)"
    assert found["FlexMoE (1T)", "8"][2] == f"{100 * float(source[column]):.1f}"


def test_a_baseline_without_a_number_leaves_no_win_count(tmp_path: Path) -> None:
    def without_dense(table: list[list[str]]) -> list[list[str]]:
        return [[row[0], *("" for _ in row[1:])] if row[0] == "dense" else row for row in table]

    root = copied(tmp_path, without_dense)

    def wins(text: str) -> str:
        return next(row[10] for row in rows(text) if row[:2] == ["FlexMoE (130B)", "8"])

    tables, problems = paper_tables(from_files(root))
    honest = next(render(table, "csv") for table in tables if table.name == "main_results_table")
    assert wins(honest) == "" and [p.kind for p in problems] == ["no win count"]
    assert "FlexMoE (130B), 8 experts" in problems[0].path
    # the published script goes on with the other baseline alone
    published = wins(as_csv(root, published_wins=True)["main_results_table"])
    assert published == "6/14" and wins((GOLDEN / "labels_joined/main_results_table.csv").read_text()) == "5/14"


def test_a_tie_is_no_win_and_a_gap_does_not_count(tmp_path: Path) -> None:
    def change(table: list[list[str]]) -> list[list[str]]:
        head = table[0]
        own = next(row for row in table if row[0] == "specialized moe 1T + anneal (keepk 8)")
        base = next(row for row in table if row[0] == "moe 1T + anneal (keepk 8)")
        places = [i for i, name in enumerate(head) if name.endswith("(lw)")]
        for i in places:
            own[i], base[i] = "0.5000", "0.5000"
        own[head.index("mmlu_merged_law (lw)")] = "0.5001"
        own[head.index("mmlu_merged_math (lw)")] = ""
        own[head.index("mmlu_merged_other (lw)")] = "0.9000"
        return table

    found = rows(as_csv(copied(tmp_path, change))["main_results_table"])
    assert next(row for row in found if row[:2] == ["FlexMoE (1T)", "8"])[10] == "1/15"


def test_a_tree_gives_what_its_tables_give(golden_trees: dict[str, Path], tmp_path: Path) -> None:
    records = load_tree(golden_trees["main"])
    for kind in ("main", "calibration"):
        tables, _ = make(kind, records, load_layout(), rows="published", checkpoints=("last", "first"))
        write_tables(tables, tmp_path, "csv")
    ours = {table.name: render(table, "csv") for table in paper_tables(from_records(records))[0]}
    assert ours == as_csv(tmp_path)
    filled = [cell for text in ours.values() for row in rows(text)[1:] for cell in row[3:] if cell]
    assert len(filled) > 100


def test_bad_folders_and_files_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="There is no table below"):
        from_files(tmp_path)
    root = copied(tmp_path, lambda table: [*table, ["dense", "0.1"]])
    with pytest.raises(UsageError, match=r"mmlu_merged\.csv is not a table of numbers in line 41"):
        from_files(root)
    (root / MMLU_AFTER).unlink()
    tables, problems = paper_tables(from_files(root))
    assert [p.path for p in problems] == [MMLU_AFTER]
    main = next(table for table in tables if table.name == "main_results_table")
    assert all(row[10] == "" for row in main.rows) and any(row[8] for row in main.rows)


def test_command_writes_the_files(tmp_path: Path) -> None:
    arguments = ["table", "paper", "--tables", str(INPUT), "--format", "csv", "--to", str(tmp_path)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    theirs = {path.name: path.read_bytes() for path in (GOLDEN / "labels_joined").iterdir()}
    assert {name: (tmp_path / name).read_bytes() for name in theirs} == theirs


# ---- figures ----


def test_figures_are_drawn_in_the_papers_colours_and_are_the_same_files_again(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install 'emo-select[plots]'")
    files, problems = paper_plots(from_files(INPUT), tmp_path / "one", formats=["svg"])
    assert [file.name for file in files] == [f"figure{n}.svg" for n in (3, 4, 11, 12, 13)] and problems == []
    three, four, eleven = (files[i].read_text().lower() for i in (0, 1, 2))
    assert all(colour in three for colour in ("#3f1052", "#f2c7dc", "#225c2e", "#e4efc8"))
    assert "#e78532" not in three and "#e78532" in eleven and "#1f6e7c" in eleven
    assert "11/16" in three and "6/16" in eleven and "easy-ep" in four
    again, _ = paper_plots(from_files(INPUT), tmp_path / "two", kinds=["figure4"], formats=["svg"])
    assert again[0].read_bytes() == files[1].read_bytes()


def test_figures_without_numbers_or_of_no_name_are_errors(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install 'emo-select[plots]'")
    root = tmp_path / "only_olmoe"
    path = root / MMLU_AFTER
    path.parent.mkdir(parents=True)
    path.write_text("model,mmlu_merged_law (lw)\nolmoe_1b_7b,0.5\n")
    with pytest.raises(UsageError, match="none of the paper's models"):
        paper_plots(from_files(root), tmp_path)
    with pytest.raises(UsageError, match="figure3"):
        paper_plots(from_files(root), tmp_path, kinds=["figure3"])
    with pytest.raises(UnknownNameError, match="figure11"):
        paper_plots(from_files(INPUT), tmp_path, kinds=["figure1"])
