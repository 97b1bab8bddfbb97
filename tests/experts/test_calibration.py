"""Calibration texts: files of every kind, the draw, truncation, mixtures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from word_tokenizer import add_tokenizer

from emo_select.errors import SpecError, TaskError
from emo_select.experts import calibration_tokens, mixed_tokens
from emo_select.experts.calibration import draw, file_fingerprint, parse_weights
from emo_select.models import load_tokenizer
from emo_select.spec import Calibration
from emo_select.tasks import Example

ROWS = [{"text": "w5 w6 w7"}, {"prompt": "w8 w9", "answer": " w10"}, {"text": "w11", "group": "late"}]
CHATS = [{"messages": [{"role": "user", "content": "w5"}]}]


@pytest.fixture(scope="module")
def tokenizer(tiny: Path) -> Any:
    return load_tokenizer(str(tiny))


def write(folder: Path, name: str, rows: list[Any]) -> str:
    path = folder / name
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, pyarrow.schema(
            [(key, pyarrow.string()) for key in ("text", "prompt", "answer", "group")])), path)
    elif path.suffix == ".txt":
        path.write_text("\n\n".join(rows), encoding="utf-8")
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def ids(texts: Any) -> list[list[int]]:
    return [list(values) for values in texts.token_ids]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_text_and_prompt_answer_rows(tmp_path: Path, tokenizer: Any, suffix: str) -> None:
    texts = calibration_tokens(None, tokenizer, Calibration(file=write(tmp_path, f"own{suffix}", ROWS)))
    assert ids(texts) == [[5, 6, 7], [8, 9, 10], [11]]
    assert texts.groups == ["own", "own", "late"]


def test_plain_lines(tmp_path: Path, tokenizer: Any) -> None:
    texts = calibration_tokens(None, tokenizer, Calibration(file=write(tmp_path, "own.txt", ["w5 w6", "w7"])))
    assert ids(texts) == [[5, 6], [7]]


@pytest.mark.parametrize(("thinking", "last"), [(True, 3), (False, 4)])
def test_chats_follow_the_template_and_the_thinking_flag(tmp_path: Path, tokenizer: Any, thinking: bool, last: int
                                                         ) -> None:
    file = write(tmp_path, "chat.jsonl", CHATS)
    assert ids(calibration_tokens(None, tokenizer, Calibration(file=file, thinking=thinking))) == [[2, 5, last]]
    with pytest.raises(SpecError, match="--thinking or --no-thinking"):
        calibration_tokens(None, tokenizer, Calibration(file=file))


def test_chats_need_a_template(tmp_path: Path) -> None:
    add_tokenizer(tmp_path, 20, chat_template=None)
    file = write(tmp_path, "chat.jsonl", CHATS)
    with pytest.raises(SpecError, match="no chat template"):
        calibration_tokens(None, load_tokenizer(str(tmp_path)), Calibration(file=file, thinking=False))


@pytest.mark.parametrize(("name", "rows", "kind", "message"), [
    ("own.jsonl", [{"texts": "w5"}], TaskError, "Row 1"),
    ("own.jsonl", [], SpecError, "no texts"),
    ("own.txt", [], SpecError, "no texts"),
    ("own.csv", [], SpecError, "use .txt, .jsonl, .parquet"),
    ("own.jsonl", [{"text": ""}], SpecError, "no tokens"),
    ("own.jsonl", [{"messages": [{"role": "user"}, 3]}], TaskError, "must be a list of objects"),
])
def test_bad_files(tmp_path: Path, tokenizer: Any, name: str, rows: list[Any], kind: type[Exception], message: str
                   ) -> None:
    with pytest.raises(kind, match=message):
        calibration_tokens(None, tokenizer, Calibration(file=write(tmp_path, name, rows), thinking=True))


def test_broken_files_are_named_with_the_line(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "own.jsonl").write_text('{"text": "w5"}\n{"text": ')
    with pytest.raises(TaskError, match="line 2"):
        calibration_tokens(None, tokenizer, Calibration(file=str(tmp_path / "own.jsonl")))
    (tmp_path / "own.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(TaskError, match="not a complete parquet file"):
        calibration_tokens(None, tokenizer, Calibration(file=str(tmp_path / "own.parquet")))
    with pytest.raises(SpecError, match="does not exist"):
        calibration_tokens(None, tokenizer, Calibration(file=str(tmp_path / "none.txt")))
    with pytest.raises(SpecError, match="does not exist"):
        file_fingerprint(tmp_path / "none.txt")


def test_long_texts_lose_their_ends_and_are_counted(tokenizer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    examples = [Example("w5 w6 w7 w8", " w9"), Example("w5", " w6")]
    texts = calibration_tokens(examples, tokenizer, Calibration(max_length=3))
    assert ids(texts) == [[5, 6, 7], [5, 6]]
    assert "1 of 2 calibration texts exceed 3 tokens" in capsys.readouterr().err


def test_draw() -> None:
    import torch

    assert draw(5, None, 7) == [0, 1, 2, 3, 4]
    order = torch.randperm(9, generator=torch.Generator().manual_seed(4)).tolist()
    assert draw(9, 3, 4) == order[:3]
    assert draw(9, 1000, 4) == order  # as published


def test_draw_of_a_task(tokenizer: Any) -> None:
    examples = [Example(f"w{i}", " w5") for i in range(10, 20)]
    texts = calibration_tokens(examples, tokenizer, Calibration(num_examples=4, seed=1))
    assert [values[0] - 10 for values in ids(texts)] == draw(10, 4, 1)


def test_tasks_are_mixed_one_after_the_other(tokenizer: Any) -> None:
    from emo_select.tasks import get_tasks

    tasks = get_tasks(["demo_harbor", "demo_kitchen"])
    texts = mixed_tokens(tasks, tokenizer, Calibration(num_examples=3))
    assert texts.groups == ["demo_harbor"] * 3 + ["demo_kitchen"] * 3


def test_weights() -> None:
    assert parse_weights(["a:2", "b:1"]) == {"a": 2.0, "b": 1.0}
    assert parse_weights(["a:2", "b"]) == {"a": 2.0, "b": 1.0}
    assert parse_weights(["a"]) is None
    assert parse_weights(["lm-eval:arc:3", "lm-eval:boolq"]) == {"lm-eval:arc": 3.0, "lm-eval:boolq": 1.0}
    for bad in ("a:0", "a:-1", "a:inf", "a:nan"):
        with pytest.raises(SpecError, match="positive"):
            parse_weights([bad])
