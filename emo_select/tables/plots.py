"""Figures about a tree, at the width of a paper's column pair: vector and PNG, readable without colour.

Colours are Okabe and Ito's (2008), which people with any common colour blindness can tell apart: one per model and
setting. Each method has a marker, each method and setting a dash. Bands and bars are 95 % intervals from the standard
errors of the summary. What a figure does not show is said, as a `Problem` of the kind "not drawn".
"""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal

from emo_select import figures
from emo_select.errors import UnknownNameError, UsageError
from emo_select.figures import matplotlib, new_figure, plain, save_all
from emo_select.tables.layout import Layout
from emo_select.tables.pool import Estimate, pool, results_of
from emo_select.tables.read import Problem, Records, Setting
from emo_select.tables.summary import SummaryRow, experts_of, is_full, summarise

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Stage = Literal["before", "after"]

WIDTH = 6.75  # inches: the text width of a two-column paper
PANEL = 2.0  # inches: height of one row of panels
COLUMNS = 3
TITLE_LENGTH = 34
FULL = "full model"
Z95 = 1.96
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1)), (0, (5, 1, 1, 1)), (0, (3, 1, 1, 1, 1, 1)))
STYLE = {
    **figures.STYLE,
    "font.size": 8, "axes.titlesize": 8, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "grid.linewidth": 0.4, "grid.color": "#dddddd", "lines.linewidth": 1.2, "lines.markersize": 4,
    "legend.frameon": False,
}


@dataclass
class View:
    """What all figures draw from: summary rows with a value at one stage, and how to name and mark them."""

    records: Records
    layout: Layout
    stage: Stage
    rows: list[SummaryRow]
    models: list[str] = field(init=False)
    settings: list[tuple[str, str]] = field(init=False)
    """(model, note) of every setting, the default ones of all models first."""
    left_out: dict[Problem, None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.models = self.layout.ordered({row.setting.model for row in self.rows}, self.layout.models)
        found = {(row.setting.model, row.setting.note()) for row in self.rows}
        self.settings = sorted(found, key=lambda pair: (pair[1] != "", pair[1], self.models.index(pair[0])))

    def leave_out(self, kind: str, text: str) -> None:
        """Say what a figure does not show."""
        self.left_out[Problem("not drawn", kind, text)] = None

    def value(self, row: SummaryRow) -> Estimate | None:
        """The row's average at the stage of this view."""
        return row.before if self.stage == "before" else row.after

    def colour(self, model: str, note: str = "") -> str:
        """One colour per model and setting."""
        pair = (model, note)
        place = self.settings.index(pair) if pair in self.settings else self.models.index(model)
        return COLOURS[place % len(COLOURS)]

    def number(self, method: str) -> int:
        """One marker per method."""
        known = list(self.layout.methods)
        return known.index(method) if method in known else len(known)

    def mark(self, method: str, note: str = "") -> dict[str, Any]:
        """Marker of the method, dash of method and setting."""
        notes = list(dict.fromkeys(name for _, name in self.settings))
        dash = self.number(method) + (notes.index(note) if note in notes else 0)
        return {"marker": MARKERS[self.number(method) % len(MARKERS)], "linestyle": DASHES[dash % len(DASHES)],
                "markeredgecolor": "white", "markeredgewidth": 0.5}

    def over_keep_k(self, kind: str) -> list[SummaryRow]:
        """Rows to draw over keep-k, in all settings; numbers of calibration examples have a figure of their own."""
        rows = [row for row in self.rows if row.setting.examples is None]
        if rows and len(rows) < len(self.rows):
            other = {row.setting for row in self.rows} - {row.setting for row in rows}
            self.leave_out(kind, f"{_settings(len(other))} with a number of calibration examples: see the calibration "
                                 "figure.")
        return rows or self.rows

    def groups(self, rows: Iterable[SummaryRow]) -> list[str]:
        """Groups of some rows, in order."""
        return self.layout.ordered({row.group for row in rows}, self.layout.groups)


def _settings(count: int) -> str:
    return f"{count} setting{'s' * (count != 1)}"


def plot(records: Records, layout: Layout, folder: Path, *, kinds: Sequence[str] = (), stage: Stage | None = None,
         formats: Sequence[str] = ("pdf", "png")) -> tuple[list[Path], list[Problem]]:
    """Draw the wanted kinds of figure (default: all that have data) into `folder`; returns files and what they lack.

    `stage` None takes the one at which more settings have a value, after finetuning if equal. Raises `UsageError`
    without matplotlib, or where a kind that was asked for, or every kind, has nothing to show.
    """
    unknown = next((kind for kind in kinds if kind not in FIGURES), None)
    if unknown is not None:
        raise UnknownNameError("plot", unknown, FIGURES)
    library = matplotlib()
    view, problems = _view(records, layout, stage)
    drawn: dict[Path, Figure] = {}
    with library.rc_context(STYLE):
        for kind in kinds or FIGURES:
            figure = FIGURES[kind](view)
            if not isinstance(figure, str):
                drawn |= {folder / f"{kind}-{view.stage}.{suffix}": figure for suffix in formats}
            elif kinds:
                raise UsageError(f"There is nothing to show in a {kind} plot {view.stage} finetuning: it needs "
                                 f"{figure}.")
            else:
                view.leave_out(kind, f"It needs {figure}.")
        files = save_all(drawn)
    if not files:
        needs = "; ".join(f"{note.path}: {note.message.rstrip('.')}" for note in view.left_out)
        raise UsageError(f"There is nothing to plot {view.stage} finetuning ({needs}).")
    return files, [*problems, *view.left_out]


def _view(records: Records, layout: Layout, stage: Stage | None) -> tuple[View, list[Problem]]:
    layout = layout.naming(records.models)
    rows, problems = summarise(records, layout)
    before, after = [row for row in rows if row.before], [row for row in rows if row.after]
    chosen: Stage = stage or ("after" if after and len(after) >= len(before) else "before")
    here, there, other = (before, after, "after") if chosen == "before" else (after, before, "before")
    view = View(records, layout, chosen, here)
    missing = {row.setting for row in there} - {row.setting for row in here}
    if missing:
        view.leave_out("all figures", f"{_settings(len(missing))} with a value {other} finetuning only; --stage "
                                      f"{other} draws them.")
    return view, problems


# ---- accuracy against keep-k ----


def keep_k_figure(view: View) -> Figure | str:
    """A panel per group: the first method of the labels and random selection, the full model, sizes above (Fig. 3)."""
    every, first = view.over_keep_k("keep-k"), _first_methods(view)
    if len({row.setting.keep_k for row in every if row.setting.keep_k}) < 2:
        return "runs at two keep-k"
    rows = [row for row in every if row.setting.method in first or row.full]
    others = sorted({str(view.layout.method(row.setting.method).label) for row in every if row not in rows})
    if others:
        view.leave_out("keep-k", f"{', '.join(others)}: see the methods figure.")
    return _panels(view, view.groups(rows), rows, lambda row, group: row.group == group, view.layout.group)


def methods_figure(view: View) -> Figure | str:
    """A panel per model and group: all methods (Fig. 4)."""
    rows = view.over_keep_k("methods")
    if len({row.setting.keep_k for row in rows}) < 2:
        return "runs at two keep-k"
    pairs = [(m, g) for m in view.models for g in view.groups(rows)
             if len({row.setting.method for row in rows if (row.setting.model, row.group) == (m, g)}) > 1]
    return _panels(view, pairs, rows, lambda row, pair: (row.setting.model, row.group) == pair,
                   lambda pair: f"{view.layout.group(pair[1])}: {view.layout.model(pair[0])}")


def _first_methods(view: View) -> set[str]:
    """The first method of the labels that was run, and random selection."""
    found = view.layout.ordered({row.setting.method for row in view.rows} - {"random"}, view.layout.methods)
    return {*found[:1], "random"}


def _panels(view: View, keys: Sequence[Any], rows: Sequence[SummaryRow], belongs: Callable[[SummaryRow, Any], bool],
            title: Callable[[Any], str]) -> Figure | str:
    if not keys:
        return "runs of two methods on the same model and tasks"
    figure, axes = _grid(len(keys))
    handles: dict[str, Any] = {}
    for axis, key in zip(axes, keys, strict=False):
        members = [row for row in rows if belongs(row, key)]
        handles |= _curves(axis, view, members)
        axis.set_title(textwrap.fill(plain(title(key)), TITLE_LENGTH))
        _sizes_above(axis, members)
    _legend(figure, handles)
    return figure


def _curves(axis: Axes, view: View, rows: Sequence[SummaryRow]) -> dict[str, Any]:
    """One line per model and method over keep-k, a dashed level for each full model; returns legend handles."""
    handles: dict[str, Any] = {}
    for series, members in _series(rows).items():
        line = sorted((row for row in members if row.setting.keep_k), key=lambda row: row.setting.keep_k or 0)
        if line:
            handles[_name(view, *series)] = _line(axis, view, line)
    levels = {(row.setting.model, row.setting.note()): view.value(row) for row in rows if row.full}
    for (model, note), value in levels.items():
        if value:
            handles[FULL] = axis.axhline(100 * value.value, color=view.colour(model, note), linewidth=0.8,
                                         linestyle=(0, (6, 3)))
    _keep_k_axis(axis, rows)
    axis.set_ylabel(plain(f"{rows[0].metric} (%)") if rows else "")
    return handles


def _line(axis: Axes, view: View, rows: Sequence[SummaryRow]) -> Any:
    setting, points = rows[0].setting, [(row.setting.keep_k or 0, view.value(row)) for row in rows]
    known = [(x, value.value, Z95 * (value.error or 0)) for x, value in points if value]
    xs, ys = [x for x, _, _ in known], [100 * y for _, y, _ in known]
    colour = view.colour(setting.model, setting.note())
    low, high = ([100 * min(1, max(0, y + sign * e)) for _, y, e in known] for sign in (-1, 1))
    axis.fill_between(xs, low, high, color=colour, alpha=0.15, linewidth=0)
    return axis.plot(xs, ys, color=colour, **view.mark(setting.method, setting.note()))[0]


def _series(rows: Iterable[SummaryRow]) -> dict[tuple[str, str, str], list[SummaryRow]]:
    found: dict[tuple[str, str, str], list[SummaryRow]] = {}
    for row in rows:
        found.setdefault((row.setting.model, row.setting.method, row.setting.note()), []).append(row)
    return found


def _name(view: View, model: str, method: str, note: str) -> str:
    return plain(", ".join(filter(None, [view.layout.model(model), view.layout.method(method).label, note])))


def _keep_k_axis(axis: Axes, rows: Iterable[SummaryRow]) -> None:
    keep_ks = _apart({row.setting.keep_k for row in rows if row.setting.keep_k})
    axis.set_xscale("log", base=2)
    axis.set_xticks(keep_ks, [str(keep_k) for keep_k in keep_ks])
    axis.minorticks_off()
    axis.set_xlabel("experts kept per layer")


def _apart(keep_ks: Iterable[int]) -> list[int]:
    """Ascending values, without those too close to the one before for a label on a logarithmic axis."""
    kept: list[int] = []
    for keep_k in sorted(keep_ks):
        if not kept or keep_k >= 1.3 * kept[-1]:
            kept.append(keep_k)
    return kept


def _sizes_above(axis: Axes, rows: Sequence[SummaryRow]) -> None:
    """Weights on disk at each keep-k, on a second axis; left out where models of different sizes share the panel."""
    sizes: dict[int, set[int]] = {}
    for row in rows:
        if row.setting.keep_k and row.disk_bytes:
            sizes.setdefault(row.setting.keep_k, set()).add(row.disk_bytes)
    if not sizes or any(max(found) > 1.02 * min(found) for found in sizes.values()):
        return
    above = axis.secondary_xaxis("top")
    ticks, (unit, scale) = _apart(sizes), _unit(max(max(found) for found in sizes.values()))
    above.set_xticks(ticks, [f"{max(sizes[keep_k]) / scale:.2g}" for keep_k in ticks])
    above.minorticks_off()
    above.tick_params(length=2, labelsize=6)
    above.set_xlabel(f"weights ({unit})", fontsize=6)


def _unit(largest: float) -> tuple[str, float]:
    """A unit for sizes in bytes, and its bytes."""
    return ("GB", 1e9) if largest >= 1e8 else ("MB", 1e6)


# ---- calibration size ----


LineKey = tuple[str, str, int, str, str]
"""Model, method, keep-k, setting apart from the number of examples, group."""


def calibration_figure(view: View) -> Figure | str:
    """A panel per group: accuracy against the number of calibration examples, a line per model, method, keep-k and
    other setting (Fig. 12); random selection, which sees no examples, is a dotted level."""
    varied = {_line_key(row) for row in view.rows if row.setting.examples is not None}
    places = {(model, keep_k, group) for model, _, keep_k, _, group in varied}
    rows = [row for row in view.rows if _line_key(row) in varied
            or (row.setting.method == "random" and (row.setting.model, row.setting.keep_k or 0, row.group) in places)]
    sizes = sorted({row.setting.examples for row in rows if row.setting.examples is not None})
    if not sizes:
        return "runs with a number of calibration examples"
    figure, axes = _grid(len(view.groups(rows)))
    handles: dict[str, Any] = {}
    for axis, group in zip(axes, view.groups(rows), strict=False):
        members = [row for row in rows if row.group == group]
        handles |= _calibration_curves(axis, view, members, sizes)
        axis.set_title(plain(view.layout.group(group)))
        axis.set_ylabel(plain(f"{members[0].metric} (%)"))
    _legend(figure, handles)
    return figure


def _line_key(row: SummaryRow) -> LineKey:
    setting = row.setting
    note = replace(setting, examples=None).note()
    return setting.model, setting.method, setting.keep_k or 0, note, row.group


def _calibration_curves(axis: Axes, view: View, rows: Sequence[SummaryRow], sizes: Sequence[int]) -> dict[str, Any]:
    places: dict[int | None, int] = {n: i for i, n in enumerate([*sizes, None])}
    keep_ks = sorted({row.setting.keep_k or 0 for row in rows})
    lines: dict[LineKey, list[SummaryRow]] = {}
    for row in rows:
        lines.setdefault(_line_key(row), []).append(row)
    handles = {}
    for (model, method, keep_k, note, _), members in lines.items():
        known = sorted(((places[row.setting.examples], value) for row in members if (value := view.value(row))),
                       key=lambda point: point[0])
        look = {**view.mark(method, note), "marker": MARKERS[keep_ks.index(keep_k) % len(MARKERS)],
                "color": view.colour(model, note)}
        draw = _level if method == "random" else _with_bars
        handles[plain(f"{_name(view, model, method, note)}, keep-k {keep_k}")] = draw(axis, known, look, len(places))
    axis.set_xticks(list(places.values()), [str(n) if n is not None else "all" for n in places])
    axis.set_xlabel("calibration examples")
    return handles


def _with_bars(axis: Axes, known: Sequence[tuple[int, Estimate]], look: dict[str, Any], width: int) -> Any:
    return axis.errorbar([x for x, _ in known], [100 * value.value for _, value in known],
                         [100 * Z95 * (value.error or 0) for _, value in known], capsize=2, **look)


def _level(axis: Axes, known: Sequence[tuple[int, Estimate]], look: dict[str, Any], width: int) -> Any:
    """A dotted line from side to side."""
    level = 100 * known[-1][1].value
    return axis.plot([-0.3, width - 0.7], [level, level], alpha=0.6, **{**look, "linestyle": ":"})[0]


# ---- drop per task ----


Drops = dict[tuple[str, int], float]
"""(task, keep-k) -> points lost."""


def drops_figure(view: View) -> Figure | str:
    """Heat map: points lost against the full model, rows tasks, columns keep-k, one panel per model; the first method
    in the first of the model's settings that has a full model, the default one where it has."""
    experts = experts_of(view.records, view.layout)
    method = next(iter(_first_methods(view) - {"random"}), "random")
    panels = {model: shown for model in view.models if (shown := _first_drops(view, model, method, experts))}
    if not panels:
        return "a pruned run and the full model on the same task"
    notes = {model: note for model, (note, _) in panels.items()}
    others = {row.setting for row in view.rows if not row.full
              and (row.setting.method, row.setting.note()) != (method, notes.get(row.setting.model))}
    if others:
        view.leave_out("drops", f"{_settings(len(others))} beside each model's first one: see the report.")
    tasks = _tasks_in_order(view, {task for _, found in panels.values() for task, _ in found})
    figure = new_figure(max(WIDTH, 1.5 + 1.5 * len(panels)), max(2.0, 1.2 + 0.14 * len(tasks)))
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axis, (model, (note, found)) in zip(axes, panels.items(), strict=True):
        image = _heat(axis, view, found, tasks)
        axis.set_title(textwrap.fill(_name(view, model, method, note), TITLE_LENGTH))
    figure.colorbar(image, ax=list(axes), label=f"points lost {view.stage} finetuning", shrink=0.6)
    return figure


def _first_drops(view: View, model: str, method: str, experts: dict[str, int]) -> tuple[str, Drops] | None:
    """Note and drops of the first setting of a model that has any."""
    for note in [note for name, note in view.settings if name == model]:
        found = _drops(view, Setting(model=model, keep_k=None, method=method), note, experts)
        if found:
            return note, found
    return None


def _drops(view: View, of: Setting, note: str, experts: dict[str, int]) -> Drops:
    """What the runs of a model and method lose in one setting."""
    found: Drops = {}
    shown = {run.setting for run in view.records.runs}
    for group, tasks in view.layout.grouped({run.task for run in view.records.runs}).items():
        runs = [run for run in view.records.beside if run.task in tasks and run.setting.model == of.model
                and run.setting.note() == note]
        values = pool(runs, view.stage, view.layout.headline(group, results_of(runs)))
        full = {task: value.value for (setting, task), value in values.items() if is_full(setting, experts)}
        found |= {(task, setting.keep_k): 100 * (full[task] - value.value) for (setting, task), value in values.items()
                  if task in full and setting in shown and setting.method == of.method and setting.keep_k
                  and not is_full(setting, experts)}
    return found


def _tasks_in_order(view: View, tasks: Iterable[str]) -> list[str]:
    return [task for members in view.layout.grouped(tasks).values() for task in members]


def _heat(axis: Axes, view: View, found: dict[tuple[str, int], float], tasks: Sequence[str]) -> Any:
    keep_ks = sorted({keep_k for _, keep_k in found})
    values = [[found.get((task, keep_k), float("nan")) for keep_k in keep_ks] for task in tasks]
    image = axis.imshow(values, cmap="PuOr_r", vmin=-40, vmax=40, aspect="auto")
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            if value == value:
                axis.text(x, y, str(round(value)), ha="center", va="center", fontsize=6,
                          color="white" if abs(value) > 28 else "black")
    axis.set_xticks(range(len(keep_ks)), [str(keep_k) for keep_k in keep_ks])
    axis.set_yticks(range(len(tasks)), [plain(view.layout.tasks.get(task, task)) for task in tasks], fontsize=6)
    axis.set_xlabel("experts kept per layer")
    axis.grid(False)
    return image


# ---- size against accuracy ----


def pareto_figure(view: View) -> Figure | str:
    """Weights on disk against the mean over groups for every setting of every model, and the front as steps."""
    points = _points(view)
    if len(points) < 2:
        return "two settings that have the same groups, with known sizes"
    figure = new_figure(4.5, 2.8)
    axis = figure.subplots()
    handles: dict[str, Any] = {}
    unit, scale = _unit(max(size for _, size, _ in points))
    points = [(series, size / scale, mean) for series, size, mean in points]
    for (model, method, note), x, y in points:
        look = {**view.mark(method, note), "linestyle": ""}
        drawn = axis.plot(x, y, color=view.colour(model, note), **look)[0]
        handles.setdefault(_name(view, model, method, note), drawn)
    front = pareto_front([(x, y) for _, x, y in points])
    xs, ys = zip(*front, (max(x for _, x, _ in points), front[-1][1]), strict=True)
    handles["nothing smaller is better"] = axis.plot(xs, ys, color="#777777", linestyle=DASHES[2], zorder=0,
                                                     drawstyle="steps-post")[0]
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter(lambda size, _: f"{size:g}")
    axis.xaxis.set_minor_formatter(lambda size, _: f"{size:g}" if f"{size:e}"[0] in "25" else "")
    axis.set_xlabel(f"weights on disk ({unit})")
    axis.set_ylabel("mean over groups (%)")
    axis.set_title(f"{view.stage} finetuning")
    _legend(figure, handles)
    return figure


def _points(view: View) -> list[tuple[tuple[str, str, str], float, float]]:
    """Series, bytes and mean per setting that has every group which at least half of the settings have."""
    by_setting: dict[Setting, dict[str, SummaryRow]] = {}
    for row in view.rows:
        by_setting.setdefault(row.setting, {})[row.group] = row
    counts = Counter(group for found in by_setting.values() for group in found)
    shared = [group for group, count in counts.items() if 2 * count >= len(by_setting)]
    points = []
    for setting, found in by_setting.items():
        size = next(iter(found.values())).disk_bytes
        values = [view.value(found[group]) for group in shared if group in found]
        if size and values and len(values) == len(shared):
            mean = fmean(100 * value.value for value in values if value)
            points.append(((setting.model, setting.method, setting.note()), float(size), mean))
    if len(points) < len(by_setting):
        names = ", ".join(view.layout.group(group) for group in shared) or "any group that half of all have"
        count = _settings(len(by_setting) - len(points))
        view.leave_out("pareto", f"{count} without {names}, or without a known size.")
    return points


def pareto_front(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points (cost, gain) that no other point beats at the same or lower cost, by rising cost."""
    front: list[tuple[float, float]] = []
    for cost, gain in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or gain > front[-1][1]:
            front.append((cost, gain))
    return front


# ---- shared ----


def _grid(count: int) -> tuple[Figure, list[Axes]]:
    columns = min(COLUMNS, count)
    rows = -(-count // columns)
    figure = new_figure(WIDTH if columns > 1 else WIDTH * 0.6, PANEL * rows + 0.2)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes[count:]:
        axis.set_visible(False)
    return figure, axes[:count]


def _legend(figure: Figure, handles: dict[str, Any]) -> None:
    names = sorted(handles, key=lambda name: name == FULL)
    widest = 0.5 + 0.06 * max(map(len, names), default=0)  # inches: the sign, and an average letter of 7 points
    columns = max(1, min(len(names), int(figure.get_figwidth() / widest)))
    figure.set_figheight(figure.get_figheight() + 0.15 * -(-len(names) // columns))
    figure.legend([handles[name] for name in names], names, loc="outside lower center", ncols=columns, fontsize=7)


FIGURES: dict[str, Callable[[View], Figure | str]] = {  # a figure, or what it would need
    "keep-k": keep_k_figure,
    "methods": methods_figure,
    "calibration": calibration_figure,
    "drops": drops_figure,
    "pareto": pareto_figure,
}
