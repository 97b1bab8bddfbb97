"""Plots of a run: its losses, and how evenly the experts of every layer are used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from emo_select import storage

SHOWN = ("loss", "balance", "router_z", "entropy", "peak_load", "gradient_norm")


def draw(out: Path) -> list[Path]:
    """Write what can be drawn so far to <out>/watch; returns the files."""
    folder = out / "watch"
    metrics, loads = _lines(folder / "metrics.jsonl"), _lines(folder / "loads.jsonl")
    drawn: list[Path] = []
    if metrics:
        drawn.append(_save(_losses(metrics), folder / "losses.png"))
    if loads:
        drawn.append(_save(_loads(loads), folder / "loads.png"))
    return drawn


def lines(named: dict[str, list[tuple[float, float]]], x: str, y: str, path: Path) -> Path:
    """A plot with one line per name."""
    figure, (axis,) = _figure(1, 1, 6, 4)
    for name, points in named.items():
        axis.plot(*zip(*points, strict=True), marker="o", label=name)
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.legend()
    return _save(figure, path)


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines(keepends=True)
            if line.endswith("\n")]


def _figure(rows: int, columns: int, width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False).flatten()


def _losses(metrics: list[dict[str, Any]]) -> Any:
    names = [name for name in SHOWN if name in metrics[-1]]
    figure, axes = _figure(2, (len(names) + 1) // 2, 4, 2.6)
    for axis, name in zip(axes, names, strict=False):
        points = [(line["step"], line[name]) for line in metrics if name in line]
        axis.plot(*zip(*points, strict=True), linewidth=1)
        axis.set_title(name.replace("_", " "))
        axis.set_xlabel("step")
    for axis in axes[len(names):]:
        axis.set_visible(False)
    return figure


def _loads(loads: list[dict[str, Any]]) -> Any:
    """One panel per layer: experts over steps, coloured by their share of the choices times their number."""
    layers = len(loads[-1]["loads"])
    columns = min(4, layers)
    figure, axes = _figure(-(-layers // columns), columns, 3, 2.4)
    steps = [line["step"] for line in loads]
    for layer, axis in enumerate(axes[:layers]):
        counts = [line["loads"][layer] for line in loads]
        shares = [[len(row) * count / max(1, sum(row)) for count in row] for row in counts]
        image = axis.imshow(list(zip(*shares, strict=True)), aspect="auto", vmin=0, vmax=3, origin="lower",
                            interpolation="nearest", extent=(steps[0], steps[-1] + 1, 0, len(shares[0])))
        axis.set_title(f"layer {layer}")
        axis.set_xlabel("step")
    for axis in axes[layers:]:
        axis.set_visible(False)
    figure.colorbar(image, ax=list(axes[:layers]), label="load (1 is even)")
    return figure


def _save(figure: Any, path: Path) -> Path:
    from io import BytesIO

    picture = BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    storage.write_bytes(path, picture.getvalue())
    return path
