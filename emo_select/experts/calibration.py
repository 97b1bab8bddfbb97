"""Calibration texts as token ids: a task's selection split, a file of one's own, or several tasks mixed.

A file is `.txt` (one text per line), `.jsonl` or `.parquet`. Each row of the latter has `text`, or `prompt` and
`answer`, or `messages` (a chat, put through the tokenizer's template); `group`, if present, names its group.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from emo_select import progress
from emo_select.errors import SpecError, TaskError
from emo_select.models.chat import render_chat, require_conversation
from emo_select.spec import Calibration
from emo_select.textfile import read_json_lines, read_lines, require_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from emo_select.tasks import Example, Task

SPLIT = "validation"
CHUNK = 1000


class CalibrationTexts(NamedTuple):
    """What a selection sees: ids of every text, and the name of the group it belongs to."""

    token_ids: list[Sequence[int]]
    groups: list[str]


@dataclass(frozen=True)
class Text:
    """A text to tokenise. `templated` texts hold their special tokens already."""

    text: str
    group: str
    templated: bool = False


def calibration_tokens(source: Task | Sequence[Example] | None, tokenizer: PreTrainedTokenizerBase,
                       calibration: Calibration) -> CalibrationTexts:
    """Token ids and group of every calibration text: prompt + answer without an end token, cut at the right.

    With `num_examples` N, the first N of `torch.randperm` over all texts, seeded on the CPU: the published draw.

    Args:
        source: a task (its selection split is used), or examples; not needed when `calibration.file` is set.
        tokenizer: that of the model.
        calibration: which texts and how long.

    Returns:
        One compact array of ids per text, and one group name per text: `task` or `task/part` for a task, the row's
        own group or the file's name for a file.

    Raises:
        SpecError: no texts, or a file of another kind. TaskError: a row that has no text.
    """
    texts = _texts(source, calibration, tokenizer)
    if not texts:
        raise SpecError("The calibration set is empty; choose a task with examples in its selection split, or give "
                        "texts with --calibration.")
    chosen = [texts[i] for i in draw(len(texts), calibration.num_examples, calibration.seed)]
    ids = _tokenise(chosen, tokenizer, calibration.max_length)
    return CalibrationTexts(ids, [text.group for text in chosen])


def mixed_tokens(tasks: Iterable[Task], tokenizer: PreTrainedTokenizerBase, calibration: Calibration
                 ) -> CalibrationTexts:
    """`calibration_tokens` of several tasks, each with its own draw, one after the other.

    Their weights go to the selection, which normalises the scores per task: `weights={"a": 2, "b": 1}`.
    """
    parts = [calibration_tokens(task, tokenizer, calibration) for task in tasks]
    return CalibrationTexts([ids for part in parts for ids in part.token_ids],
                            [group for part in parts for group in part.groups])


def draw(total: int, count: int | None, seed: int) -> list[int]:
    """Indices of `count` of `total` texts in the order of the published draw; all of them, in order, for None.

    As published, asking for more than there are takes all.
    """
    if count is None:
        return list(range(total))
    if count > total:
        progress.say(f"There are only {total} calibration texts; all of them are used.")
    import torch

    return torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:count].tolist()


def parse_weights(values: Sequence[str]) -> dict[str, float] | None:
    """`["a:2", "b:1"]` → {"a": 2.0, "b": 1.0}; None where no value has a weight. Names may contain colons.

    Raises:
        SpecError: a weight that is not a positive number.
    """
    found = dict(_split_weight(value) for value in values)
    if all(weight is None for weight in found.values()):
        return None if len(found) < 2 else dict.fromkeys(found, 1.0)
    return {name: 1.0 if weight is None else weight for name, weight in found.items()}


def file_fingerprint(path: str | Path) -> str:
    """Hex SHA-256 of a calibration file's bytes; SpecError if it cannot be read."""
    import hashlib

    require_file(Path(path), SpecError)
    try:
        with Path(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise SpecError(f"The calibration file {path} cannot be read ({error.strerror}).") from None


def read_texts(path: Path, tokenizer: PreTrainedTokenizerBase, thinking: bool | None = None) -> list[Text]:
    """All texts of a file; see the module's text.

    Raises:
        SpecError: the file is missing, empty, or of another kind. TaskError: a row that has no text, by number.
    """
    readers = {".txt": _read_lines, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
    if path.suffix not in readers:
        raise SpecError(f"{path} is not a calibration file; use {', '.join(readers)}.")
    require_file(path, SpecError)
    texts = [_row_text(row, number, path, tokenizer, thinking)
             for number, row in enumerate(readers[path.suffix](path), 1)]
    if not texts:
        raise SpecError(f"The calibration file {path} has no texts.")
    return texts


def _texts(source: Task | Sequence[Example] | None, calibration: Calibration, tokenizer: PreTrainedTokenizerBase
           ) -> list[Text]:
    if calibration.file is not None:
        return read_texts(Path(calibration.file), tokenizer, calibration.thinking)
    if source is None:
        raise SpecError("There is nothing to calibrate on; name a task with --task or texts with --calibration.")
    if isinstance(source, Sequence):
        return [Text(example.text, example.group or "all") for example in source]
    name = source.name
    return [Text(example.text, f"{name}/{example.group}" if example.group else name)
            for example in source.examples(SPLIT, calibration.num_shots, leave_out_shots=calibration.leave_out_shots)]


def _tokenise(texts: Sequence[Text], tokenizer: PreTrainedTokenizerBase, max_length: int
              ) -> list[Sequence[int]]:
    ids: list[Sequence[int]] = []
    cut = 0
    with progress.track("Tokenising", total=len(texts)) as bar:
        for start in range(0, len(texts), CHUNK):
            for values in _ids(texts[start:start + CHUNK], tokenizer):
                cut += len(values) > max_length
                ids.append(array("i", values[:max_length]))
            bar.advance(min(CHUNK, len(texts) - start))
    if cut:
        progress.say(f"{cut} of {len(texts)} calibration texts exceed {max_length} tokens; their ends were cut.")
    if not any(len(values) for values in ids):
        raise SpecError("The calibration texts hold no tokens.")
    return ids


def _ids(texts: Sequence[Text], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    plain = [text.text for text in texts if not text.templated]
    templated = [text.text for text in texts if text.templated]
    encode = {False: iter(_encode(tokenizer, plain, True)), True: iter(_encode(tokenizer, templated, False))}
    for text in texts:
        yield next(encode[text.templated])


def _encode(tokenizer: PreTrainedTokenizerBase, texts: list[str], special: bool) -> list[list[int]]:
    # no warning about the model's length: texts are cut right after
    return tokenizer(texts, add_special_tokens=special, verbose=False)["input_ids"] if texts else []


def _row_text(row: Mapping[str, Any], number: int, path: Path, tokenizer: PreTrainedTokenizerBase,
              thinking: bool | None) -> Text:
    group = str(row.get("group") or path.stem)
    if isinstance(row.get("text"), str):
        return Text(row["text"], group)
    if isinstance(row.get("prompt"), str) and isinstance(row.get("answer"), str):
        return Text(row["prompt"] + row["answer"], group)
    if row.get("messages") is not None:
        return Text(_chat(row["messages"], number, path, tokenizer, thinking), group, templated=True)
    raise TaskError(f"Row {number} of {path} has neither `text`, nor `prompt` and `answer`, nor `messages`.")


def _chat(messages: Any, number: int, path: Path, tokenizer: PreTrainedTokenizerBase, thinking: bool | None) -> str:
    if thinking is None:
        raise SpecError(f"{path} holds chats; say whether the model thinks in them, with --thinking or --no-thinking.")
    if not getattr(tokenizer, "chat_template", None):
        raise SpecError(f"{path} holds chats, but the model's tokenizer has no chat template; give `text` instead.")
    where = f"Row {number} of {path}"
    return render_chat(tokenizer, require_conversation(messages, where), where, enable_thinking=thinking)


def _read_lines(path: Path) -> Iterator[Mapping[str, Any]]:
    return ({"text": line} for _, line in read_lines(path, TaskError))


def _read_jsonl(path: Path) -> Iterator[Mapping[str, Any]]:
    return (row for _, row in read_json_lines(path, TaskError))


def _read_parquet(path: Path) -> Iterator[Mapping[str, Any]]:
    from emo_select.tasks.sources import read_parquet

    return iter(read_parquet(path))


def _split_weight(value: str) -> tuple[str, float | None]:
    name, colon, weight = value.rpartition(":")
    if not colon:
        return value, None
    try:
        number = float(weight)
    except ValueError:
        return value, None  # a name with a colon, such as lm-eval:NAME
    if not 0 < number < float("inf"):
        raise SpecError(f"The weight in {value!r} is not a positive number.")
    return name, number
