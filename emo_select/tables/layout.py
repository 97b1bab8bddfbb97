"""Names, order and groups: what a table calls things. Shipped in labels.yaml, overlaid by a user's own file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emo_select.errors import SpecError, UnknownNameError
from emo_select.spec import Frozen, checked, model_directory
from emo_select.textfile import read_yaml_mapping

if TYPE_CHECKING:
    from emo_select.tables.read import Result

PRIMARY = "primary_score"  # repeats a task's primary metric, whichever that is


class ModelLabel(Frozen):
    """How one model folder is shown."""

    label: str | None = None
    experts: int | None = None
    """Experts per layer of the unpruned model: the keep-k that counts as full."""
    parameters: tuple[int, int] | None = None
    """Parameters outside the routed and shared experts, and per expert over all layers (its router row included)."""
    keep_ks: tuple[int | None, ...] | None = None
    """Rows of the published tables; null is a run folder that is named by its task alone."""
    one_row: bool = False
    """The model skips selection: its row carries no keep-k."""
    published: bool = False
    ablation: bool = False


class MethodLabel(Frozen):
    """How one selection method is shown."""

    short: str
    label: str | None = None
    """In plots, the report and tables of found rows; by default the method's own name."""
    published: str | None = None
    """In the published calibration table, which has rows for these methods."""


class Group(Frozen):
    """Tasks that are averaged together."""

    tasks: tuple[str, ...]
    left_out: tuple[str, ...] = ()
    """Tasks with a column of their own that never enter an average."""
    label: str | None = None
    average: str | None = None
    metric: str = PRIMARY
    """What the paper reports for this group."""


class Published(Frozen):
    """The runs that the published scripts look for."""

    batch_size: int
    learning_rate: str
    epochs: float
    keep_ks: tuple[int, ...]
    ablation_keep_ks: tuple[int, ...]
    ablation_groups: tuple[str, ...]
    ablation_examples: tuple[int, ...]
    seeds: tuple[int, ...]
    metrics: tuple[str, ...]


class Layout(Frozen):
    """All labels. Mappings keep the order of their file."""

    models: dict[str, ModelLabel]
    methods: dict[str, MethodLabel]
    groups: dict[str, Group]
    published: Published
    tasks: dict[str, str] = {}
    """Task -> label."""

    def model(self, name: str) -> str:
        """Label of a model folder, else the folder's name."""
        found = self.models.get(name)
        return (found.label if found else None) or name

    def naming(self, models: Mapping[str, str]) -> Layout:
        """The same labels, with names for model folders that have none here."""
        added = {folder: ModelLabel(label=name) for folder, name in sorted(models.items()) if folder not in self.models}
        return self.model_copy(update={"models": {**self.models, **added}})

    def leading_with(self, models: Sequence[str]) -> Layout:
        """The same labels, with these model folders first, in this order."""
        first = {name: self.models.get(name) or ModelLabel() for name in models}
        return self.model_copy(update={"models": {**first, **self.models}})

    def method(self, name: str) -> MethodLabel:
        """Labels of a method, its name where it has none."""
        found = self.methods.get(name) or MethodLabel(short=name)
        return found if found.label else found.model_copy(update={"label": name})

    def group(self, name: str) -> str:
        """Label of a group."""
        found = self.groups.get(name)
        return (found.label if found else None) or name

    def group_of(self, task: str) -> str:
        """The group a task belongs to; a task in no group is a group of its own."""
        return _group_of(tuple((name, group.tasks) for name, group in self.groups.items()), task)

    def metric_of(self, group: str) -> str:
        """The metric that the paper reports for a group."""
        return self.groups[group].metric if group in self.groups else PRIMARY

    def headline(self, group: str, results: Iterable[Result]) -> str:
        """The metric that stands for a group: its own if any result has it, else the primary one that all share."""
        found, wanted = list(results), self.metric_of(group)
        if wanted != PRIMARY and any(wanted in result.metrics for result in found):
            return wanted
        primaries = {result.primary for result in found}
        only = primaries.pop() if len(primaries) == 1 else None
        return only if only and any(only in result.metrics for result in found) else PRIMARY

    def averaged(self, task: str) -> bool:
        """Whether a task enters its group's average."""
        found = self.groups.get(self.group_of(task))
        return found is None or task not in found.left_out

    def members(self, group: str, found: Iterable[str]) -> list[str]:
        """The tasks that a group's average stands for: those it lists, found or not, and found ones by pattern."""
        listed = self.groups[group].tasks if group in self.groups else ()
        names = [task for task in listed if not any(sign in task for sign in "*?[")]
        here = [task for task in found if self.group_of(task) == group]
        return [task for task in self.grouped([*names, *here]).get(group, []) if self.averaged(task)]

    def grouped(self, tasks: Iterable[str]) -> dict[str, list[str]]:
        """Tasks by group, groups and tasks in the order of the file, unknown ones last and sorted."""
        by_group: dict[str, list[str]] = {}
        for task in dict.fromkeys(tasks):
            by_group.setdefault(self.group_of(task), []).append(task)
        return {name: sorted(by_group[name], key=lambda task: self._task_order(name, task))
                for name in self.ordered(by_group, self.groups)}

    @staticmethod
    def ordered(names: Iterable[str], known: Mapping[str, Any]) -> list[str]:
        """Names in the order of `known`, the others behind them, sorted."""
        place = {name: index for index, name in enumerate(known)}
        return sorted(set(names), key=lambda name: (place.get(name, len(place)), name))

    def _task_order(self, group: str, task: str) -> tuple[int, str]:
        patterns = self.groups[group].tasks if group in self.groups else ()
        return next((i for i, pattern in enumerate(patterns) if fnmatchcase(task, pattern)), len(patterns)), task


@cache
def _group_of(groups: tuple[tuple[str, tuple[str, ...]], ...], task: str) -> str:
    return next((name for name, patterns in groups if any(fnmatchcase(task, p) for p in patterns)), task)


def load_layout(path: str | Path | None = None) -> Layout:
    """The shipped labels, overlaid by those of `path`; a wrong key is a `SpecError` naming the near match."""
    base = _read(Path(__file__).with_name("labels.yaml"))
    return checked(Layout, _overlay(base, _read(Path(path))) if path else base)


def _overlay(base: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    unknown = next((key for key in own if key not in Layout.model_fields), None)
    if unknown is not None:
        raise UnknownNameError("key", str(unknown), Layout.model_fields)
    merged = dict(base)
    for part, entries in own.items():
        if not isinstance(entries, dict):
            raise SpecError(f"{part} must map names to labels, such as `{part}: {{name: …}}` (got {entries!r}).")
        if part == "models":
            entries = {model_directory(str(name)): value for name, value in entries.items()}
        old = base.get(part, {})
        if part != "tasks":
            entries = {name: {"label": value} if isinstance(value, str) else value for name, value in entries.items()}
        merged[part] = {str(name): _joined(old.get(name), value) for name, value in entries.items()}
        merged[part] |= {name: value for name, value in old.items() if name not in entries}
    return merged


def _joined(old: Any, new: Any) -> Any:
    return {**old, **new} if isinstance(old, dict) and isinstance(new, dict) else new


def _read(path: Path) -> dict[str, Any]:
    return read_yaml_mapping(path, SpecError, "a labels file has keys such as models, methods, groups")
