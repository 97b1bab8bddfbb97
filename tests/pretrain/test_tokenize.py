"""From texts to token files: every kind of source, resuming, several processes, and bad texts."""

from __future__ import annotations

import gzip
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from emo_select.cli.app import app
from emo_select.errors import DataMissingError, EmoSelectError, SpecError, TokenDataError
from emo_select.pretrain import texts, tokenize
from emo_select.pretrain.own_tokenizer import train_tokenizer
from emo_select.pretrain.texts import documents, find_sources, grouped
from emo_select.pretrain.tokenize import Options
from emo_select.pretrain.tokens import read_mix, read_tokens

TEXTS = ["The harbor is green.", "", "An <|endoftext|> inside.", "Grüße, 世界 \u2028 done\n"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "corpus.txt").write_text("the harbor is green and the theater is red\n" * 40)
    train_tokenizer(find_sources([str(folder / "corpus.txt")]), folder / "tok", 300)
    return str(folder / "tok")


def decoded(folder):
    """Documents of all token files, decoded again."""
    from tokenizers import Tokenizer

    data = read_mix(folder)
    tokens = np.concatenate([read_tokens(path, data.dtype) for path in data.files])
    assert tokens[-1] == data.eos_token_id
    parts = np.split(tokens, np.flatnonzero(tokens == data.eos_token_id) + 1)[:-1]
    model = Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))
    return [model.decode(part[:-1].tolist(), skip_special_tokens=False) for part in parts]


def write_sources(folder):
    rows = "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(TEXTS))
    (folder / "a.jsonl").write_text(rows)
    with gzip.open(folder / "b.json.gz", "wt") as file:
        file.write(rows)
    pq.write_table(pa.table({"text": TEXTS}), folder / "c.parquet")
    (folder / "d.txt").write_text("One document\nof two lines.")
    names = ["a.jsonl", "b.json.gz", "c.parquet", "d.txt"]
    try:
        import zstandard
    except ImportError:
        return names
    frames = [zstandard.compress(part.encode()) for part in (rows[:20], rows[20:])]
    (folder / "b2.jsonl.zst").write_bytes(b"".join(frames))  # as concatenated by `cat`
    return sorted([*names, "b2.jsonl.zst"])


def test_every_kind_of_source_gives_the_same_documents_with_an_end_after_each(tmp_path, tokenizer):
    folder = tmp_path / "in"
    folder.mkdir()
    names = write_sources(folder)
    manifest = tokenize.tokenize(find_sources([str(folder)]), tmp_path / "out", tokenizer)
    kept = [text for text in TEXTS if text]
    assert decoded(tmp_path / "out") == kept * (len(names) - 1) + ["One document\nof two lines."]
    assert manifest["documents"] == 3 * (len(names) - 1) + 1 and manifest["empty_documents"] == len(names) - 1
    assert len(manifest["files"]) == 1  # small sources share a file
    entry = manifest["files"][0]
    data = (tmp_path / "out" / entry["file"]).read_bytes()
    import hashlib
    assert entry["sha256"] == hashlib.sha256(data).hexdigest() and entry["bytes"] == len(data)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        ".emo-select.json", "manifest.json", "mix.txt", "part-00000-00000.npy", "tokenizer"]
    assert read_mix(tmp_path / "out" / "mix.txt").fingerprint == read_mix(tmp_path / "out").fingerprint


def test_several_processes_and_chunks_give_the_same_tokens(tmp_path, tokenizer, monkeypatch):
    paths = []
    for number in range(3):
        paths.append(tmp_path / f"{number}.jsonl")
        paths[-1].write_text("".join(json.dumps({"text": f"{number} {i} is green"}) + "\n" for i in range(40)))
    sources = find_sources([str(path) for path in paths])
    monkeypatch.setattr(texts, "GROUP_BYTES", 1)  # a job each
    assert grouped(sources) == [[0], [1], [2]]
    together = tokenize.tokenize(sources, tmp_path / "two", tokenizer, Options(workers=2))
    monkeypatch.setattr(tokenize, "BATCH_CHARACTERS", 100)
    alone = tokenize.tokenize(sources, tmp_path / "one", tokenizer, Options(workers=1, chunk_tokens=100))
    assert len(together["files"]) == 3 and len(alone["files"]) > 6
    assert decoded(tmp_path / "two") == decoded(tmp_path / "one")
    assert together["tokens"] == alone["tokens"]


class Killed(BaseException):
    """The process ends here."""


def test_a_killed_call_goes_on_after_the_last_whole_file(tmp_path, tokenizer, monkeypatch):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"number {i}"}) + "\n" for i in range(100)))
    sources, options = find_sources([str(tmp_path / "a.jsonl")]), Options(chunk_tokens=100)
    monkeypatch.setattr(tokenize, "BATCH_CHARACTERS", 50)
    whole = tokenize.tokenize(sources, tmp_path / "whole", tokenizer, options)
    assert len(whole["files"]) > 4
    real, written = tokenize._write_chunk, []

    def killing(job, chunk, *rest):
        if chunk == 3 and not written[3:]:
            raise Killed
        written.append(chunk)
        return real(job, chunk, *rest)

    monkeypatch.setattr(tokenize, "_write_chunk", killing)
    with pytest.raises(Killed):
        tokenize.tokenize(sources, tmp_path / "out", tokenizer, options)
    assert not (tmp_path / "out").exists() and written == [0, 1, 2]
    written.append(-1)  # let it pass
    again = tokenize.tokenize(sources, tmp_path / "out", tokenizer, options)
    assert written[4:] == list(range(3, 3 + len(written[4:])))
    assert again["files"] == whole["files"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        path.name for path in (tmp_path / "whole").iterdir())


def test_the_same_call_again_does_nothing_and_another_replaces_nothing(tmp_path, tokenizer, capsys):
    (tmp_path / "a.txt").write_text("some text")
    sources = find_sources([str(tmp_path / "a.txt")])
    tokenize.tokenize(sources, tmp_path / "out", tokenizer)
    tokenize.tokenize(sources, tmp_path / "out", tokenizer)
    assert "nothing to do" in capsys.readouterr().err
    with pytest.raises(SpecError, match="already there"):
        tokenize.tokenize(sources, tmp_path / "out", tokenizer, Options(label="other"))
    (tmp_path / "a.txt").write_text("other text")
    with pytest.raises(SpecError, match="already there"):
        tokenize.tokenize(find_sources([str(tmp_path / "a.txt")]), tmp_path / "out", tokenizer)


@pytest.mark.parametrize("name, content, words", [
    ("a.jsonl", b'{"text": "x"}\n{"text": 5}\n', "line 2 has int in 'text'"),
    ("a.jsonl", b'{"text": "x"}\n{"body": "y"}\n', r"line 2 has no field 'text'.*--field \(body\)"),
    ("a.jsonl", b'{"text": "x"\n', "line 1 is not valid JSON"),
    ("a.jsonl", b'{"text": "\xff"}\n', "line 1 is not UTF-8"),
    ("a.jsonl", b'[1]\n', "not an object"),
    ("a.json.gz", b"not packed", "damaged or truncated"),
    ("a.json.gz", gzip.compress(b'{"text": "x"}\n' * 500, mtime=0)[:-30], "damaged or truncated"),
    ("a.parquet", b"PAR1 no", "not a parquet file"),
    ("a.txt", b"\xff\xfe", "UTF-8"),
    ("a.jsonl", b'{"text": ""}\n', "no text at all"),
])
def test_a_bad_text_ends_in_a_sentence_with_its_place(tmp_path, tokenizer, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TokenDataError, match=words) as caught:
        tokenize.tokenize(find_sources([str(tmp_path / name)]), tmp_path / "out", tokenizer)
    assert not (tmp_path / "out").exists() and "\n" not in str(caught.value)


def test_a_damaged_zstandard_file_ends_in_a_sentence(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(zstandard.compress(b'{"text": "x"}\n' * 500)[:6] + b"\xff" * 20)
    with pytest.raises(TokenDataError, match="zstandard"):
        list(documents(find_sources([str(path)])[0]))


def test_a_hub_data_set_is_streamed_and_a_hub_out_of_reach_is_a_sentence(monkeypatch):
    import datasets

    def streamed(name, config, split, streaming, trust_remote_code):
        assert (name, config, split, streaming) == ("allenai/c4", "en", "validation", True) and not trust_remote_code
        yield from ({"text": text} for text in TEXTS)

    monkeypatch.setattr(datasets, "load_dataset", streamed)
    source = find_sources(["hf:allenai/c4"], "en", "validation")[0]
    assert list(documents(source)) == TEXTS

    def unreachable(*args, **options):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(DataMissingError, match=r"allenai/c4.*ConnectionError: no route"):
        list(documents(source))


def test_names_that_are_nothing_are_refused_with_a_hint(tmp_path):
    with pytest.raises(TokenDataError, match="hf:allenai/c4"):
        find_sources(["allenai/c4"])
    (tmp_path / "a.pdf").write_bytes(b"x")
    with pytest.raises(SpecError, match=r"a\.pdf is none of"):
        find_sources([str(tmp_path / "a.pdf")])
    with pytest.raises(TokenDataError, match="holds no texts"):
        find_sources([str(tmp_path)])


def test_one_command_makes_a_tokenizer_and_tokens_of_a_text(tmp_path):
    (tmp_path / "book.txt").write_text("the harbor is green and the theater is red. " * 50)
    call = ["tokenize", str(tmp_path / "book.txt"), "--tokenizer", str(tmp_path / "tok"), "--train-tokenizer", "280",
            "--out", str(tmp_path / "out")]
    planned = CliRunner().invoke(app, [*call, "--dry-run", "--json"])
    assert planned.exit_code == 0 and json.loads(planned.stdout)["dtype"] == "uint16"
    assert not (tmp_path / "tok").exists()
    result = CliRunner().invoke(app, [*call, "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["documents"] == 1 and report["vocab_size"] <= 280
    assert decoded(tmp_path / "out") == [(tmp_path / "book.txt").read_text()]
    with pytest.raises(EmoSelectError, match="at least 258"):
        train_tokenizer([], tmp_path / "small", 100)
