"""Training examples as tokens: which are trained on, which are masked, which are left out and why.

Shapes: N examples, T tokens of one example (its end-of-sequence token included).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from emo_select.errors import ModelError, TaskError, UsageError
from emo_select.models.chat import render_chat, require_conversation
from emo_select.textfile import read_json_lines

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from emo_select.tasks import Example

IGNORED = -100  # the label that no loss counts
_BATCH = 1000  # texts per call of the tokenizer: enough for its threads, little memory


@dataclass(frozen=True)
class TokenSet:
    """N tokenised examples, flat: example i is `ids[offsets[i]:offsets[i + 1]]`."""

    ids: NDArray[np.int32]
    trained: NDArray[np.bool_]
    """Whether the token is a label."""
    offsets: NDArray[np.int64]
    dropped: Mapping[str, int] = field(default_factory=dict)
    """Examples left out, by reason."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        """`input_ids` and `labels` of one example, as lists of T integers."""
        part = slice(int(self.offsets[index]), int(self.offsets[index + 1]))
        ids = self.ids[part]
        return {"input_ids": ids.tolist(), "labels": np.where(self.trained[part], ids, IGNORED).tolist()}

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens per example."""
        return np.diff(self.offsets)


@dataclass(frozen=True)
class Text:
    """One example before tokenisation."""

    text: str
    spans: tuple[tuple[int, int], ...] = ()
    """Character ranges whose tokens are trained; unused where `masked_until` is set."""
    answer: int = 0
    """Character at which the last answer begins."""
    masked_until: int | None = None
    """Task examples: the delimiter in the prompt ends here; -1 if the prompt has none."""


def encode_examples(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, delimiter: str | None, max_length: int
) -> TokenSet:
    """Tokenise task examples; labels begin after the last `delimiter` (EMO paper, finetuning appendix).

    The delimiter is looked for as a token sequence, as the published recipe does, and, because a tokenizer may merge
    it with its neighbours, also as the characters that end the prompt; the later of the two counts. Without a
    delimiter every token is trained. Texts lose what exceeds `max_length` tokens; one whose delimiter is lost with it
    is dropped and counted. Raises `TaskError` when an answer alone exceeds `max_length`, `UsageError` when no example
    is left.
    """
    return _encode((_task_text(example, delimiter) for example in examples), tokenizer, delimiter, max_length)


def encode_file(path: Path, tokenizer: PreTrainedTokenizerBase, max_length: int) -> TokenSet:
    """Tokenise own examples: JSONL rows with `prompt` and `completion`, or with chat `messages`.

    Completions and assistant turns are trained. Errors as `encode_examples`, and `TaskError` naming the line.
    """
    return _encode(_file_texts(path, tokenizer), tokenizer, None, max_length)


def from_lists(rows: Iterable[Mapping[str, Sequence[int]]]) -> TokenSet:
    """Examples that are tokens already: `input_ids` and `labels` (-100 where not trained)."""
    ids, trained = [], []
    for row in rows:
        ids.append(np.asarray(row["input_ids"], np.int32))
        trained.append(np.asarray(row["labels"]) != IGNORED)
    return _assemble(ids, trained, {})


def _encode(
    texts: Iterable[Text], tokenizer: PreTrainedTokenizerBase, delimiter: str | None, max_length: int
) -> TokenSet:
    eos = tokenizer.eos_token_id
    if eos is None:
        raise ModelError("The tokenizer has no end-of-sequence token, so a model cannot learn to stop; set eos_token.")
    needle = tokenizer.encode(delimiter, add_special_tokens=False) if delimiter else []
    ids: list[NDArray[np.int32]] = []
    trained: list[NDArray[np.bool_]] = []
    dropped: dict[str, int] = {}
    for number, (text, tokens, ends) in enumerate(_tokenised(texts, tokenizer)):
        _require_fitting_answer(number, text, ends, max_length)
        mask = _label_mask(text, tokens, ends, needle)
        if mask is None:
            reason = f"no {delimiter!r} before the answer"
        elif not mask[:max_length].any():
            reason = f"the answer begins after the first {max_length} tokens"
        else:
            _append(ids, trained, tokens[:max_length], mask[:max_length], int(eos))
            continue
        dropped[reason] = dropped.get(reason, 0) + 1
    if not ids:
        why = "; ".join(f"{count} dropped: {reason}" for reason, count in dropped.items()) or "the data is empty"
        raise UsageError(f"No training example is left ({why}); raise --max-length or choose other data.")
    return _assemble(ids, trained, dropped)


def _append(
    ids: list[NDArray[np.int32]],
    trained: list[NDArray[np.bool_]],
    tokens: NDArray[np.int32],
    mask: NDArray[np.bool_],
    eos: int,
) -> None:
    """Store one example with its trained end-of-sequence token (a chat template may have written it already)."""
    if tokens[-1] != eos:
        tokens, mask = np.append(tokens, np.int32(eos)), np.append(mask, True)
    ids.append(tokens)
    trained.append(mask)


def _assemble(ids: list[NDArray[np.int32]], trained: list[NDArray[np.bool_]], dropped: dict[str, int]) -> TokenSet:
    offsets = np.concatenate([[0], np.cumsum([len(part) for part in ids])]).astype(np.int64)
    return TokenSet(np.concatenate(ids), np.concatenate(trained), offsets, dropped)


def _tokenised(
    texts: Iterable[Text], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[Text, NDArray[np.int32], NDArray[np.int64]]]:
    """Each text with its tokens and, per token, the end of its characters."""
    stream = iter(texts)
    while some := list(islice(stream, _BATCH)):
        made = tokenizer(
            [text.text for text in some], add_special_tokens=False, return_offsets_mapping=True, truncation=False,
            verbose=False,
        )  # fmt: skip
        for text, tokens, spans in zip(some, made["input_ids"], made["offset_mapping"], strict=True):
            yield text, np.asarray(tokens, np.int32), np.asarray([end for _, end in spans], np.int64)


def _label_mask(
    text: Text, tokens: NDArray[np.int32], ends: NDArray[np.int64], needle: list[int]
) -> NDArray[np.bool_] | None:
    """Which tokens are labels, or None where the delimiter is missing."""
    if text.masked_until is None:
        return _within(ends, text.spans)
    first = _last_occurrence(tokens, needle)
    if text.masked_until > 0:
        covering = int(np.searchsorted(ends, text.masked_until))  # the token that holds the delimiter's last character
        first = max(first, covering + 1)
    return np.arange(len(tokens)) >= first if first else None


def _within(ends: NDArray[np.int64], spans: Sequence[tuple[int, int]]) -> NDArray[np.bool_]:
    """Tokens that lie in one of the character ranges; one that straddles a beginning does not."""
    starts = np.concatenate([[0], ends[:-1]])
    mask = np.zeros(len(ends), bool)
    for first, last in spans:
        mask |= (starts >= first) & (ends <= last) & (ends > first)
    return mask


def _last_occurrence(tokens: NDArray[np.int32], needle: list[int]) -> int:
    """Index behind the last `needle` in `tokens`, 0 where there is none after the first token."""
    size = len(needle)
    if not size or len(tokens) <= size:
        return 0
    windows = np.lib.stride_tricks.sliding_window_view(tokens[1:], size)
    found = np.flatnonzero((windows == np.asarray(needle, np.int32)).all(axis=1))
    return int(found[-1]) + 1 + size if len(found) else 0


def _require_fitting_answer(number: int, text: Text, ends: NDArray[np.int64], max_length: int) -> None:
    size = int((ends > text.answer).sum())
    if size > max_length:
        raise TaskError(
            f"The answer of training example {number + 1} has {size} tokens and the limit is {max_length}; "
            "shorten it, or raise --max-length as far as the model's context allows."
        )


def _task_text(example: Example, delimiter: str | None) -> Text:
    text = example.prompt + example.answer
    if delimiter is None:
        return Text(text, spans=((0, len(text)),), answer=len(example.prompt))
    found = example.prompt.rfind(delimiter)
    until = found + len(delimiter) if found >= 0 else -1
    return Text(text, answer=len(example.prompt), masked_until=until)


def _file_texts(path: Path, tokenizer: PreTrainedTokenizerBase) -> Iterator[Text]:
    return (_row_text(row, where, tokenizer) for where, row in read_json_lines(path, TaskError))


def _row_text(row: dict[str, Any], where: str, tokenizer: PreTrainedTokenizerBase) -> Text:
    if "messages" in row:
        return _chat_text(row["messages"], where, tokenizer)
    prompt, completion = row.get("prompt"), row.get("completion")
    if not isinstance(prompt, str) or not isinstance(completion, str) or not completion:
        raise TaskError(f"{where} needs the texts 'prompt' and 'completion', or 'messages'.")
    text = prompt + completion
    return Text(text, spans=((len(prompt), len(text)),), answer=len(prompt))


def _chat_text(messages: Any, where: str, tokenizer: PreTrainedTokenizerBase) -> Text:
    """A conversation as the tokenizer's template writes it; every assistant turn is trained."""
    if not tokenizer.chat_template:
        raise TaskError(f"{where} has chat messages but the tokenizer has no chat template; use prompt and completion.")
    messages = require_conversation(messages, where)
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        raise TaskError(f"{where} has no assistant message to train on.")
    text = render_chat(tokenizer, messages, where)
    spans = tuple(_turn_span(tokenizer, messages, index, text, where) for index in turns)
    if any(start < end for (_, end), (start, _) in pairwise(spans)):
        raise TaskError(f"{where}: the chat template writes its turns out of order; use prompt and completion.")
    return Text(text, spans=spans, answer=spans[-1][0])


def _turn_span(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], index: int, text: str, where: str
) -> tuple[int, int]:
    """Characters of assistant turn `index`: what the template adds after its opening, up to the turn's end."""
    opening = render_chat(tokenizer, messages[:index], where, add_generation_prompt=True) if index else ""
    closed = render_chat(tokenizer, messages[: index + 1], where)
    if not closed.startswith(opening) or not text.startswith(closed):
        raise TaskError(f"{where}: the chat template rewrites earlier turns, so the assistant's cannot be found.")
    return len(opening), len(closed)
