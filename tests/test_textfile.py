"""One reader for every text that comes in: what it accepts, and the sentence for what it does not."""

import os
import socket

import pytest

from emo_select import textfile
from emo_select.errors import SpecError, TaskError, TextError
from emo_select.experts.calibration import read_texts
from emo_select.finetune.examples import encode_file
from emo_select.storage import read_json, write_json
from emo_select.sweeps.spec import read_sweep
from emo_select.tasks.sources import read_rows
from emo_select.tasks.userfile import read_definition, render, texts

SEPARATORS = "a\u2028b\u2029c\x85d\x0ce\x1ff\x0bg"  # ends of lines to str.splitlines, but not to a file


@pytest.fixture(scope="module")
def tokenizer():
    from emo_select.models import load_tokenizer

    return load_tokenizer("demo/emo")


def written(folder, name, data):
    path = folder / name
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


# ---- what is accepted


@pytest.mark.parametrize("bom", [b"", textfile.BOM])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_lines_end_at_newlines_only_and_the_byte_order_mark_is_no_text(bom, end, tmp_path):
    path = written(tmp_path, "a.txt", bom + f"one{end}{end}{SEPARATORS}{end}last".encode())
    assert [line for _, line in textfile.read_lines(path)] == ["one", SEPARATORS, "last"]
    assert [place for place, _ in textfile.read_lines(path)] == [f"{path}, line {n}" for n in (1, 3, 4)]


@pytest.mark.parametrize("bom", [b"", textfile.BOM])
def test_every_kind_of_data_file_takes_separators_and_the_mark(bom, tmp_path):
    rows = [{"q": SEPARATORS, "a": "x"}]
    for name, text in {"a.jsonl": '{"q": "a\u2028b\u2029c\x85d\\fe\\u001ff\\u000bg", "a": "x"}\n',
                       "a.json": '[{"q": "a\u2028b\u2029c\x85d\\fe\\u001ff\\u000bg", "a": "x"}]',
                       "a.csv": f'q,a\r\n"{SEPARATORS}",x\r\n',
                       "a.tsv": f"q\ta\n{SEPARATORS}\tx\n"}.items():
        assert read_rows(written(tmp_path, name, bom + text.encode())) == rows, name


@pytest.mark.parametrize("bom", [b"", textfile.BOM])
def test_training_and_calibration_files_take_them_too(bom, tokenizer, tmp_path):
    line = '{"prompt": "dock\u2028\x85", "completion": " ship"}\n'
    train = written(tmp_path, "train.jsonl", bom + line.encode())
    assert len(encode_file(train, tokenizer, 100)) == 1
    plain = written(tmp_path, "own.txt", bom + f"{SEPARATORS}\nb\n".encode())
    assert [text.text for text in read_texts(plain, tokenizer)] == [SEPARATORS, "b"]
    rows = written(tmp_path, "own.jsonl", bom + b'{"text": "a\xe2\x80\xa8b"}\n')
    assert [text.text for text in read_texts(rows, tokenizer)] == ["a\u2028b"]


def test_cells_of_any_size_and_quoted_newlines(tmp_path):
    long = "x" * 200_000
    path = written(tmp_path, "a.csv", f'q,a\n"{long}\nsecond ""line""",1\n\nlast,2\n')
    assert read_rows(path) == [{"q": f'{long}\nsecond "line"', "a": "1"}, {"q": "last", "a": "2"}]


# ---- what is refused

ROWS = {
    "open quote": ("a.csv", b'q,a\n1,2\n"open,2\n3,4\n', r"line 3 begins a row that is not valid"),
    "column twice": ("a.csv", b"q,q\n1,2\n", r"the column 'q' twice"),
    "missing cell": ("a.csv", b"q,a\n1,2\n3\n", r"line 3 has 1 cells"),
    "carriage return in a cell": ("a.csv", b"q,a\n1\r2,2\n", r"line 2 begins a row"),
    "latin-1 lines": ("a.jsonl", b'{"q": "a"}\n{"q": "\xe9"}\n', r"line 2 is not UTF-8"),
    "latin-1 table": ("a.csv", b"q,a\n1,\xe9\n", r"line 2 is not UTF-8"),
    "UTF-16": ("a.json", '[{"q": 1}]'.encode("utf-16"), r"line 1 is UTF-16"),
    "lone surrogate": ("a.jsonl", b'{"q": "\\ud800"}\n', r"line 1 is not valid JSON .*surrogate"),
    "key twice": ("a.jsonl", b'{"q": 1, "q": 2}\n', r"the key 'q' is given twice"),
    "deep nesting": ("a.json", b"[" * 200_000 + b"]" * 200_000, r"nested too deeply"),
    "huge number": ("a.json", b"[{\"a\": " + b"1" * 10_000 + b"}]", r"not valid JSON"),
}


@pytest.mark.parametrize("name, data, message", ROWS.values(), ids=ROWS)
def test_refused_rows(name, data, message, tmp_path):
    with pytest.raises(TaskError, match=message) as caught:
        read_rows(written(tmp_path, name, data))
    assert str(tmp_path / name) in str(caught.value)


YAMLS = {
    "a date that does not exist": ("name: 2024-02-30\n", "not valid YAML: day is out of range"),
    "a key twice": ("name: a\nname: b\n", "'name' is given twice"),
    "half a surrogate pair": ('name: "\\ud800"\n', "surrogate"),
    "deep nesting": ("name: " + "[" * 5000 + "]" * 5000, "nested too deeply"),
    "a bomb of aliases": ("a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)),
        "aliases"),
    "an alias of itself": ("a: &a [*a]\n", "aliases"),
    "a list as a key": ("? [a, b]\n: 1\n", "not valid YAML"),
    "a number as a key": ("1: 1\n", "must be a mapping"),
    "an object of Python": ("a: !!python/object/apply:os.system ['true']\n", "not valid YAML"),
    "latin-1": (b"name: x\nb: \xe9\n", "line 2 is not UTF-8"),
    "no mapping": ("- a\n", "must be a mapping"),
    "nothing": ("", "must be a mapping"),
}


@pytest.mark.parametrize("reader, kind", [(read_definition, TaskError), (read_sweep, SpecError)])
@pytest.mark.parametrize("text, message", YAMLS.values(), ids=YAMLS)
def test_refused_yaml(text, message, reader, kind, tmp_path):
    with pytest.raises(kind, match=message):
        reader(written(tmp_path, "a.yaml", text))


def test_aliases_and_merges_of_a_sane_size_are_read(tmp_path):
    path = written(tmp_path, "a.yaml", "a: &a {x: 1}\nb: {<<: *a, y: 2}\nc: [*a, *a]\n")
    assert textfile.read_yaml(path) == {"a": {"x": 1}, "b": {"x": 1, "y": 2}, "c": [{"x": 1}, {"x": 1}]}


@pytest.fixture
def special(tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(tmp_path / "socket.json"))
        (tmp_path / "folder.json").mkdir()
        (tmp_path / "device.json").symlink_to("/dev/zero")
        (tmp_path / "loop.json").symlink_to("loop.json")
        yield tmp_path


@pytest.mark.parametrize("name, what", [("pipe", "a pipe"), ("socket", "a socket"), ("folder", "a folder"),
                                        ("device", "a device"), ("loop", "cannot be read"), ("no", "does not exist")])
def test_only_regular_files_are_opened(name, what, special):
    with pytest.raises(TextError, match=what):
        textfile.read_json(special / f"{name}.json")
    with pytest.raises(TextError, match=what):
        list(textfile.read_lines(special / f"{name}.json"))


def test_a_damaged_record_says_what_to_do(tmp_path):
    write_json(tmp_path / "run.json", {"a": 1})
    assert read_json(tmp_path / "run.json") == {"a": 1}
    (tmp_path / "run.json").write_text('{"a": ')
    with pytest.raises(Exception, match="delete it so that it is made again"):
        read_json(tmp_path / "run.json")


# ---- fields of rows


def test_a_null_in_a_list_of_choices_is_no_choice():
    with pytest.raises(TaskError, match="null"):
        texts("options", {"options": ["a", None]})
    assert texts("options", {"options": ["a", 2, True]}) == ["a", "2", "True"]


def test_a_missing_number_is_no_text():
    with pytest.raises(TaskError, match="not a number"):
        render("{{x}}", {"x": float("nan")})
