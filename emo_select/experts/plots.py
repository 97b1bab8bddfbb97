"""Pictures of keep sets (extra `plots`: matplotlib). Drawn without a display; names are never read as markup."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emo_select.errors import SpecError
from emo_select.experts.calibration_curve import Curve, all_sizes
from emo_select.experts.inspect import layer_views, overlaps
from emo_select.experts.keepset import KeepSet
from emo_select.figures import STYLE, matplotlib, new_figure, plain, save
from emo_select.storage import write_output

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 120
CURVE_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
CURVES = {**STYLE, "font.size": 8, "axes.titlesize": 8, "axes.spines.top": False, "axes.spines.right": False,
          "axes.grid": True, "grid.linewidth": 0.4, "grid.color": "#dddddd", "lines.linewidth": 1.6,
          "lines.markersize": 4, "legend.frameon": False}


def plot_scores(keep_set: KeepSet, path: Path, title: str = "") -> None:
    """Heat map layer × expert of the scores, each layer scaled to its largest routed one, kept experts marked.

    Beside it, the coverage of each layer. Raises SpecError without scores (random selection) or without matplotlib.
    """
    if keep_set.scores is None:
        raise SpecError("This selection has no scores to draw (it was random, or keeps everything).")
    rows = [layer for layer, kept in enumerate(keep_set.experts) if kept is not None]
    width = max(len(keep_set.scores[layer] or ()) for layer in rows)
    figure = _figure(3 + width * 0.11, 1.2 + len(rows) * 0.28)
    heat, bars = figure.subplots(1, 2, width_ratios=(width, max(8, width // 6)), sharey=True)
    drawn = heat.imshow(_scaled(keep_set, rows, width), aspect="auto", cmap="viridis", vmin=0, vmax=1)
    points = [(expert, row) for row, layer in enumerate(rows) for expert in keep_set.experts[layer] or ()]
    heat.scatter(*zip(*points, strict=True), s=7, marker="s", facecolors="none", edgecolors="red", linewidths=0.7)
    heat.set(xlabel="expert", ylabel="layer", yticks=range(len(rows)), yticklabels=rows)
    heat.set_title(_plain(title or f"{keep_set.method}, keep-k {keep_set.keep_k}"), fontsize=9)
    coverage = [view.coverage or 0.0 for view in layer_views(keep_set)]
    bars.barh(range(len(rows)), coverage, color="tab:red")
    bars.set(xlim=(0, 1), xlabel="coverage")
    figure.colorbar(drawn, ax=bars, label=_plain(f"{keep_set.score}, relative"))
    _save(figure, path)


def plot_overlaps(selections: Mapping[str, KeepSet], path: Path) -> None:
    """Matrix of mean Jaccard indices between keep sets. Raises SpecError without matplotlib."""
    names = list(selections)
    values = [[1.0 if a == b else float("nan") for b in names] for a in names]
    for pair in overlaps(selections):
        first, second = names.index(pair.first), names.index(pair.second)
        values[first][second] = values[second][first] = pair.mean
    size = 3 + 0.45 * len(names)
    figure = _figure(size + 1, size)
    axes = figure.subplots()
    drawn = axes.imshow(values, cmap="magma", vmin=0, vmax=1)
    ticks = range(len(names))
    axes.set_xticks(ticks, [_plain(name) for name in names], rotation=90, fontsize=6)
    axes.set_yticks(ticks, [_plain(name) for name in names], fontsize=6)
    for row in ticks:
        for column in ticks:
            if values[row][column] == values[row][column]:
                axes.text(column, row, f"{values[row][column]:.2f}", ha="center", va="center", fontsize=6,
                          color="white" if values[row][column] < 0.6 else "black")
    figure.colorbar(drawn, ax=axes, label="mean Jaccard index of routed experts")
    _save(figure, path)


def plot_curves(curves: Sequence[Curve], path: Path) -> None:
    """A panel per task: mean Jaccard index with the largest sample's keep set over the sample size, a line per keep-k,
    thin lines for single layers. Raises UsageError without matplotlib."""
    sizes = all_sizes(curves)
    panels = list(dict.fromkeys((curve.task, curve.note) for curve in curves))
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    with matplotlib().rc_context(CURVES):
        figure = new_figure(3 * columns + 0.6, 2.3 * rows + 0.4)
        axes = list(figure.subplots(rows, columns, squeeze=False, sharey=True).flat)
        keep_ks = sorted({curve.keep_k for curve in curves})
        for axis, panel in zip(axes, panels, strict=False):
            for curve in (curve for curve in curves if (curve.task, curve.note) == panel):
                _curve(axis, curve, sizes, CURVE_COLOURS[keep_ks.index(curve.keep_k) % len(CURVE_COLOURS)])
            axis.set(xlabel="calibration examples", ylim=(0, 1.03), title=plain(", ".join(filter(None, panel))))
            axis.set_xticks(range(len(sizes)), sizes)
        for axis in axes[len(panels):]:
            axis.set_visible(False)
        axes[0].set_ylabel("Jaccard index with the largest sample")
        handles, names = _legend_of(axes)
        figure.legend(handles, names, loc="outside lower center", ncols=min(5, len(names)), fontsize=7)
        save(figure, path, dpi=200)


def _legend_of(axes: Sequence[Axes]) -> tuple[list[Any], list[str]]:
    found = {name: handle for axis in axes
             for handle, name in zip(*axis.get_legend_handles_labels(), strict=True)}
    names = sorted(found, key=lambda name: int(name.split()[-1]))
    return [found[name] for name in names], names


def _curve(axis: Axes, curve: Curve, sizes: Sequence[str], colour: str) -> None:
    places = [sizes.index(tag) for tag in curve.keep_sets]
    for layer in zip(*(curve.overlap(tag) for tag in curve.keep_sets), strict=True):
        if layer[0] is not None:
            axis.plot(places, layer, color=colour, linewidth=0.5, alpha=0.35)
    axis.plot(places, [curve.mean(tag) for tag in curve.keep_sets], color=colour, marker="o",
              label=f"keep-k {curve.keep_k}")


def _scaled(keep_set: KeepSet, rows: list[int], width: int) -> Any:
    import numpy as np

    values = np.full((len(rows), width), np.nan)
    for row, layer in enumerate(rows):
        scores = (keep_set.scores or ())[layer] or ()
        routed = len(scores) - keep_set.num_shared
        largest = max(scores[:routed], default=0.0) or 1.0
        values[row, :len(scores)] = np.minimum(np.asarray(scores) / largest, 1.0)
    return values


def _figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise SpecError("Drawing needs matplotlib; install it with: pip install 'emo-select[plots]'.") from None
    figure = Figure(figsize=(min(width, 40), min(height, 40)), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _plain(text: str) -> str:
    """A name as matplotlib shows it literally: `$` would start a formula."""
    return text.replace("$", r"\$")


def _save(figure: Figure, path: Path) -> None:
    data = io.BytesIO()
    figure.savefig(data, dpi=DPI, format="png")
    write_output(path, data.getvalue())
