"""One HTML file about a tree: data, style and script inside it, nothing fetched, everything from files shown as text.

The data is JSON, compressed and in base64, so no name can end the script element; the script builds the page with
text nodes only; the page's own policy forbids every other script and every request.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import html
import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from string import Template
from typing import Any

from emo_select import __version__
from emo_select.progress import track
from emo_select.storage import write_output
from emo_select.tables.details import Details
from emo_select.tables.layout import Layout
from emo_select.tables.pool import Estimate, estimate, results_of
from emo_select.tables.read import Problem, Records, Run
from emo_select.tables.summary import SummaryRow, experts_of, is_full, summarise

ASSETS = Path(__file__).with_name("assets")
SUMMARY = ("model", "keep", "full", "method", "note", "group", "metric", "found", "tasks", "seeds", "documents",
           "before", "after", "drop_before", "drop_after", "disk", "memory")
RUNS = ("directory", "model", "task", "group", "keep", "full", "method", "note", "eval_shots", "seed", "metric",
        "documents", "before", "after", "seconds", "disk", "problems")


def write_report(records: Records, layout: Layout, path: Path, *, title: str = "Expert selection: results",
                 examples: int = 5) -> None:
    """Write the report about `records` to `path` by rename. `examples`: changed predictions shown per run."""
    write_output(path, page(report_data(records, layout, examples=examples), title).encode())


def report_data(records: Records, layout: Layout, *, examples: int = 5) -> dict[str, Any]:
    """All the data of the page, as plain JSON values."""
    layout = layout.naming(records.models)
    experts = experts_of(records, layout)
    rows, problems = summarise(records, layout)
    every = [*records.problems, *problems]
    metrics = {row.group: row.metric for row in rows}
    details = Details(records, layout, experts, examples)
    with track("Reading runs", total=len(records.runs)) as bar:
        described = []
        for run in records.runs:
            described.append(details.of(run))
            bar.advance()
    return {
        "about": _about(records),
        "models": _labels((run.setting.model for run in records.runs), layout.models, layout.model),
        "methods": _labels((run.setting.method for run in records.runs), layout.methods, _method(layout)),
        "groups": _labels((layout.group_of(run.task) for run in records.runs), layout.groups, layout.group),
        "summary": {"columns": SUMMARY, "rows": [_summary(row) for row in rows]},
        "runs": {"columns": RUNS, "rows": list(_runs(records.runs, layout, experts, metrics, every))},
        "problems": {"columns": ("kind", "where", "problem"), "rows": [(p.kind, p.path, p.message) for p in every]},
        "details": described,
    }


def page(data: dict[str, Any], title: str) -> str:
    """The HTML text around the data."""
    style, script = ((ASSETS / name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    packed = gzip.compress(json.dumps(data, separators=(",", ":"), allow_nan=False).encode(), compresslevel=6, mtime=0)
    return Template((ASSETS / "report.html").read_text(encoding="utf-8")).substitute(
        title=html.escape(title), style=style, script=script, style_hash=_hash(style), script_hash=_hash(script),
        data=base64.b64encode(packed).decode(),
    )


def _hash(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _about(records: Records) -> dict[str, Any]:
    return {
        "root": str(records.root), "version": __version__,
        "written": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"), "runs": len(records.runs),
        "models": len({run.setting.model for run in records.runs}), "tasks": len({run.task for run in records.runs}),
    }


def _labels(names: Iterable[str], known: Any, label: Any) -> list[tuple[str, str]]:
    return [(name, label(name)) for name in Layout.ordered(names, known)]


def _method(layout: Layout) -> Any:
    return lambda name: name if layout.method(name).label == name else f"{name} ({layout.method(name).label})"


def _summary(row: SummaryRow) -> list[Any]:
    setting = row.setting
    return [
        setting.model, setting.keep_k, row.full, setting.method, setting.note(), row.group, row.metric, row.found,
        row.tasks, max(e.seeds if e else 1 for e in (row.before, row.after)), row.documents,
        _pair(row.before), _pair(row.after),
        _number(row.drop_before), _number(row.drop_after), row.disk_bytes, row.memory_bytes,
    ]


def _pair(value: Estimate | None) -> tuple[float, float | None] | None:
    return (value.value, value.error) if value and math.isfinite(value.value) else None


def _number(value: float | None) -> float | None:
    """JSON has no NaN."""
    return value if value is not None and math.isfinite(value) else None


def _runs(runs: Sequence[Run], layout: Layout, experts: dict[str, int], metrics: dict[str, str],
          problems: Sequence[Problem]) -> Iterable[list[Any]]:
    counts = Counter("/".join(Path(problem.path).parts[:2]) for problem in problems)
    for run in runs:
        s, group = run.setting, layout.group_of(run.task)
        metric = metrics.get(group) or layout.headline(group, results_of([run]))
        values = [estimate(result, metric) if result else None for result in (run.before, run.after)]
        documents = next((value.documents for value in values if value), None)
        yield [run.directory, s.model, run.task, group, s.keep_k, is_full(s, experts), s.method, s.note(), s.eval_shots,
               run.seed, metric, documents, *map(_pair, values), run.seconds, run.disk_bytes, counts[run.directory]]
