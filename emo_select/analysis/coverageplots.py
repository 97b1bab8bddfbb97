"""Pictures of topic coverage: five heat maps of each kind of document vector, and Figure 6 for two models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from emo_select.analysis.coverage import KINDS, Coverage, Floats, Kind, Topics, colour_limits, heatmaps, shown_layers
from emo_select.errors import SpecError
from emo_select.figures import new_figure, plain, save

DPI = 150
PARTS = {"coverage_above_uniform": "experts above uniform", "coverage_nonzero": "experts above zero",
         "entropy": "entropy (bits)", "similarity": "cosine between topics", "l2_distance": "distance between topics"}
NAMES = {"probs": "mean probability", "topk_freq": "share of tokens that choose the expert"}


def picture_files(folder: Path) -> list[Path]:
    """What `draw_coverage` writes."""
    return [folder / f"doc_{kind}_{part}_heatmap.png" for kind in KINDS for part in PARTS]


def draw_coverage(coverage: Coverage, folder: Path, order: Sequence[str] | None = None, *,
                  published_threshold: bool = False) -> list[Path]:
    """The ten pictures of a model under the published names. Topics come in `order`, else by the entropy of
    probabilities. With `published_threshold` the title of the picture that it concerns says so."""
    drawn = []
    for kind in KINDS:
        topics = coverage.topics(kind, published_threshold=published_threshold)
        topics = topics.ordered(order or coverage.topics("topk_freq").order())
        for name, picture in heatmaps(topics, kind).items():
            title = f"{coverage.info.model}: {_title(name, coverage, kind, published_threshold)}"
            drawn.append(_draw(picture, title, folder / name))
    return drawn


def _title(name: str, coverage: Coverage, kind: Kind, published: bool) -> str:
    part = name.removeprefix(f"doc_{kind}_").removesuffix("_heatmap.png")
    text = f"{PARTS[part]}, {NAMES[kind]}"
    if part != "coverage_above_uniform":
        return text
    first = coverage.info.layers[0]
    if kind == "probs" or published:
        return f"{text} (> 1/{first.experts}{', as published' if published and kind != 'probs' else ''})"
    return f"{text} (> {first.chosen}/{first.experts})"


def _draw(picture: dict[str, Any], title: str, path: Path) -> Path:
    topics = [plain(name) for name in picture["topics"]]
    if "matrix" in picture:
        layers = len(picture["matrix"][0])
        figure = new_figure(5 + 0.45 * layers, 1.5 + 0.32 * len(topics))
        axes = figure.subplots()
        image = axes.imshow(picture["matrix"], aspect="auto", cmap=picture["cmap"])
        axes.set_xticks(range(layers), [str(layer) for layer in range(layers)])
        axes.set_yticks(range(len(topics)), topics)
        axes.set_xlabel("MoE layer")
        figure.colorbar(image, ax=axes)
    else:
        size = 3 + 0.24 * len(topics)
        figure = new_figure(2 * size, 2 * size)
        for axes, layer, matrix in zip(figure.subplots(2, 2).flat, picture["layers"], picture["matrices"], strict=True):
            image = axes.imshow(matrix, cmap=picture["cmap"])
            _name_topics(axes, topics, f"layer {layer}")
            figure.colorbar(image, ax=axes, shrink=0.8)
    figure.suptitle(plain(title), fontsize=10)
    return save(figure, path, dpi=DPI)


def _name_topics(axes: Any, topics: Sequence[str], title: str) -> None:
    axes.set_xticks(range(len(topics)), topics, rotation=90, fontsize=7)
    axes.set_yticks(range(len(topics)), topics, fontsize=7)
    axes.set_title(title, fontsize=9)


def figure6(coverages: Sequence[Coverage], path: Path, order: Sequence[str] | None = None) -> Path:
    """Cosines of topics' mean probabilities in four layers, the models side by side on one colour scale.

    SpecError where the models have different topics.
    """
    names = order or coverages[0].topics("topk_freq").order()
    each = [one.topics("probs").ordered(names) for one in coverages]
    panels = [_panels(topics) for topics in each]
    low, high = colour_limits([matrix for _, matrices in panels for matrix in matrices])
    size = 2.2 + 0.2 * len(names)
    figure = new_figure(2 * size * len(coverages) + 1, 2 * size)
    grid = figure.subplots(2, 2 * len(coverages), squeeze=False)
    image: Any = None
    for number, (coverage, (layers, matrices)) in enumerate(zip(coverages, panels, strict=True)):
        for axes, layer, matrix in zip(grid[:, 2 * number:2 * number + 2].flat, layers, matrices, strict=True):
            image = axes.imshow(matrix, cmap="RdPu", vmin=low, vmax=high)
            _name_topics(axes, [plain(name) for name in names], f"{plain(coverage.info.model)}, layer {layer}")
    figure.colorbar(image, ax=list(grid.flat), shrink=0.6, label="cosine")
    return save(figure, path, dpi=DPI)


def _panels(topics: Topics) -> tuple[list[int], list[Floats]]:
    layers = shown_layers(len(topics.vectors))
    return layers, [topics.similarity(layer) for layer in layers]


def shared_order(coverages: Sequence[Coverage]) -> list[str]:
    """The order that all pictures of an analysis share: ascending mean entropy of the first model's shares of tokens.

    SpecError where the models have different topics.
    """
    order = coverages[0].topics("topk_freq").order()
    for other in coverages[1:]:
        if sorted(set(other.labels())) != sorted(order):
            raise SpecError(f"{coverages[0].info.model} and {other.info.model} were asked about different topics; "
                            "collect both with the same texts.")
    return order
