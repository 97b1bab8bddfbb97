"""The two kinds of tasks: multiple choice by log-likelihood, and generation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from emo_select.errors import TaskError
from emo_select.tasks import metrics as m
from emo_select.tasks.base import Doc, Request, Task

UNCONDITIONAL_CONTEXT = "Answer:"


def choice_doc(text: str, choices: Sequence[str], gold: int) -> dict[str, Any]:
    """A document whose choices all continue the same text: " " + choice."""
    return {"contexts": [text] * len(choices), "continuations": [f" {choice}" for choice in choices], "gold": gold}


def generation_doc(
    text: str, answer: str, references: Sequence[Any], *, shot_answer: str | None = None, **extra: Any
) -> dict[str, Any]:
    """A document to generate for. `answer` is trained on; `shot_answer` stands in few-shot examples."""
    shot = answer if shot_answer is None else shot_answer
    return {"context": text, "answer": answer, "shot_answer": shot, "references": list(references), **extra}


@dataclass(eq=False, kw_only=True)
class MultipleChoice(Task):
    """Cloze-style multiple choice. Documents have `contexts` and `continuations` (one each per choice) and `gold`.

    `unconditional` adds, per choice, the continuation after "Answer:" alone; `softloss` the softmax metrics;
    `report_no_answer` the count of documents without any log-probability.
    """

    kind: ClassVar[str] = "multiple_choice"

    unconditional: bool = True
    softloss: bool = True
    report_no_answer: bool = True

    def check(self, doc: Doc) -> None:
        count = len(doc["continuations"])
        if not count:
            raise TaskError("there are no choices")
        if not 0 <= doc["gold"] < count:
            raise TaskError(f"the gold choice is number {doc['gold'] + 1}, counted from 1, of {count} choices")

    def oddities(self, doc: Doc) -> list[str]:
        asked = list(zip(doc["contexts"], doc["continuations"], strict=True))
        found = ["duplicate_choices"] if len(set(asked)) < len(asked) else []
        return found + (["empty_choices"] if any(not text.strip() for _, text in asked) else [])

    def prompt(self, doc: Doc) -> str:
        return str(doc["contexts"][doc["gold"]])

    def answer(self, doc: Doc) -> str:
        return str(doc["continuations"][doc["gold"]])

    def shot(self, doc: Doc) -> str:
        return self.prompt(doc) + self.answer(doc)

    def requests(self, doc: Doc, num_shots: int | None = None) -> list[Request]:
        prefix = self.prefix(doc, num_shots)
        pairs = zip(doc["contexts"], doc["continuations"], strict=True)
        asked = [Request(prefix + context, continuation) for context, continuation in pairs]
        if self.unconditional:
            asked += [Request(UNCONDITIONAL_CONTEXT, continuation) for continuation in doc["continuations"]]
        return asked

    def prediction(self, doc: Doc, responses: Sequence[Any]) -> dict[str, Any]:
        continuations = doc["continuations"]
        priors = responses[len(continuations):] if self.unconditional else [None] * len(continuations)
        outputs = [m.choice_output(*each) for each in zip(continuations, responses, priors, strict=False)]
        return {
            "metrics": m.choice_metrics(outputs, doc["gold"], softloss=self.softloss),
            "model_output": outputs,
            "label": doc["gold"],
        }

    def aggregate(self, metrics: Sequence[Mapping[str, Any]], docs: Sequence[Doc]) -> dict[str, Any]:
        averages: dict[str, Any] = {
            name: m.mean(doc[name] for doc in metrics)
            for name in metrics[0]
            if name.startswith(("acc_", "softloss_")) or name.endswith("_corr")
        }
        if not self.unconditional:
            averages.pop("acc_uncond")
        averages["primary_score"] = averages[self.primary_metric]
        if self.report_no_answer:
            averages["extra_metrics"] = {"no_answer": m.mean(doc["no_answer"] for doc in metrics)}
        return averages


Scorer = Callable[[str, Doc], Mapping[str, Any]]


def score_squad(text: str, doc: Doc) -> Mapping[str, Any]:
    """exact_match, f1 and recall of SQuAD v1, the best over the references."""
    return m.squad_metrics(text, doc["references"])


def score_drop(text: str, doc: Doc) -> Mapping[str, Any]:
    """f1 and exact_match of DROP, the best over the references."""
    return m.drop_metrics(text, doc["references"])


def score_answer(text: str, doc: Doc) -> Mapping[str, Any]:
    """`score_squad` for references that may be empty."""
    return m.answer_metrics(text, doc["references"])


def score_number(text: str, doc: Doc) -> Mapping[str, Any]:
    """exact_match: the last number has the value of a reference's last number ("5.0" is 5, "-5" is not)."""
    value = m.last_number(text)
    return {"exact_match": float(value is not None and value in [m.last_number(str(r)) for r in doc["references"]])}


def score_gsm8k(text: str, doc: Doc) -> Mapping[str, Any]:
    """exact_match of the last number, as text, with that of the first reference; whole numbers lose their sign."""
    return {"exact_match": float(m.gsm8k_equal(m.gsm8k_number(text), m.gsm8k_number(str(doc["references"][0]))))}


def score_exact(text: str, doc: Doc) -> Mapping[str, Any]:
    """exact_match: equal to a reference after stripping white space."""
    return {"exact_match": float(text.strip() in [str(reference).strip() for reference in doc["references"]])}


@dataclass(eq=False, kw_only=True)
class Generate(Task):
    """Greedy generation. Documents have `context`, `answer`, `shot_answer` and `references`.

    `stops` end the output (the end-of-text token always does), at most `max_tokens` are generated. `extract` gives
    the recorded model answer; `report_length` adds token counts; `by` names a document key to report means by.
    """

    kind: ClassVar[str] = "generation"

    stops: tuple[str, ...]
    max_tokens: int
    score: Scorer
    extract: Callable[[str], str] | None = None
    report_length: bool = False
    by: str | None = None
    by_metrics: Iterable[str] = ("exact_match", "f1")

    def check(self, doc: Doc) -> None:
        if not doc["references"]:
            raise TaskError("there is no reference answer")

    def oddities(self, doc: Doc) -> list[str]:
        return [] if str(doc["answer"]).strip() else ["empty_answers"]

    def prompt(self, doc: Doc) -> str:
        return str(doc["context"])

    def answer(self, doc: Doc) -> str:
        text = str(doc["answer"])
        return text if text.startswith(" ") else f" {text}"

    def shot(self, doc: Doc) -> str:
        return f"{doc['context']} {doc['shot_answer']}"

    @property
    def max_new_tokens(self) -> int:
        return self.max_tokens

    @property
    def generation_options(self) -> dict[str, Any]:
        return {"until": list(self.stops), "max_gen_toks": self.max_tokens, "do_sample": False, "temperature": 0.0}

    def requests(self, doc: Doc, num_shots: int | None = None) -> list[Request]:
        return [Request(self.prefix(doc, num_shots) + self.prompt(doc))]

    def prediction(self, doc: Doc, responses: Sequence[Any]) -> dict[str, Any]:
        raw, tokens = str(responses[0]), getattr(responses[0], "num_tokens", None)
        text = m.cut_at_stop(raw, self.stops)
        output: dict[str, Any] = {"continuation": text, "num_tokens": tokens}
        if self.extract:
            output["model_answer"] = self.extract(text)
        metrics = dict(self.score(text, doc))
        if self.report_length:
            reached = None if tokens is None else tokens >= self.max_tokens - 1
            metrics |= {"max_tokens_reached": reached, "num_tokens": tokens}
        return {"metrics": metrics, "model_output": [output], "label": self.label(doc)}

    def label(self, doc: Doc) -> Any:
        """The recorded label: the references, or the only answer where an answer is extracted."""
        return doc["references"][0] if self.extract else doc["references"]

    def aggregate(self, metrics: Sequence[Mapping[str, Any]], docs: Sequence[Doc]) -> dict[str, Any]:
        lengths = ("num_tokens", "max_tokens_reached") if self.report_length else ()
        averages: dict[str, Any] = {}
        for name in (name for name in metrics[0] if name not in lengths):
            averages[name] = m.mean(doc[name] for doc in metrics)
            if name in self.by_metrics:
                averages |= self._by_part(name, metrics, docs)
        averages["primary_score"] = averages[self.primary_metric]
        if lengths:
            averages["extra_metrics"] = {name: m.mean(doc[name] for doc in metrics) for name in lengths}
        return averages

    def _by_part(self, name: str, metrics: Sequence[Mapping[str, Any]], docs: Sequence[Doc]) -> dict[str, float]:
        """Means of one metric over the documents that share the value of the key `by`, in order of appearance."""
        values: dict[str, list[Any]] = {}
        if self.by is None:
            return {}
        for doc, scores in zip(docs, metrics, strict=True):
            values.setdefault(f"{name}_sub_{doc[self.by]}", []).append(scores[name])
        return {key: m.mean(column) for key, column in values.items()}
