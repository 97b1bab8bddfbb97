"""A user's task: a YAML file beside its data (docs/tasks.md has the guide).

Templates are Jinja in a sandbox and see only the fields of one row. Every row is read when the file is loaded, so
that a bad row is named before a model is loaded.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, model_validator

from emo_select.errors import DataMissingError, SpecError, TaskError
from emo_select.spec import Frozen, checked
from emo_select.tasks.base import PLACE, Row, SplitRule, Task, position
from emo_select.tasks.kinds import (
    Generate,
    MultipleChoice,
    Scorer,
    choice_doc,
    generation_doc,
    score_answer,
    score_drop,
    score_exact,
    score_gsm8k,
    score_number,
)
from emo_select.tasks.metrics import gsm8k_number, last_number
from emo_select.tasks.shots import first_rows, no_shots
from emo_select.tasks.sources import read_rows
from emo_select.tasks.splits import stored
from emo_select.textfile import read_yaml_mapping

Split = Literal["train", "validation", "test"]
Share = Annotated[float, Field(ge=0, le=1)]


class Shares(Frozen):
    """How the rows of one file are dealt to the splits, after a shuffle with `seed`."""

    train: Share = 0.0
    validation: Share = 0.0
    test: Share = 1.0
    seed: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _complete(self) -> Shares:
        if abs(self.train + self.validation + self.test - 1) > 1e-9:
            raise ValueError("the shares train, validation and test must add up to 1")
        return self


class TaskFile(Frozen):
    """The keys of a task file."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]
    kind: Literal["multiple_choice", "generation"]
    data: str | dict[Split, str]
    splits: Shares | None = None
    header: str = ""
    text: str
    choices: str | list[str] | None = None
    gold: str | None = None
    gold_is: Literal["index", "number", "letter", "text"] = "index"
    unconditional: bool = True
    answer: str | None = None
    references: str | list[str] | None = None
    score: Literal["exact", "number", "gsm8k", "squad", "drop"] = "exact"
    stops: list[Annotated[str, Field(min_length=1)]] = ["\n\n"]
    max_tokens: Annotated[int, Field(ge=1)] = 50
    shots: Annotated[int, Field(ge=0)] = 0
    shot_rows: Literal["leave_out", "keep"] = "leave_out"
    metric: str | None = None
    id: str | None = None

    @model_validator(mode="after")
    def _fits_its_kind(self) -> TaskFile:
        needed = {"multiple_choice": ("choices", "gold"), "generation": ("answer",)}
        for kind, names in needed.items():
            missing = [name for name in names if getattr(self, name) is None]
            if kind == self.kind and missing:
                raise ValueError(f"a {kind} task needs the key {missing[0]!r}")
            if kind != self.kind and len(missing) < len(names):
                raise ValueError(f"the keys {names} belong to {kind} tasks")
        if isinstance(self.data, str) and self.splits is None:
            raise ValueError("one data file needs 'splits', or give 'data' a file for each split")
        if isinstance(self.data, dict) and (self.splits is not None or "test" not in self.data):
            raise ValueError("'data' by split needs a test file and no 'splits'")
        return self


@dataclass(frozen=True)
class FileRows:
    """The rows of a task file's data, dealt to splits."""

    definition: TaskFile
    folder: Path

    @property
    def label(self) -> str:
        return ", ".join(dict.fromkeys(file.name for file in self._files().values()))

    @property
    def available(self) -> bool:
        return all(file.is_file() for file in self._files().values())

    def _files(self) -> Mapping[str, Path]:
        data = self.definition.data
        names = dict.fromkeys(("train", "validation", "test"), data) if isinstance(data, str) else data
        return {split: self.folder / name for split, name in names.items()}

    def require(self, task: str) -> None:
        for file in self._files().values():
            if not file.is_file():
                raise DataMissingError(f"Task {task}: there is no file {file}; correct 'data' in the task file.")

    def rows(self, split: str) -> Sequence[Row]:
        self.require(self.definition.name)
        rows = _numbered(self._files()[split])
        return rows if self.definition.splits is None else _dealt(rows, self.definition.splits)[split]

    def fingerprint(self) -> str:
        digest = hashlib.sha256(self.definition.model_dump_json().encode())
        for file in self._files().values():
            digest.update(file.read_bytes())
        return digest.hexdigest()


def _numbered(file: Path) -> list[Row]:
    return [{**row, PLACE: f"{file.name}, row {number}"} for number, row in enumerate(read_rows(file), 1)]


def _dealt(rows: Sequence[Row], shares: Shares) -> Mapping[str, Sequence[Row]]:
    order = [rows[index] for index in np.random.default_rng(shares.seed).permutation(len(rows))]
    first = round(shares.train * len(rows))
    second = first + round(shares.validation * len(rows))
    return {"train": order[:first], "validation": order[first:second], "test": order[second:]}


# ---- templates


@cache
def _template(source: str) -> tuple[Any, frozenset[str]]:
    """A compiled template and the fields that it names."""
    from jinja2 import StrictUndefined, TemplateError, meta
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
    try:
        names = meta.find_undeclared_variables(environment.parse(source))
        return environment.from_string(source), frozenset(names)
    except TemplateError as error:
        raise TaskError(f"the template {source!r} is not valid: {error}") from error


def render(source: str, row: Row) -> str:
    """A template filled with a row. Raises `TaskError` for a field that the row lacks or that is null."""
    from jinja2 import TemplateError

    template, names = _template(source)
    for name in sorted(names):
        field_of(row, name)
    try:
        return str(template.render(row))
    except (TemplateError, TypeError, ValueError, ArithmeticError) as error:
        raise TaskError(f"the template {source!r} cannot be filled: {error}") from error


def field_of(row: Row, name: str) -> Any:
    """A field of a row that must be there."""
    if name not in row:
        raise TaskError(f"there is no field {name!r} (it has {', '.join(key for key in row if key != PLACE)})")
    if row[name] is None or row[name] != row[name]:
        raise TaskError(f"the field {name!r} is {'null' if row[name] is None else 'not a number (NaN)'}")
    return row[name]


def texts(source: str | Sequence[str], row: Row) -> list[str]:
    """Several texts: a list of templates, or the name of a field that holds a list."""
    if not isinstance(source, str):
        return [render(one, row) for one in source]
    found = field_of(row, source)
    if not isinstance(found, list):
        raise TaskError(f"the field {source!r} is not a list; give a list of templates instead")
    if any(one is None or isinstance(one, (list, dict)) for one in found):
        raise TaskError(f"the field {source!r} holds a null, a list or an object where texts are expected")
    return [str(one) for one in found]


# ---- rows to documents


def _gold_index(definition: TaskFile, gold: str, choices: Sequence[str]) -> int:
    if definition.gold_is == "text":
        if gold not in choices:
            raise TaskError(f"the gold answer {gold!r} is none of the choices")
        return choices.index(gold)
    if definition.gold_is == "letter":
        if len(gold) != 1 or not gold.isalpha():
            raise TaskError(f"the gold answer {gold!r} is not a letter")
        return ord(gold.upper()) - ord("A")
    if not gold.lstrip("-").isdigit():
        raise TaskError(f"the gold answer {gold!r} is not a whole number")
    return int(gold) - (definition.gold_is == "number")


def _read_choices(definition: TaskFile) -> Callable[[Row], Mapping[str, Any]]:
    def read(row: Row) -> Mapping[str, Any]:
        choices = texts(definition.choices or [], row)
        gold = _gold_index(definition, render(definition.gold or "", row).strip(), choices)
        return choice_doc(render(definition.text, row), choices, gold)

    return read


def _read_generation(definition: TaskFile) -> Callable[[Row], Mapping[str, Any]]:
    def read(row: Row) -> Mapping[str, Any]:
        answer = render(definition.answer or "", row)
        references = [answer] if definition.references is None else texts(definition.references, row)
        if definition.score == "number":
            without = next((one for one in references if last_number(one) is None), None)
            if without is not None:
                raise TaskError(f"the reference {without!r} has no number, which 'score: number' compares")
        return generation_doc(render(definition.text, row), answer, references)

    return read


# ---- the task

SCORERS: Mapping[str, Scorer] = {"exact": score_exact, "number": score_number, "gsm8k": score_gsm8k,
                                 "squad": score_answer, "drop": score_drop}
EXTRACTED: Mapping[str, Callable[[str], str]] = {
    "number": lambda text: text if last_number(text) is None else str(last_number(text)), "gsm8k": gsm8k_number,
}
METRICS = {
    "multiple_choice": ("acc_raw", "acc_per_char", "acc_per_token", "acc_per_byte", "acc_uncond"),
    "exact": ("exact_match",), "number": ("exact_match",), "gsm8k": ("exact_match",),
    "squad": ("f1", "exact_match", "recall"),
    "drop": ("f1", "exact_match"),
}


def load_task_file(path: Path) -> Task:
    """The task of a YAML file, with all its rows read. Raises `TaskError` naming the file and the problem."""
    definition = read_definition(path)
    task = _build(definition, FileRows(definition, path.parent))
    task.require_data()
    for split in task.rule.present():
        task.docs(split)
    return task


def read_definition(path: Path) -> TaskFile:
    """The keys of a task file, checked."""
    plain = read_yaml_mapping(path, TaskError, "see docs/tasks.md")
    try:
        return checked(TaskFile, plain)
    except SpecError as error:
        raise TaskError(f"{path}: {error}") from error


def _build(definition: TaskFile, source: FileRows) -> Task:
    common: dict[str, Any] = {
        "name": definition.name, "group": "user", "sources": (source,), "rule": _rule(definition),
        "native_id": position if definition.id is None else lambda row, index: field_of(row, definition.id or ""),
        "shots": first_rows("train", definition.shots) if definition.shots else no_shots,
        "default_shots": definition.shots, "keeps_shot_rows": definition.shot_rows == "keep",
        "header": lambda group: definition.header,
        "primary_metric": _metric(definition),
        "delimiter": "Answer:" if definition.text.rstrip().endswith("Answer:") else None,
    }
    if definition.kind == "multiple_choice":
        return MultipleChoice(alias=f"{definition.name}:rc_test", read=_read_choices(definition),
                              unconditional=definition.unconditional, **common)
    return Generate(alias=f"{definition.name}:test", read=_read_generation(definition),
                    stops=tuple(definition.stops), max_tokens=definition.max_tokens,
                    score=SCORERS[definition.score],
                    extract=EXTRACTED.get(definition.score), **common)


def _rule(definition: TaskFile) -> SplitRule:
    data, shares = definition.data, definition.splits
    given = {split for split in ("train", "validation")
             if (split in data if shares is None else getattr(shares, split))}
    if definition.shots and "train" not in given:
        raise TaskError(f"Task {definition.name}: 'shots' are the first train rows, so a train split is needed.")
    return SplitRule(train=stored("train") if "train" in given else None, test=stored("test"),
                     validation=stored("validation") if "validation" in given else None)


def _metric(definition: TaskFile) -> str:
    known = METRICS["multiple_choice" if definition.kind == "multiple_choice" else definition.score]
    known = tuple(name for name in known if definition.unconditional or name != "acc_uncond")
    if definition.metric is None:
        return "acc_per_char" if "acc_per_char" in known else known[0]
    if definition.metric not in known:
        raise TaskError(f"Task {definition.name}: the metric {definition.metric!r} is not among {', '.join(known)}.")
    return definition.metric
