"""Figures 3, 4, 11, 12 and 13 of the paper in its colours, from the numbers of `tables.paper`.

Columns are benchmarks, the upper row is before finetuning, the lower one after. A number that is missing is not drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emo_select.errors import UnknownNameError, UsageError
from emo_select.figures import STYLE, matplotlib, new_figure, save_all
from emo_select.tables import paper
from emo_select.tables.main import Checkpoint
from emo_select.tables.paper import KEEP_KS, Line, PaperSource, Value
from emo_select.tables.read import Problem

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

EMO = dict(zip((128, 64, 32, 16, 8), ("#3F1052", "#6E1F73", "#B8327C", "#E48AB5", "#F2C7DC"), strict=True))
STANDARD = dict(zip((128, 64, 32, 16, 8), ("#225C2E", "#5B8E3F", "#93C265", "#C5DD93", "#E4EFC8"), strict=True))
SINGLE = {paper.DENSE_130B: "#E78532", paper.SMALL_130B: "#1F6E7C"}
NAMES = {paper.DENSE_130B: "Dense", paper.SMALL_130B: "MoE of 32 experts"}
WIDTH, PANEL = 7.0, 1.75  # inches
BAR = 0.38
BEHIND = {"facecolor": "white", "alpha": 0.75, "linewidth": 0, "pad": 0.4}  # of a number that stands before a bar
LOOK = {**STYLE, "font.size": 8, "axes.titlesize": 8.5, "axes.spines.top": False, "axes.spines.right": False,
        "axes.linewidth": 0.6, "legend.frameon": False, "lines.linewidth": 1.3, "lines.markersize": 4}
STAGES: tuple[tuple[str, Checkpoint], ...] = (("before finetuning", "first"), ("after finetuning", "last"))
DASHES = {"lw": "-", "ep": (0, (4, 1.5)), "rd": (0, (1, 1.2))}
MARKERS = {"lw": "o", "ep": "s", "rd": "^"}

Column = tuple[str, Value, str | None]
"""Title, number, and the group whose wins stand above EMO's bars."""
BENCHMARKS: tuple[Column, ...] = (("MMLU", paper.MMLU, "mmlu_merged"), ("MMLU-Pro", paper.MMLU_PRO, "mmlu_pro_merged"),
                                  ("GSM8K", paper.GSM8K, None))


def paper_plots(source: PaperSource, folder: Path, *, kinds: Sequence[str] = (),
                formats: Sequence[str] = ("pdf", "png"), published_wins: bool = False,
                ) -> tuple[list[Path], list[Problem]]:
    """Draw the wanted figures (`figure3` …; default: all that have data) into `folder`; returns files and problems.

    Raises `UsageError` without matplotlib, or where nothing that was asked for has data.
    """
    unknown = next((kind for kind in kinds if kind not in FIGURES), None)
    if unknown is not None:
        raise UnknownNameError("figure", unknown, FIGURES)
    problems = list(source.problems)
    wins = paper.Wins(source, problems, published_wins)
    drawn: dict[Path, Figure] = {}
    with matplotlib().rc_context(LOOK):
        for kind in kinds or FIGURES:
            figure = FIGURES[kind](source, wins)
            if figure is not None:
                drawn |= {folder / f"{kind}.{suffix}": figure for suffix in formats}
            elif kinds:
                raise UsageError(f"The tables hold nothing that {kind} shows.")
        files = save_all(drawn)
    if not files:
        raise UsageError("The tables hold none of the paper's models, so there is nothing to draw.")
    return files, list(dict.fromkeys(problems))


# ---- bars: what stays at each number of experts ----


def figure_3(source: PaperSource, wins: paper.Wins) -> Figure | None:
    """The 1T pair."""
    return _bar_figure(source, wins, [line for line in paper.main_lines() if "(1T)" in line.label], BENCHMARKS)


def figure_11(source: PaperSource, wins: paper.Wins) -> Figure | None:
    """The 130B models with the dense and the small MoE, which were trained at their size."""
    return _bar_figure(source, wins, [line for line in paper.main_lines() if "(130B)" in line.label], BENCHMARKS)


def figure_13(source: PaperSource, wins: paper.Wins) -> Figure | None:
    """The category "other" of MMLU and MMLU-Pro, all models."""
    names = ("MMLU other", "MMLU-Pro other")
    other: list[Column] = [(name, value, None) for name, (_, value) in zip(names, paper.OTHER, strict=True)]
    return _bar_figure(source, wins, [line for line in paper.main_lines() if "(1T)" in line.label], other,
                       second=[line for line in paper.main_lines() if "(130B)" in line.label])


def _bar_figure(source: PaperSource, wins: paper.Wins, lines: Sequence[Line], columns: Sequence[Column],
                second: Sequence[Line] = ()) -> Figure | None:
    panels = [(lines, column) for column in columns] + [(second, column) for column in columns if second]
    if not _has_values(source, [*lines, *second], columns):
        return None
    figure, axes = _grid(len(panels))
    for row, (stage, checkpoint) in zip(axes, STAGES, strict=True):
        for axis, (members, column) in zip(row, panels, strict=True):
            size = f" ({'1T' if members is lines else '130B'})\n" if second else " "
            _bars(axis, source, wins, members, column, checkpoint)
            axis.set_title(f"{column[0]}{size}{stage}")
    _bar_legend(figure, [*lines, *second])
    return figure


def _has_values(source: PaperSource, lines: Iterable[Line], columns: Sequence[Column]) -> bool:
    return any(source.value(checkpoint, value, (line.model, line.keep_k)) is not None
               for line in lines for _, value, _ in columns for _, checkpoint in STAGES)


def _bars(axis: Axes, source: PaperSource, wins: paper.Wins, lines: Sequence[Line], column: Column,
          checkpoint: Checkpoint) -> None:
    """Bars from all experts to few; the smaller baselines stand where their number of experts is."""
    _, value, group = column
    for line in lines:
        height = source.value(checkpoint, value, (line.model, line.keep_k))
        if height is None:
            continue
        place, width, colour = _place(line, any(other.model in SINGLE for other in lines))
        axis.bar(place, 100 * height, width, color=colour, edgecolor="#333333", linewidth=0.3)
        count = wins.count(checkpoint, group, line) if group else ""
        if count:
            axis.annotate(count, (place, 100 * height), xytext=(0, 1.5), textcoords="offset points", ha="center",
                          va="bottom", fontsize=5.5, color="#3F1052", bbox=BEHIND)
    axis.set_xticks(range(len(KEEP_KS)), [str(k) for k in reversed(KEEP_KS)])
    axis.set_xlabel("experts kept")
    axis.margins(y=0.12)


def _place(line: Line, crowded: bool) -> tuple[float, float, str]:
    """Where a bar stands, its width and colour."""
    width = BAR * 2 / 3 if crowded else BAR
    single = line.model in SINGLE
    experts = int(line.experts.split()[0]) if single else line.keep_k
    middle = list(reversed(KEEP_KS)).index(experts)
    slot = 1 if line.baselines else -1 if single else 0  # crowded: baseline, standard, EMO; else the last two
    shift = slot if crowded else slot - 0.5
    colour = SINGLE[line.model] if single else (EMO if line.baselines else STANDARD)[line.keep_k]
    return middle + shift * width, width, colour


def _bar_legend(figure: Figure, lines: Sequence[Line]) -> None:
    from matplotlib.patches import Patch

    shown = dict.fromkeys(line.model for line in lines if line.model in SINGLE)
    handles = [Patch(facecolor=STANDARD[64], label="Standard MoE"), Patch(facecolor=EMO[64], label="EMO"),
               *(Patch(facecolor=SINGLE[model], label=NAMES[model]) for model in shown)]
    names = [str(handle.get_label()) for handle in handles]
    figure.legend(handles, names, loc="outside lower center", ncols=len(handles), fontsize=7)


# ---- lines: methods and calibration sizes ----


def figure_4(source: PaperSource, wins: paper.Wins) -> Figure | None:
    """Three ways to choose experts, the 1T pair. With all experts kept, random selection is the full model."""
    series = [(f"{name}, {method}", model, short, colours[64])
              for name, model, colours in (("EMO", paper.EMO_1T, EMO), ("Standard MoE", paper.STANDARD_1T, STANDARD))
              for method, short in (("router", "lw"), ("Easy-EP", "ep"), ("random", "rd"))]

    def draw(axis: Axes, column: Column, checkpoint: Checkpoint) -> dict[str, Any]:
        handles: dict[str, Any] = {}
        for label, model, short, colour in series:
            points = [(k, source.value(checkpoint, column[1], (model, k), "lw" if (k, short) == (128, "rd") else short))
                      for k in KEEP_KS]
            handles |= _line(axis, points, label, color=colour, linestyle=DASHES[short], marker=MARKERS[short])
        axis.set_xscale("log", base=2)
        axis.set_xticks(KEEP_KS, [str(k) for k in KEEP_KS])
        axis.minorticks_off()
        axis.set_xlabel("experts kept")
        return handles

    return _line_figure(draw)


def figure_12(source: PaperSource, wins: paper.Wins) -> Figure | None:
    """EMO by the number of examples that experts are chosen from; dashes tell how many shots prompts have."""
    groups = {title: group for title, (_, group, _) in zip(("MMLU", "MMLU-Pro", "GSM8K"), paper.GROUPS, strict=True)}
    dashes = {"Router": ("", "-", "o"), "Router (0-shot)": (", 0-shot", DASHES["ep"], "s"),
              "Router (e0)": (", 0-shot evaluation", DASHES["rd"], "^")}

    def draw(axis: Axes, column: Column, checkpoint: Checkpoint) -> dict[str, Any]:
        handles: dict[str, Any] = {}
        for shots, (note, dash, marker) in dashes.items():
            row = f"({shots}) / {groups[column[0]]}"
            for k in (32, 16, 8):
                points = [(i, source.calibrated(checkpoint, row, f"keepk_{k} ({n})"))
                          for i, n in enumerate(paper.SIZES)]
                handles |= _line(axis, points, f"{k} experts{note}", color=EMO[k], linestyle=dash, marker=marker)
            full = source.calibrated(checkpoint, row, f"keepk_{paper.FULL} (All)")
            if full is not None:
                handles[f"all experts{note}"] = axis.axhline(100 * full, color=EMO[paper.FULL], linestyle=dash,
                                                             linewidth=0.9)
        axis.set_xticks(range(len(paper.SIZES)), [n.lower() for n in paper.SIZES])
        axis.set_xlabel("calibration examples")
        return handles

    return _line_figure(draw)


def _line_figure(draw: Callable[[Axes, Column, Checkpoint], dict[str, Any]]) -> Figure | None:
    figure, axes = _grid(len(BENCHMARKS))
    handles: dict[str, Any] = {}
    for row, (stage, checkpoint) in zip(axes, STAGES, strict=True):
        for axis, column in zip(row, BENCHMARKS, strict=True):
            handles |= draw(axis, column, checkpoint)
            axis.set_title(f"{column[0]} {stage}")
            axis.grid(axis="y", color="#e5e5e5", linewidth=0.5)
    if not handles:
        return None
    columns = min(4, len(handles))
    figure.set_figheight(figure.get_figheight() + 0.14 * -(-len(handles) // columns))
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=columns, fontsize=7)
    return figure


def _line(axis: Axes, points: Sequence[tuple[float, float | None]], label: str, **look: Any) -> dict[str, Any]:
    known = [(x, 100 * y) for x, y in points if y is not None]
    if not known:
        return {}
    return {label: axis.plot(*zip(*known, strict=True), markeredgecolor="white", markeredgewidth=0.4, **look)[0]}


def _grid(columns: int) -> tuple[Figure, Any]:
    figure = new_figure(max(WIDTH, 2.1 * columns), 2 * PANEL + 0.2)
    axes = figure.subplots(2, columns, squeeze=False)
    for row in axes:
        row[0].set_ylabel("accuracy (%)")
    return figure, axes


FIGURES: dict[str, Callable[[PaperSource, paper.Wins], Figure | None]] = {
    "figure3": figure_3, "figure4": figure_4, "figure11": figure_11, "figure12": figure_12, "figure13": figure_13,
}
