"""The paper's own tables (Tables 1 and 3, the numbers behind Figures 3, 4, 11, 12 and 13) from published table files.

Input are the main and calibration tables, as `table main` and `table calibration` or the published scripts write them.
Rows are found by the model and keep-k that their label stands for, whichever of its labels a file uses: the published
scripts look for labels that their own tables do not have, and leave those rows empty.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from emo_select.errors import UsageError
from emo_select.tables import calibration, main
from emo_select.tables.layout import Layout, load_layout
from emo_select.tables.main import CHECKPOINTS, Checkpoint
from emo_select.tables.pool import Filters
from emo_select.tables.read import Problem, Records
from emo_select.tables.write import Cell, Table, render

EMO_1T, STANDARD_1T = "allenaiEmo_1b14b_1T", "allenaiStdMoE_1b14b_1T"
EMO_130B, STANDARD_130B = "allenaiEmo_1b14b_130B", "allenaiStdMoE_1b14b_130B"
ANNEALED = "allenaiStdMoE_1b14b_1T_EmoAnnealed"
DENSE_130B, SMALL_130B, OLMOE = "allenaiDense_1b_130B", "allenaiStdMoE_1b4b_130B", "allenaiOLMoE-1B-7B-0924"
KEEP_KS = (8, 16, 32, 64, 128)
FULL = 128
OTHER_LABELS = {  # what the published paper scripts call these models
    STANDARD_130B: "moe", EMO_130B: "specialized moe + globallb + 1shardexp + randpool",
    ANNEALED: "moe 1T + twolevel anneal",
}
METRICS = ("acc_raw", "exact_match", "f1")
MAIN_FILES = ("acc_raw/aggregate", "acc_raw/mmlu_merged", "acc_raw/mmlu_pro_merged", "exact_match/gsm8k", "f1/gen5")

Model = tuple[str, int | None]
"""A model folder and a keep-k."""
Value = tuple[str, str]
"""A main table and a column of it, without the method."""

MC9: Value = ("acc_raw/aggregate", "mc9_avg")
GEN5: Value = ("f1/gen5", "gen5_avg")  # Table 1 is F1; the paper's appendix says recall
MMLU: Value = ("acc_raw/aggregate", "mmlu_merged_avg_no_other")
MMLU_PRO: Value = ("acc_raw/aggregate", "mmlu_pro_merged_avg_no_other")
GSM8K: Value = ("exact_match/gsm8k", "gsm8k_generation_8shot_merged")
STAGES: tuple[tuple[str, Checkpoint], ...] = (("inf", "first"), ("ft", "last"))


@dataclass(frozen=True)
class PaperSource:
    """The published tables as text cells.

    `main`: (checkpoint, table) -> (model, keep-k) -> column -> cell. `ablation`: checkpoint -> row label -> column ->
    cell.
    """

    layout: Layout
    main: dict[tuple[Checkpoint, str], dict[Model, dict[str, str]]]
    ablation: dict[Checkpoint, dict[str, dict[str, str]]]
    problems: list[Problem] = field(default_factory=list)

    def value(self, checkpoint: Checkpoint, value: Value, model: Model, method: str = "lw") -> float | None:
        """One number of the main tables, a share of 1; None where there is none."""
        table, column = value
        cell = self.main.get((checkpoint, table), {}).get(model, {}).get(f"{column} ({method})", "")
        return float(cell) if cell else None

    def calibrated(self, checkpoint: Checkpoint, row: str, column: str) -> float | None:
        """One number of the calibration table of EMO; `row` is `method / group`."""
        for label in _labels(EMO_1T, self.layout):
            cell = self.ablation.get(checkpoint, {}).get(f"{label} {row}", {}).get(column, "")
            if cell:
                return float(cell)
        return None

    def categories(self, group: str) -> list[Value]:
        """The averaged tasks of MMLU or MMLU-Pro."""
        found = self.layout.groups[group]
        return [(f"acc_raw/{group}", task) for task in found.tasks if task not in found.left_out]


def from_files(folder: str | Path) -> PaperSource:
    """Read the folders prune_eval_tables_final, nprune_ablation_tables, … below `folder` (CSV).

    Raises `UsageError` where none of the files is there or one is not such a table.
    """
    root = Path(folder)
    texts: dict[str, str] = {}
    for name in _file_names():
        file = root / f"{name}.csv"
        if file.is_file():
            texts[name] = _text(file)
    if not texts:
        raise UsageError(f"There is no table below {root}, such as {main.FOLDERS['last']}/{MAIN_FILES[0]}.csv; write "
                         f"them with: emo-select table main --format csv --checkpoint both --to {root}.")
    return _source(texts)


def from_records(records: Records, filters: Filters = Filters()) -> PaperSource:  # noqa: B008 - frozen
    """Make the tables from a tree of runs, in memory."""
    layout = load_layout()
    texts: dict[str, str] = {}
    for checkpoint in CHECKPOINTS:
        tables, _ = main.main_tables(records, layout, checkpoint=checkpoint, metrics=METRICS, published=True,
                                     filters=filters)
        sizes, _ = calibration.calibration_table(records, layout, checkpoint=checkpoint, published=True,
                                                 filters=filters)
        texts |= {f"{main.FOLDERS[checkpoint]}/{table.name}": render(table, "csv") for table in tables}
        texts |= {f"{calibration.FOLDERS[checkpoint]}/{table.name}": render(table, "csv") for table in sizes}
    return _source({name: text for name, text in texts.items() if name in set(_file_names())})


def paper_tables(source: PaperSource, *, published_wins: bool = False) -> tuple[list[Table], list[Problem]]:
    """The eight tables, cells as text: percent with one decimal, `wins/categories`, empty where a number is missing.

    A win is a category in which EMO is above every baseline of the same keep-k; categories with a gap do not count.
    Where a baseline is missing altogether there is no count; `published_wins` leaves such a baseline out, as the
    published script does, which then counts more wins.
    """
    problems = list(source.problems)
    wins = Wins(source, problems, published_wins)
    tables = [
        _general(source), _main(source, wins), _methods(source, "last"), _methods(source, "first"),
        _samples(source, "last"), _samples(source, "first"), _annealed(source), _other(source),
    ]
    return tables, list(dict.fromkeys(problems))


# ---- reading ----


def _file_names() -> Iterator[str]:
    for checkpoint in CHECKPOINTS:
        yield from (f"{main.FOLDERS[checkpoint]}/{name}" for name in MAIN_FILES)
        yield f"{calibration.FOLDERS[checkpoint]}/{calibration.NAME}"


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{file} cannot be read ({' '.join(str(error).split())}).") from None


def _source(texts: Mapping[str, str]) -> PaperSource:
    layout = load_layout()
    models = _model_of_label(layout)
    problems: list[Problem] = []
    cells: dict[tuple[Checkpoint, str], dict[Model, dict[str, str]]] = {}
    ablation: dict[Checkpoint, dict[str, dict[str, str]]] = {}
    for checkpoint in CHECKPOINTS:
        for name in MAIN_FILES:
            rows = _rows(f"{main.FOLDERS[checkpoint]}/{name}", texts, problems)
            cells[checkpoint, name] = {models[label]: row for label, row in reversed(rows.items()) if label in models}
        ablation[checkpoint] = _rows(f"{calibration.FOLDERS[checkpoint]}/{calibration.NAME}", texts, problems)
    return PaperSource(layout, cells, ablation, problems)


def _rows(name: str, texts: Mapping[str, str], problems: list[Problem]) -> dict[str, dict[str, str]]:
    """Row label -> column -> cell of one CSV; a missing file is a problem, a malformed one an error."""
    if name not in texts:
        problems.append(Problem("missing table", f"{name}.csv", "Its cells are empty."))
        return {}
    lines = list(csv.reader(io.StringIO(texts[name])))
    columns = lines[0][1:] if lines else []
    for number, line in enumerate(lines[1:], 2):
        if len(line) != len(columns) + 1 or not all(map(_is_number, line[1:])):
            raise UsageError(f"{name}.csv is not a table of numbers in line {number}; write it again.")
    return {line[0]: dict(zip(columns, line[1:], strict=True)) for line in lines[1:]}


def _is_number(cell: str) -> bool:
    try:
        return not cell or float(cell) == float(cell)
    except ValueError:
        return False


def _labels(model: str, layout: Layout) -> list[str]:
    return [layout.model(model), *([OTHER_LABELS[model]] if model in OTHER_LABELS else [])]


def _model_of_label(layout: Layout) -> dict[str, Model]:
    """Row label -> which model and keep-k it stands for."""
    found: dict[str, Model] = {}
    for row in main.published_rows(layout, Filters()):
        model, keep_k = row.setting.model, row.setting.keep_k
        for label in _labels(model, layout):
            found[row.label.replace(layout.model(model), label, 1)] = model, keep_k
    return found


# ---- the tables ----


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def _kept(keep_k: int) -> str:
    return f"{keep_k} (trained)" if keep_k == FULL else str(keep_k)


def _general(source: PaperSource) -> Table:
    """Table 1: full models before finetuning. There is no dense model of 1T tokens: its row is empty, as published."""
    rows: list[tuple[str, str, Model | None]] = [
        ("OLMoE^dagger", "5T", (OLMOE, None)), ("Dense", "1T", None), ("Reg. MoE", "1T", (STANDARD_1T, FULL)),
        ("FlexMoE (Ours)", "1T", (EMO_1T, FULL)), ("Dense", "130B", (DENSE_130B, 32)),
        ("Reg. MoE", "130B", (STANDARD_130B, FULL)), ("FlexMoE (Ours)", "130B", (EMO_130B, FULL)),
    ]
    values = (MC9, GEN5, MMLU, MMLU_PRO, GSM8K)
    body: list[list[Cell]] = [
        [label, tokens, *(_percent(source.value("first", value, model)) if model else "" for value in values)]
        for label, tokens, model in rows
    ]
    return Table("general_tasks_orig", ["", "# train tokens", "MC9", "Gen5", "MMLU", "MMLU Pro", "GSM8K"], body)


@dataclass(frozen=True)
class Line:
    """One of the 22 rows of the main results."""

    label: str
    experts: str
    model: str
    keep_k: int
    baselines: tuple[Model, ...] = ()
    """EMO's rows only: what it has to be above."""


def main_lines() -> list[Line]:
    """The rows of the main results: 130B models with the smaller baselines, then the 1T pair."""
    lines = [Line("Dense (130B)^dagger", "8 (trained)", DENSE_130B, 32),
             Line("Reg. MoE (130B)", "32 (trained)", SMALL_130B, 32)]
    for size, standard, emo in (("130B", STANDARD_130B, EMO_130B), ("1T", STANDARD_1T, EMO_1T)):
        lines += [Line(f"Reg. MoE ({size})", _kept(k), standard, k) for k in KEEP_KS]
        lines += [Line(f"FlexMoE ({size})", _kept(k), emo, k, _baselines(emo, standard, k)) for k in KEEP_KS]
    return lines


def _baselines(emo: str, standard: str, keep_k: int) -> tuple[Model, ...]:
    smaller = {8: DENSE_130B, 32: SMALL_130B}.get(keep_k) if emo == EMO_130B else None
    return (standard, keep_k), *([(smaller, 32)] if smaller else [])


def _main(source: PaperSource, wins: Wins) -> Table:
    """Figures 3 and 11."""
    values = (("MMLU", MMLU), ("MMLU Pro", MMLU_PRO), ("GSM8K", GSM8K))
    counted = (("MMLU", "mmlu_merged"), ("MMLU Pro", "mmlu_pro_merged"))
    columns = ["", "# Total Experts", *(f"{name} ({stage})" for stage, _ in STAGES for name, _ in values),
               *(f"{name} winrate vs Reg. MoE ({stage})" for stage, _ in STAGES for name, _ in counted)]
    body: list[list[Cell]] = [
        [line.label, line.experts,
         *(_percent(source.value(checkpoint, value, (line.model, line.keep_k)))
           for _, checkpoint in STAGES for _, value in values),
         *(wins.count(checkpoint, group, line) for _, checkpoint in STAGES for _, group in counted)]
        for line in main_lines()
    ]
    return Table("main_results_table", columns, body)


@dataclass
class Wins:
    """Counts the categories that EMO wins, and notes what keeps it from counting."""

    source: PaperSource
    problems: list[Problem]
    published: bool

    def count(self, checkpoint: Checkpoint, group: str, line: Line) -> str:
        """`wins/categories`, empty for rows that are baselines themselves or have nothing to compare."""
        own, *others = (self._values(checkpoint, group, model)
                        for model in ((line.model, line.keep_k), *line.baselines))
        missing = [not any(v is not None for v in values) for values in others]
        if not others or not any(v is not None for v in own) or all(missing):
            return ""
        if any(missing) and not self.published:
            name = f"{line.label}, {line.experts} experts"
            self.problems.append(Problem("no win count", name, f"A baseline has no {group} ({checkpoint} checkpoint)."))
            return ""
        present = [values for values, gone in zip(others, missing, strict=True) if not gone]
        full = [row for row in zip(own, *present, strict=True) if None not in row]
        won = sum(row[0] > max(row[1:]) for row in full)
        return f"{won}/{len(full)}"

    def _values(self, checkpoint: Checkpoint, group: str, model: Model) -> list[float | None]:
        return [self.source.value(checkpoint, value, model) for value in self.source.categories(group)]


METHODS = (("Random", "rd"), ("Router", "lw"), ("Easy-EP", "ep"))
GROUPS = (("MMLU", "mmlu_merged", MMLU), ("MMLU Pro", "mmlu_pro_merged", MMLU_PRO), ("GSM8K", "gsm8k", GSM8K))


def _suffix(checkpoint: Checkpoint) -> str:
    return "_ckpt0" if checkpoint == "first" else ""


def _methods(source: PaperSource, checkpoint: Checkpoint) -> Table:
    """Figure 4."""
    columns = ["", "# Total Experts", *(f"{name} {method}" for name, _, _ in GROUPS for method, _ in METHODS)]
    body: list[list[Cell]] = [
        [label, _kept(k), *(_percent(source.value(checkpoint, value, (model, k), short))
                            for _, _, value in GROUPS for _, short in METHODS)]
        for label, model in (("Reg. MoE", STANDARD_1T), ("FlexMoE", EMO_1T)) for k in KEEP_KS
    ]
    return Table(f"expert_selection_method{_suffix(checkpoint)}", columns, body)


SHOTS = ("Router", "Router (0-shot)", "Router (e0)")
SIZES = ("1", "5", "10", "100", "All")


def _samples(source: PaperSource, checkpoint: Checkpoint) -> Table:
    """Figure 12."""
    cells = [*((k, n) for k in (8, 16, 32) for n in SIZES), (FULL, "All")]
    body: list[list[Cell]] = [
        ["FlexMoE", shots, name,
         *(_percent(source.calibrated(checkpoint, f"({shots}) / {group}", f"keepk_{k} ({n})")) for k, n in cells)]
        for shots in SHOTS for name, group, _ in GROUPS
    ]
    return Table(f"validation_sample_ablation{_suffix(checkpoint)}",
                 ["Model", "Prunemode", "Task", *(f"{k} Experts ({n})" for k, n in cells)], body)


def _annealed(source: PaperSource) -> Table:
    """Table 3: a standard MoE annealed with EMO's objective beside EMO."""
    values = (("MMLU", MMLU), ("MMLU-Pro", MMLU_PRO), ("GSM8K", GSM8K))
    rows = [(label, model, k) for label, model in (("ModMoE-anneal", ANNEALED), ("ModMoE", EMO_1T)) for k in KEEP_KS]
    body: list[list[Cell]] = [
        [label, _kept(k), *(_percent(source.value(checkpoint, value, (model, k)))
                            for _, checkpoint in STAGES for _, value in values)]
        for label, model, k in rows
    ]
    return Table("modmoe_anneal_vs_modmoe",
                 ["", "# Experts", *(f"{name} ({stage})" for stage, _ in STAGES for name, _ in values)], body)


OTHER = tuple((name, (f"acc_raw/{group}", f"{group}_other"))
              for name, group in (("MMLU", "mmlu_merged"), ("MMLU Pro", "mmlu_pro_merged")))


def _other(source: PaperSource) -> Table:
    """Figure 13: the category "other", which no average contains. The published scripts draw it without a table."""
    body: list[list[Cell]] = [
        [line.label, line.experts, *(_percent(source.value(checkpoint, value, (line.model, line.keep_k)))
                                     for _, checkpoint in STAGES for _, value in OTHER)]
        for line in main_lines()
    ]
    columns = ["", "# Total Experts", *(f"{name} other ({stage})" for stage, _ in STAGES for name, _ in OTHER)]
    return Table("other_category", columns, body)
