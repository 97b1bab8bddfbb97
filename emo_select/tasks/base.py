"""What a task is: documents per split, a prompt, an answer, requests and metrics, all from one definition.

Calibration texts, finetuning examples and evaluation requests are made by the same few methods, so they cannot
disagree. Nothing here imports torch or lm_eval; `harness.py` does.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, time
from decimal import Decimal
from math import isfinite
from typing import Any, ClassVar, Protocol

from emo_select.errors import TaskError, UnknownNameError
from emo_select.progress import say_once
from emo_select.tasks.headline import HEADLINES

Row = Mapping[str, Any]  # one row of a data set, as stored
Doc = Mapping[str, Any]  # one document: what a row means to the task; JSON values only
SPLITS = ("train", "validation", "test")
PLACE = "_row"  # key under which a source may say where a row stands in its file, for messages


@dataclass(frozen=True)
class Example:
    """A text to calibrate or train on: `prompt + answer`. `group` is the MMLU subject, else empty."""

    prompt: str
    answer: str
    group: str = ""

    @property
    def text(self) -> str:
        return self.prompt + self.answer


@dataclass(frozen=True)
class Request:
    """One question to the model. `continuation` is None for generation."""

    context: str
    continuation: str | None = None


class Source(Protocol):
    """A data set: rows per split, in the order of the published files."""

    @property
    def label(self) -> str:
        """How the data set is called in listings and messages."""

    @property
    def available(self) -> bool:
        """Whether the data can be read without the network."""

    def rows(self, split: str) -> Sequence[Row]:
        """All rows of a split. Raises `DataMissingError`."""

    def require(self, task: str) -> None:
        """Raise `DataMissingError`, naming the command that fetches the data of `task`, if it cannot be read."""

    def fingerprint(self) -> str:
        """A digest that changes when the data changes."""


Sources = Sequence[Source]
Rows = Callable[[Sources], Sequence[Row]]


@dataclass(frozen=True)
class SplitRule:
    """Which rows, in which order, make up each split. Without `validation`, calibration uses the train split.

    Without `train`, the task can be evaluated, and calibrated on if it has `validation`, but not trained on.
    """

    train: Rows | None
    test: Rows
    validation: Rows | None = None

    def present(self) -> list[str]:
        """The splits that have rows of their own."""
        return [split for split in SPLITS if getattr(self, split)]


def position(row: Row, index: int) -> Any:
    """Native id of data sets without an id: the position in the split."""
    return index


def id_field(name: str) -> Callable[[Row, int], Any]:
    """Native id taken from a field of the row."""
    return lambda row, index: row[name]


def constant_id(value: int | None) -> Callable[[Row, int], Any]:
    """The same native id for every document, where the published runs have none."""
    return lambda row, index: value


def no_shots(task: Task) -> Mapping[str, Sequence[Doc]]:
    """For tasks that are only asked zero-shot."""
    return {}


def no_header(group: str) -> str:
    return ""


def one_to_one(row: Row) -> Sequence[Row]:
    return [row]


def _plain_id(found: Any) -> Any:
    """An id as result files can hold it: dates and decimals as text. Raises `TaskError` for what is no id."""
    if isinstance(found, date | time | Decimal):
        return str(found)
    if found is None or isinstance(found, str | int) or (isinstance(found, float) and isfinite(found)):
        return found
    raise TaskError(f"the id {str(found)[:40]!r} ({type(found).__name__}) is neither a text nor a number")


@dataclass(eq=False, kw_only=True)
class Task(ABC):
    """One task.

    `read` turns a row into a document (see the subclasses for its keys); `group_of` names the part of the task that
    shares a header and shots (the MMLU subject). `shots` gives the few-shot documents per such part, in order.
    `keeps_shot_rows`: rows that are shots are calibrated and trained on too, as published, although their prompt shows
    the answer.
    `header` is the description in front of the shots. `delimiter` is the text after which finetuning labels begin;
    None trains on every token. `sizes` are the published numbers of (train, test) documents.
    """

    kind: ClassVar[str]

    name: str
    alias: str
    group: str
    sources: tuple[Source, ...]
    rule: SplitRule
    read: Callable[[Row], Mapping[str, Any]]
    primary_metric: str
    default_shots: int = 0
    native_id: Callable[[Row, int], Any] = position
    group_of: Callable[[Row], str] = field(default=lambda row: "")
    expand: Callable[[Row], Sequence[Row]] = one_to_one
    shots: Callable[[Task], Mapping[str, Sequence[Doc]]] = no_shots
    keeps_shot_rows: bool = True
    header: Callable[[str], str] = no_header
    delimiter: str | None = "Answer:"
    sizes: tuple[int, int] | None = None
    file: str | None = None
    """The absolute path of the task file, for tasks of a user's own."""
    parts: Callable[[], Sequence[Task]] = field(default=lambda: ())
    _docs: dict[str, list[Doc]] = field(default_factory=dict, init=False, repr=False)
    _shots: Mapping[str, Sequence[Doc]] | None = field(default=None, init=False, repr=False)
    _prefixes: dict[tuple[str, int], str] = field(default_factory=dict, init=False, repr=False)

    # ---- data

    @property
    def dataset(self) -> str:
        """The data set's name for listings, without the configuration where there are several."""
        first = self.sources[0].label
        return first if len(self.sources) == 1 else f"{first.rpartition('/')[0]} ({len(self.sources)} parts)"

    @property
    def available(self) -> bool:
        """Whether the data can be read without the network."""
        return all(source.available for source in self.sources)

    def require_data(self) -> None:
        """Raise `DataMissingError` if the data cannot be had; call it before anything expensive."""
        for source in self.sources:
            source.require(self.name)

    def fingerprint(self) -> str:
        """A digest of the data and of the first prompts; it changes when either changes."""
        digest = hashlib.sha256(repr((self.name, self.kind, self.primary_metric)).encode())
        for source in self.sources:
            digest.update(source.fingerprint().encode())
        for example in self.examples("test", limit=3):
            digest.update(example.text.encode())
        return digest.hexdigest()

    def docs(self, split: str) -> Sequence[Doc]:
        """Documents of "train", "validation" (calibration) or "test", in the published order."""
        if split not in SPLITS:
            raise UnknownNameError("split", split, SPLITS)
        if split == "validation" and self.rule.validation is None:
            split = "train"
        if split not in self._docs:
            self._docs[split] = self._read_split(split)
        return self._docs[split]

    def _read_split(self, split: str) -> list[Doc]:
        choose: Rows | None = getattr(self.rule, split)
        if choose is None:
            raise TaskError(f"Task {self.name} has no {split} split to calibrate or train on; give texts of your own "
                            "with --calibration FILE, and evaluate without finetuning.")
        rows = [part for row in choose(self.sources) for part in self.expand(row)]
        if not rows:
            raise TaskError(f"Task {self.name} has no {split} rows ({self.dataset}).")
        self._compare_size(split, len(rows))
        return [self.document(row, index, split) for index, row in enumerate(rows)]

    def _compare_size(self, split: str, count: int) -> None:
        expected = dict(zip(("train", "test"), self.sizes or (), strict=False)).get(split, count)
        if expected != count:
            say_once(f"Warning: {self.name} has {count} {split} documents here, {expected} in the published runs; "
                     "numbers are not comparable.")

    def document(self, row: Row, index: int, split: str) -> Doc:
        """The document of one row. Raises `TaskError` naming the row and the field."""
        try:
            doc = {"native_id": _plain_id(self.native_id(row, index)), "group": self.group_of(row), **self.read(row)}
            self.check(doc)
        except (TaskError, KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            where = row.get(PLACE, f"{split} row {index + 1}")
            raise TaskError(f"Task {self.name}, {where}: {_reason(error)}.") from error
        return doc

    def remarks(self, docs: Sequence[Doc]) -> dict[str, list[int]]:
        """Positions of documents that are evaluated but odd, by what is odd about them; nothing is dropped."""
        found: dict[str, list[int]] = {}
        for index, doc in enumerate(docs):
            for remark in self.oddities(doc):
                found.setdefault(remark, []).append(index)
        return found

    def subtasks(self) -> Sequence[Task]:
        """The tasks this one is made of (MMLU subjects); their test documents are those of this task, by group."""
        return self.parts()

    # ---- texts

    def prefix(self, doc: Doc, num_shots: int | None = None) -> str:
        """Header and few-shot block in front of a document's own prompt; the same for all documents of a group."""
        count = self.default_shots if num_shots is None else num_shots
        key = (str(doc["group"]), count)
        if key not in self._prefixes:
            self._prefixes[key] = self._prefix(*key)
        return self._prefixes[key]

    def _prefix(self, group: str, count: int) -> str:
        if not count:
            return self.header(group)
        shots = self.shot_docs().get(group, ())
        if not 0 < count <= len(shots):
            usable = f"0 to {len(shots)}" if shots else "0"
            raise TaskError(f"Task {self.name} has {len(shots)} few-shot examples, not {count}; "
                            f"use --num-shots {usable}.")
        return self.header(group) + "".join(self.shot(doc) + "\n\n" for doc in shots[:count])

    def shot_docs(self) -> Mapping[str, Sequence[Doc]]:
        """The few-shot documents, in order, per group."""
        if self._shots is None:
            self._shots = self.shots(self)
        return self._shots

    def examples(self, split: str, num_shots: int | None = None, limit: int | None = None, *,
                 leave_out_shots: bool = False) -> list[Example]:
        """Calibration or finetuning texts: few-shot prompt and gold answer of the first `limit` documents.

        With `leave_out_shots`, or for a task that does not keep them, without the documents that their own prompt
        shows as an example, answer included. The test split is never thinned.
        """
        shown = set() if split == "test" or (self.keeps_shot_rows and not leave_out_shots) else self._shown(num_shots)
        docs = [doc for doc in self.docs(split) if not shown or (doc["group"], self.shot(doc)) not in shown]
        if not docs:
            raise TaskError(f"Every {split} row of task {self.name} is a few-shot example, and these are left out; add "
                            "rows, lower the number of shots, or keep them with `shot_rows: keep`.")
        return [
            Example(self.prefix(doc, num_shots) + self.prompt(doc), self.answer(doc), doc["group"])
            for doc in docs[:limit]
        ]

    def _shown(self, num_shots: int | None) -> set[tuple[str, str]]:
        """Group and text of the few-shot examples in the prompts."""
        count = self.default_shots if num_shots is None else num_shots
        return {(group, self.shot(doc)) for group, docs in self.shot_docs().items() for doc in docs[:count]}

    @abstractmethod
    def check(self, doc: Doc) -> None:
        """Raise `TaskError` (a clause) for a document that cannot be asked."""

    @abstractmethod
    def oddities(self, doc: Doc) -> list[str]:
        """What is odd about a document that can be asked all the same."""

    @abstractmethod
    def prompt(self, doc: Doc) -> str:
        """The document's own part of the prompt, up to where the answer begins."""

    def question_hash(self, doc: Doc) -> str:
        """Which question a document asks, whatever its place, its shots and its id: 16 hexadecimal digits."""
        return hashlib.sha256(self.prompt(doc).encode()).hexdigest()[:16]

    @abstractmethod
    def answer(self, doc: Doc) -> str:
        """The gold answer as it continues the prompt (it begins with its space)."""

    @abstractmethod
    def shot(self, doc: Doc) -> str:
        """The document as a few-shot example."""

    # ---- evaluation

    @property
    def generation_options(self) -> dict[str, Any]:
        """Options of a generation request, as lm-eval names them; empty for multiple choice."""
        return {}

    @property
    def max_new_tokens(self) -> int | None:
        """Tokens that a generation may have; None for multiple choice. Needs no data."""
        return None

    @property
    def headline_metric(self) -> str:
        """The metric that stands for this task wherever one number is shown."""
        return HEADLINES.get(self.group, self.primary_metric)

    @abstractmethod
    def requests(self, doc: Doc, num_shots: int | None = None) -> list[Request]:
        """What the model is asked about a document."""

    @abstractmethod
    def prediction(self, doc: Doc, responses: Sequence[Any]) -> dict[str, Any]:
        """Score the responses to `requests(doc)`, in order: {"metrics": …, "model_output": […], "label": …}.

        A log-likelihood response is (sum, is_greedy), a generation a string; both may carry `num_tokens`
        (see `LogLikelihood` and `Generation`).
        """

    @abstractmethod
    def aggregate(self, metrics: Sequence[Mapping[str, Any]], docs: Sequence[Doc]) -> dict[str, Any]:
        """Published metrics of many documents, each averaged over documents, with `primary_score`."""

    def standard_errors(self, metrics: Sequence[Mapping[str, Any]], docs: Sequence[Doc]) -> dict[str, float]:
        """Standard error of the mean of every metric that `aggregate` averages (sample deviation / sqrt(n))."""
        from emo_select.tasks.metrics import standard_error

        averaged = self.aggregate(metrics, docs)
        names = [name for name in averaged if metrics and name in metrics[0]] + ["primary_score"]
        column = {"primary_score": self.primary_metric}
        return {name: standard_error([doc[column.get(name, name)] for doc in metrics]) for name in names}


def _reason(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"the field {error.args[0]!r} is missing"
    if isinstance(error, TaskError):
        return str(error)
    return f"{type(error).__name__}: {error}"


class LogLikelihood(tuple[float, bool]):
    """(sum of log-probabilities, is greedy) with the number of continuation and of all tokens."""

    num_tokens: int
    num_tokens_all: int

    def __new__(cls, logprob: float, greedy: bool, num_tokens: int = 1, num_tokens_all: int = 1) -> LogLikelihood:
        self = super().__new__(cls, (logprob, greedy))
        self.num_tokens, self.num_tokens_all = num_tokens, num_tokens_all
        return self


class Generation(str):
    """Generated text, cut at the first stop string, with the number of tokens generated."""

    num_tokens: int

    def __new__(cls, text: str, num_tokens: int = 0) -> Generation:
        self = super().__new__(cls, text)
        self.num_tokens = num_tokens
        return self
