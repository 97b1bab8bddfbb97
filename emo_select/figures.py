"""What all figures share: matplotlib without a display, files that are the same for the same content, plain names."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emo_select.errors import UsageError
from emo_select.ownership import require_own_files
from emo_select.storage import write_output

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# a dollar sign in a name is a dollar sign; fonts go into the file as fonts; svg ids do not change from run to run
STYLE: dict[str, Any] = {"text.parse_math": False, "pdf.fonttype": 42, "svg.fonttype": "none",
                         "svg.hashsalt": "emo-select"}


def matplotlib() -> Any:
    """The library; a `UsageError` that names the extra where it is missing."""
    try:
        import matplotlib
    except ImportError:
        raise UsageError("Plots need matplotlib; install it with: pip install 'emo-select[plots]'.") from None
    return matplotlib


def new_figure(width: float, height: float) -> Figure:
    """An empty figure in inches, laid out so that nothing overlaps."""
    matplotlib()
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save(figure: Figure, path: Path, *, dpi: int = 300) -> Path:
    """Write a figure by rename, in the format of its suffix and without a date: equal figures are equal files.

    Raises `OwnershipError` where another's file stands.
    """
    suffix = path.suffix.lstrip(".")
    data = io.BytesIO()
    dated = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}.get(suffix)
    figure.savefig(data, format=suffix, dpi=dpi, metadata=dated)
    write_output(path, data.getvalue())
    return path


def save_all(figures: Mapping[Path, Figure]) -> list[Path]:
    """`save` every figure, or none where another's file stands at one of the places."""
    require_own_files(*figures)
    return [save(figure, path) for path, figure in figures.items()]


def plain(name: str) -> str:
    """A name as matplotlib may show it: one line, and not taken for a hidden legend entry."""
    line = " ".join(name.split())
    return f" {line}" if line.startswith("_") else line
