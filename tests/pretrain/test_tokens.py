"""Token files and mixes: what is read, and what is refused before a training starts."""

from __future__ import annotations

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from emo_select.cli.app import app
from emo_select.errors import ModelError, TokenDataError
from emo_select.pretrain.tokens import Vocabulary, check_file, dtype_for, read_mix, read_tokens

EOS, SIZE = 1, 300


@pytest.fixture
def tokenizer(tmp_path):
    """A folder with a tokenizer of 300 tokens."""
    from tokenizers import Tokenizer, models

    folder = tmp_path / "tok"
    folder.mkdir()
    vocab = {f"t{n}": n for n in range(SIZE)} | {"<|endoftext|>": EOS}
    Tokenizer(models.WordLevel({k: v for k, v in vocab.items() if k != "t1"}, unk_token="t2")).save(
        str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<|endoftext|>"}}))
    return str(folder)


def write(path, numbers, dtype="<u2"):
    path.parent.mkdir(parents=True, exist_ok=True)
    np.asarray(numbers).astype(dtype).tofile(path)
    return path


def documents(count=50):
    return [n for i in range(count) for n in (*range(2, 2 + i % 20), EOS)]


def mix(tmp_path, text, name="mix.txt"):
    (tmp_path / name).write_text(text)
    return tmp_path / name


def test_a_mix_is_its_files_in_order_with_labels_comments_and_tokenizer(tmp_path, tokenizer):
    write(tmp_path / "data" / "dclm" / "tok" / "part-0.npy", documents())
    write(tmp_path / "data" / "wiki" / "part-1.npy", documents(30))
    listed = mix(tmp_path, "# what this is\n\nwiki,wiki/part-1.npy\n  dclm , dclm/{TOKENIZER}/part-0.npy\n")
    with pytest.raises(TokenDataError, match=r"line 4 has \{TOKENIZER\}"):
        read_mix(listed, tmp_path / "data")
    (tmp_path / "data" / "dclm" / "tok").rename(tmp_path / "data" / "dclm" / "x")
    listed.write_text(listed.read_text().replace("{TOKENIZER}", "x"))
    data = read_mix(listed, tmp_path / "data", tokenizer)
    assert [path.name for path in data.files] == ["part-1.npy", "part-0.npy"]
    assert data.labels == ("wiki", "dclm")
    assert (data.dtype, data.vocab_size, data.eos_token_id) == ("uint16", SIZE, EOS)
    assert data.tokens == sum(len(documents(n)) for n in (50, 30))
    assert read_tokens(data.files[0], data.dtype).tolist() == documents(30)


def test_the_published_tokenizer_needs_no_files(tmp_path):
    write(tmp_path / "p" / "allenai" / "dolma2-tokenizer" / "part-00-00000.npy", [5, 100257, 7, 100257], "<u4")
    listed = mix(tmp_path, "dclm,p/{TOKENIZER}/part-00-00000.npy\n")
    data = read_mix(listed, tokenizer="allenai/dolma2-tokenizer")
    assert (data.dtype, data.vocab_size, data.eos_token_id, data.pad_token_id) == ("uint32", 100278, 100257, 100277)


def test_the_golden_training_files_are_read(shared_dir):
    folder = shared_dir / "golden" / "pretraining" / "training" / "data"
    for path in sorted(folder.glob("part-*.npy")):
        check_file(path, "uint32", Vocabulary(90, 1, 0, None))


def test_another_content_has_another_fingerprint(tmp_path, tokenizer):
    path = write(tmp_path / "a.npy", documents())
    first = read_mix(path, tokenizer=tokenizer).fingerprint
    assert read_mix(path, tokenizer=tokenizer).fingerprint == first
    write(path, [*documents()[:-3], 3, 3, EOS])
    assert read_mix(path, tokenizer=tokenizer).fingerprint != first


@pytest.mark.parametrize("numbers, dtype, words", [
    ([5, 299, 1, 300], "<u2", "holds the number 300"),
    ([5, 6, 1] * 3, "<u4", "0 in every second place"),
    ([2, 3, 4], "<u2", "no end of text"),
    ([], "<u2", "is empty"),
])
def test_a_file_of_another_vocabulary_or_width_or_without_ends_is_refused(tmp_path, tokenizer, numbers, dtype, words):
    with pytest.raises(TokenDataError, match=words):
        read_mix(write(tmp_path / "a.npy", numbers, dtype), tokenizer=tokenizer)


def test_narrow_numbers_read_as_wide_ones_are_refused(tmp_path):
    path = write(tmp_path / "a.npy", documents(), "<u2")
    with pytest.raises(TokenDataError, match=r"not uint32|no multiple of 4"):
        read_mix(path, tokenizer="allenai/dolma2-tokenizer")


def test_a_truncated_file_is_refused(tmp_path, tokenizer):
    path = write(tmp_path / "a.npy", documents())
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(TokenDataError, match="no multiple of 2"):
        read_mix(path, tokenizer=tokenizer)


def test_a_file_with_a_numpy_header_is_refused(tmp_path, tokenizer):
    np.save(tmp_path / "a.npy", np.asarray(documents(), dtype=np.uint16))
    with pytest.raises(TokenDataError, match="header of numpy"):
        read_mix(tmp_path / "a.npy", tokenizer=tokenizer)


@pytest.mark.parametrize("text, words", [
    ("a,one.npy\na,two.npy\na,three.npy\n", "2 of the 3 token files .* the first is .*two.npy"),
    ("a,one.npy\na,one.npy\n", "2 times"),
    ("one.npy\n", "line 1: 'one.npy' is not `label,path`"),
    ("# nothing\n", "names no token file"),
])
def test_a_mix_that_cannot_be_is_refused(tmp_path, tokenizer, text, words):
    write(tmp_path / "one.npy", documents())
    with pytest.raises(TokenDataError, match=words):
        read_mix(mix(tmp_path, text), tokenizer=tokenizer)


def test_without_a_tokenizer_nothing_is_guessed(tmp_path):
    with pytest.raises(TokenDataError, match="--tokenizer"):
        read_mix(write(tmp_path / "a.npy", documents()))
    with pytest.raises(ModelError, match="neither a folder"):
        read_mix(tmp_path / "a.npy", tokenizer="nobody/nothing")


@pytest.mark.parametrize("size, dtype", [(256, "uint8"), (257, "uint16"), (65536, "uint16"), (100278, "uint32")])
def test_the_smallest_type_holds_the_vocabulary(size, dtype):
    assert dtype_for(size) == dtype


def test_one_end_in_a_long_file_is_found_where_no_sample_looks(tmp_path, tokenizer):
    numbers = np.full(3_000_000, 5)
    path = write(tmp_path / "long.npy", numbers)
    with pytest.raises(TokenDataError, match="no end of text"):
        read_mix(path, tokenizer=tokenizer)
    numbers[1_000_003] = EOS
    assert read_mix(write(path, numbers), tokenizer=tokenizer).tokens == 3_000_000


def test_the_command_shows_shares_and_compares_checksums(tmp_path, tokenizer):
    from emo_select.pretrain import tokenize
    from emo_select.pretrain.own_tokenizer import train_tokenizer
    from emo_select.pretrain.texts import find_sources

    (tmp_path / "a.txt").write_text("the harbor is green " * 30)
    sources = find_sources([str(tmp_path / "a.txt")])
    train_tokenizer(sources, tmp_path / "small", 260)
    tokenize.tokenize(sources, tmp_path / "one", str(tmp_path / "small"))
    write(tmp_path / "two.npy", [5, 6, 0] * 100)
    listed = mix(tmp_path, "web,one/part-00000-00000.npy\nbooks,two.npy\n")
    result = CliRunner().invoke(app, ["mix", str(listed), "--json", "--checksums"])
    assert result.exit_code == 0, result.exception
    report = json.loads(result.stdout)
    assert report["labels"]["books"] == {"files": 1, "tokens": 300} and report["checksums"] == 1
    shown = CliRunner().invoke(app, ["mix", str(tmp_path / "one")])
    assert shown.exit_code == 0 and "100.0%" in shown.stdout
    path = tmp_path / "one" / "part-00000-00000.npy"
    data = bytearray(path.read_bytes())
    data[2:4] = data[4:6]
    path.write_bytes(data)
    again = CliRunner().invoke(app, ["mix", str(listed), "--checksums"])
    assert again.exit_code != 0 and "is not the file" in str(again.exception)
