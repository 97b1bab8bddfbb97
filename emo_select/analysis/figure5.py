"""Figure 5 for any models: each one's largest clusters with their share of the tokens, and one document in the colours
of its own commonest clusters."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from emo_select.analysis.layout import FitFolder, ModelFolder
from emo_select.analysis.page import fit_of, require_same_texts
from emo_select.analysis.words import Pieces, tokenizer_of
from emo_select.errors import SpecError
from emo_select.figures import STYLE, matplotlib, new_figure, plain, save_all

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LISTED = 18  # clusters, as in the paper
COLOURS = ("#e69f00", "#56b4e9", "#2fb58c", "#f0e442", "#e8743b", "#d591bb")  # black text is readable on all
REST, INK = "#eceff2", "#1b1f24"
LENGTHS = (80, 600)  # tokens of a document that fits and is worth reading
SHARES = (0.55, 0.15)  # what the first model's top cluster, and the others', should hold of it
LINE_ENDS = re.compile(r"(?P<text>[^\n]*)(?P<ends>\n*)")
COLUMNS, WIDTH, ROW = 62, 5.2, 0.165  # characters of a line; inches of a model's column and of a line


@dataclass(frozen=True)
class Side:
    """One model of the figure."""

    model: ModelFolder
    fit: FitFolder

    @cached_property
    def clusters(self) -> NDArray[np.int32]:
        """(T,) see `ModelFolder.token_clusters`."""
        return self.model.token_clusters(self.fit)

    @cached_property
    def sizes(self) -> NDArray[np.int64]:
        """(k,) tokens of each cluster."""
        return np.bincount(self.clusters[self.clusters >= 0], minlength=self.fit.info.k)

    @cached_property
    def listed(self) -> list[int]:
        """The largest clusters."""
        return [int(i) for i in np.argsort(-self.sizes, kind="stable")[:LISTED]]

    def ranked(self, document: int) -> list[tuple[int, float]]:
        """(cluster, share of the document), largest first."""
        own = self.clusters[self.model.bounds[document]:self.model.bounds[document + 1]]
        counts = np.bincount(own[own >= 0], minlength=self.fit.info.k)
        return [(int(i), float(counts[i] / max(1, len(own)))) for i in np.argsort(-counts, kind="stable") if counts[i]]


def draw_figure5(folders: Sequence[Path], out: Path, fit: str | None = None, *, document: int | None = None,
                 formats: Sequence[str] = ("pdf", "png")) -> tuple[list[Path], int]:
    """Draw the figure into `out`/figure5.pdf and .png; returns the files and the document shown.

    Args:
        folders: `ModelFolder` paths of the same documents.
        document: None takes the one that `choose_document` finds.

    Raises:
        SpecError: no such document, or folders that do not go together. UsageError: no matplotlib.
    """
    models = [ModelFolder(Path(folder)) for folder in folders]
    require_same_texts(models)
    sides = [Side(model, fit_of(model, fit)) for model in models]
    shown = choose_document(sides) if document is None else document
    if not 0 <= shown < len(models[0].documents):
        raise SpecError(f"There is no document {shown}; choose 0 to {len(models[0].documents) - 1}.")
    lines = _lines(_pieces(models[0], shown))
    listed = max(len(side.listed) for side in sides)
    with matplotlib().rc_context({**STYLE, "font.size": 8}):
        figure = new_figure(WIDTH * len(sides), 0.9 + 0.2 * listed + ROW * (len(lines) + 1))
        grid = figure.subplots(2, len(sides), squeeze=False, height_ratios=(0.2 * listed, ROW * (len(lines) + 1)))
        for side, (top, below) in zip(sides, grid.T, strict=True):
            colours = {cluster: COLOURS[i] for i, (cluster, _) in enumerate(side.ranked(shown)[:len(COLOURS)])}
            _clusters(top, side, colours)
            _document(below, side, shown, lines, colours)
        return save_all({out / f"figure5.{suffix}": figure for suffix in formats}), shown


def choose_document(sides: Sequence[Side]) -> int:
    """The document whose top clusters hold the largest shares, summed over models.

    Among documents of 80 to 600 tokens whose top cluster is listed for every model, holds 55 % in the first (a cluster
    that is topic-like, where that was measured) and 15 % in the others. A condition that no document meets is dropped.
    """
    lengths = np.diff(sides[0].model.bounds)
    tops = [[side.ranked(i)[:1] or [(-1, 0.0)] for i in range(len(lengths))] for side in sides]
    top = np.array([[row[0][0] for row in one] for one in tops])
    share = np.array([[row[0][1] for row in one] for one in tops])
    kinds = {cluster.id: cluster.kind for cluster in sides[0].fit.clusters}
    conditions = [
        (lengths >= LENGTHS[0]) & (lengths <= LENGTHS[1]),
        np.all([np.isin(one, side.listed) for one, side in zip(top, sides, strict=True)], axis=0),
        np.array([kinds.get(int(cluster), "topic") == "topic" for cluster in top[0]]),
        share[0] >= SHARES[0], np.all(share[1:] >= SHARES[1], axis=0),
    ]
    left = np.ones(len(lengths), dtype=bool)
    for condition in conditions:
        left = left & condition if (left & condition).any() else left
    return int(np.argmax(np.where(left, share.sum(axis=0), -1)))


def _pieces(model: ModelFolder, document: int) -> list[str]:
    ids = model.tokens[model.bounds[document]:model.bounds[document + 1]].tolist()
    return Pieces(tokenizer_of(model.info)).split(ids)


Placed = tuple[int, int, str]
"""Token of the document, column, text."""


def _lines(pieces: Sequence[str]) -> list[list[Placed]]:
    """Tokens laid out in lines of equally wide characters; a line end in the text is shown as a sign."""
    lines: list[list[Placed]] = [[]]
    column = 0
    for number, piece in enumerate(pieces):
        for part, ends in _parts(piece):
            if column + len(part) > COLUMNS:
                lines.append([])
                part, column = part.lstrip() or part, 0
            for start in range(0, max(1, len(part)), COLUMNS):  # a single piece can be longer than a line
                lines[-1].append((number, column, part[start:start + COLUMNS]))
                if start + COLUMNS < len(part):
                    lines.append([])
            column += len(part)
            if ends:
                lines.append([])
                column = 0
    return [line for line in lines if line]


def _parts(piece: str) -> Iterator[tuple[str, bool]]:
    """Parts of a piece, and whether the line ends behind it; a run of line ends is as many signs and one end."""
    for found in LINE_ENDS.finditer(piece.replace("\r\n", "\n").replace("\t", " ")):
        text, ends = found["text"], len(found["ends"])
        if found[0]:
            yield text + "↵" * min(3, ends), ends > 0


def _clusters(axes: Axes, side: Side, colours: dict[int, str]) -> None:
    names, sizes = side.fit.names, side.sizes[side.listed] / max(1, side.sizes.sum())
    places = range(len(side.listed))
    axes.barh(places, 100 * sizes, color=[colours.get(i, "#c9d1d9") for i in side.listed], height=0.72)
    axes.set_yticks(places, [_cut(names[i].label) for i in side.listed])
    for place, size in zip(places, sizes, strict=True):
        axes.text(100 * size, place, f" {100 * size:.1f} %", va="center", fontsize=7, color=INK)
    axes.invert_yaxis()
    axes.set_xticks([])
    axes.tick_params(left=False)
    axes.margins(x=0.14)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_title(f"{_cut(side.model.info.model)}: {len(side.listed)} of {side.fit.info.k} clusters, share of tokens",
                   loc="left", fontsize=9, fontweight="bold")


def _document(axes: Axes, side: Side, document: int, lines: Sequence[Sequence[Placed]], colours: dict[int, str]
              ) -> None:
    from matplotlib.patches import Rectangle

    own = side.clusters[side.model.bounds[document]:side.model.bounds[document + 1]]
    axes.set_xlim(0, COLUMNS)
    axes.set_ylim(len(lines), 0)
    axes.axis("off")
    for row, line in enumerate(lines):
        for token, column, text in line:
            axes.add_patch(Rectangle((column, row + 0.06), len(text), 0.88, linewidth=0,
                                     facecolor=colours.get(int(own[token]), REST)))
            axes.text(column, row + 0.54, text, family="DejaVu Sans Mono", fontsize=6.9, va="center", color=INK)
    (cluster, share), *_ = side.ranked(document)
    label = side.model.labels()[document]
    axes.set_title(f"document {document}{f' ({_cut(label, 16)})' if label else ''}: {100 * share:.0f} % in "
                   f"“{_cut(side.fit.names[cluster].label, 28)}”", loc="left", fontsize=8)


def _cut(name: str, most: int = 36) -> str:
    """A name as the figure has room for it."""
    shown = plain(name)
    return shown if len(shown) <= most else f"{shown[:most - 1]}…"
