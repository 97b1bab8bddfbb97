"""Metrics per document and their averages, with the published names and quirks.

Legend: s_i is the summed log-probability (natural logarithm) of choice i.
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from typing import Any

NO_ANSWER_SUM = -999.0  # the published runs record this sum where a model returned nothing


def mean(values: Iterable[Any]) -> float:
    """Average of the values that are there; nan where none is."""
    present = [float(value) for value in values if value is not None]
    return math.fsum(present) / len(present) if present else math.nan


def standard_error(values: Iterable[Any]) -> float:
    """Sample standard deviation over the square root of the number; nan for fewer than two values."""
    present = [float(value) for value in values if value is not None]
    if len(present) < 2:
        return math.nan
    centre = math.fsum(present) / len(present)
    return math.sqrt(math.fsum((value - centre) ** 2 for value in present) / (len(present) - 1) / len(present))


def first_largest(values: Sequence[float]) -> int:
    """Index of the largest value; the first one where several are equal."""
    return max(range(len(values)), key=lambda index: (values[index], -index))


# ---- multiple choice


def choice_output(
    continuation: str, response: Sequence[Any], unconditional: Sequence[Any] | None
) -> dict[str, Any]:
    """What is recorded of one choice. Characters and bytes are those of the continuation with its leading space."""
    total, tokens = float(response[0]), int(getattr(response, "num_tokens", 1))
    characters, size = len(continuation), len(continuation.encode())
    return {
        "sum_logits": total,
        "num_tokens": tokens,
        "num_tokens_all": int(getattr(response, "num_tokens_all", 1)),
        "is_greedy": bool(response[1]),
        **({} if unconditional is None else {"sum_logits_uncond": float(unconditional[0])}),
        "logits_per_token": total / max(tokens, 1),
        "logits_per_char": total / characters,
        "bits_per_byte": -total / (size * math.log(2)),
        "num_chars": characters,
    }


def choice_metrics(outputs: Sequence[Mapping[str, Any]], gold: int, *, softloss: bool) -> dict[str, Any]:
    """Metrics of one multiple-choice document from `choice_output` of each choice.

    Accuracies are 0 or 1; `acc_uncond` is None without unconditional requests. `softloss` adds the softmax
    probability of the gold choice under three normalisations. A choice without a token of its own, whose sum of
    nothing is 0 and would beat every other, comes last; where no choice has one, nothing is predicted.
    """
    columns = {name: [output[name] for output in outputs] for name in outputs[0]}
    columns = {name: _comparable_column(name, column, columns["num_tokens"]) for name, column in columns.items()}
    scores: dict[str, list[float] | None] = {
        "raw": columns["sum_logits"],
        "per_token": columns["logits_per_token"],
        "per_char": columns["logits_per_char"],
        "per_byte": [-bits for bits in columns["bits_per_byte"]],
        "uncond": _differences(columns),
    }
    best = {name: _best(values) for name, values in scores.items()}
    found = {f"acc_{name}": None if scores[name] is None else int(index == gold) for name, index in best.items()}
    losses = {"softloss_corr": "sum_logits", "softloss_per_token_corr": "logits_per_token",
              "softloss_per_char_corr": "logits_per_char"} if softloss else {}
    return {
        **{f"predicted_index_{name}": index for name, index in best.items()},
        "correct_choice": gold,
        **found,
        "no_answer": int(max(columns["sum_logits"]) == NO_ANSWER_SUM),
        **{f"{name}_corr": columns[name][gold] if math.isfinite(columns[name][gold]) else None
           for name in ("sum_logits", "logits_per_token", "logits_per_char", "bits_per_byte")},
        **{name: softmax_at(columns[column], gold) for name, column in losses.items()},
    }


def _comparable_column(name: str, column: list[Any], tokens: Sequence[int]) -> list[Any]:
    """The scores of all choices, the worst possible one for a choice without tokens."""
    worst = {"sum_logits": -math.inf, "logits_per_token": -math.inf, "logits_per_char": -math.inf,
             "bits_per_byte": math.inf}.get(name)
    return column if worst is None else [value if count else worst for value, count in zip(column, tokens, strict=True)]


def _best(values: Sequence[float] | None) -> int | None:
    return None if values is None or max(values) == -math.inf else first_largest(values)


def _differences(columns: Mapping[str, list[float]]) -> list[float] | None:
    if "sum_logits_uncond" not in columns:
        return None
    return [total - prior for total, prior in zip(columns["sum_logits"], columns["sum_logits_uncond"], strict=True)]


def softmax_at(values: Sequence[float], index: int) -> float:
    """Softmax of `values`, at one index."""
    top = max(values)
    if top == -math.inf:
        return 0.0
    return math.exp(values[index] - top) / math.fsum(math.exp(value - top) for value in values)


# ---- short answers, SQuAD v1 style

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise_squad(text: str) -> str:
    """Lower case without ASCII punctuation and articles, single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def squad_f1(prediction: str, reference: str) -> float:
    """Harmonic mean of token precision and recall; 0 without a common token."""
    predicted, expected = normalise_squad(prediction).split(), normalise_squad(reference).split()
    common = sum((Counter(predicted) & Counter(expected)).values())
    if not common:
        return 0.0
    precision, recall = common / len(predicted), common / len(expected)
    return 2 * precision * recall / (precision + recall)


def squad_metrics(prediction: str, references: Sequence[str]) -> dict[str, Any]:
    """The best over the references. `recall`: a reference occurs literally, in any case, in the prediction.

    As published, an empty reference has recall 1 whatever is predicted, and F1 0 even if nothing is.
    """
    expected = [normalise_squad(reference) for reference in references]
    return {
        "exact_match": normalise_squad(prediction) in expected,
        "f1": max(squad_f1(prediction, reference) for reference in references),
        "recall": float(any(reference.strip().lower() in prediction.lower() for reference in references)),
    }


def answer_metrics(prediction: str, references: Sequence[str]) -> dict[str, Any]:
    """`squad_metrics` with empty references taken at their word: only an empty prediction is right, in all metrics."""
    given = [reference for reference in references if normalise_squad(reference)]
    if normalise_squad(prediction) == "" and len(given) < len(references):
        return {"exact_match": True, "f1": 1.0, "recall": 1.0}
    return squad_metrics(prediction, given) if given else {"exact_match": False, "f1": 0.0, "recall": 0.0}


# ---- short answers, DROP style


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _drop_token(token: str) -> str:
    token = token.lower()
    if not _is_number(token):
        token = token.translate(_PUNCTUATION)
    if _is_number(token):
        token = str(float(token))
    return " ".join(_ARTICLES.sub(" ", token).split())


def normalise_drop(text: str) -> str:
    """Tokens split at spaces and hyphens; numbers as floats, other tokens without punctuation and articles."""
    return " ".join(part for part in map(_drop_token, re.split("[ -]", text)) if part)


def _bag_f1(predicted: set[str], expected: set[str]) -> float:
    """F1 of two sets of tokens; 0 where the expected numbers share nothing with the predicted ones."""
    numbers = {token for token in expected if _is_number(token)}
    if numbers and not numbers & predicted:
        return 0.0
    common = len(predicted & expected)
    precision = common / len(predicted) if predicted else 1.0
    recall = common / len(expected) if expected else 1.0
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def drop_metrics(prediction: str, references: Sequence[str | Sequence[str]]) -> dict[str, Any]:
    """The best over the references, each one span or a list of spans. The prediction is always one span.

    A reference whose first part (of a plain string: whose first character) is blank never counts, as published.
    """
    usable = [reference for reference in references if reference and reference[0].strip()]
    predicted = normalise_drop(prediction)
    scores = [_drop_score(predicted, [span] if isinstance(span, str) else span) for span in usable]
    return {
        "exact_match": max((exact for exact, _ in scores), default=0.0),
        "f1": max((f1 for _, f1 in scores), default=0.0),
    }


def _drop_score(predicted: str, spans: Sequence[str]) -> tuple[float, float]:
    """(exact match, f1) of one predicted span; it can be paired with only one of the expected spans."""
    expected = [normalise_drop(span) for span in spans]
    best = max(_bag_f1(set(predicted.split()), set(span.split())) for span in expected)
    return float(expected == [predicted]), round(best / len(expected), 2)


# ---- GSM8K

_NUMBER = re.compile(r"[-+]?\d*\.\d+|\d+")


def gsm8k_number(text: str) -> str:
    """The last number of a text without thousands separators; the whole text where there is none."""
    plain = re.sub(r"(\d),(\d)", r"\1\2", text)
    numbers = _NUMBER.findall(plain)
    return numbers[-1] if numbers else plain


def gsm8k_equal(prediction: str, reference: str) -> bool:
    """Equality without commas, dollar signs, anything up to `#### `, a final period, and case."""
    return _comparable(prediction) == _comparable(reference)


def _comparable(text: str) -> str:
    for pattern in (",", r"\$", r"(?s).*#### ", r"\.$"):
        text = re.sub(pattern, "", text)
    return text.lower()


# ---- numbers

_QUANTITY = re.compile(
    r"((?:(?<![\w.)\]])[-+−])?)(?:[$€£¥]\s?)?((?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)([eE][-+]?\d+)?"
)


def last_number(text: str) -> Decimal | None:
    """The value of the last number of a text; None where there is none.

    A sign counts unless it stands behind a letter, digit or bracket ("3-5" ends with 5, "= -5" with -5); currency
    signs and thousands separators do not, nor does what follows the number ("12.5%" is 12.5).
    """
    found = _QUANTITY.findall(text)
    if not found:
        return None
    sign, digits, exponent = found[-1]
    return Decimal(sign.replace("−", "-") + digits.replace(",", "") + exponent)


def cut_at_stop(text: str, stops: Iterable[str]) -> str:
    """`text` up to the earliest stop string; empty stop strings are ignored."""
    ends = [text.find(stop) for stop in stops if stop]
    return text[: min((end for end in ends if end >= 0), default=len(text))]
