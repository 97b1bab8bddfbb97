"""Texts of every kind become documents with labels; what cannot is one sentence."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from emo_select.analysis.corpus import Corpus, Reservoir, Sampling
from emo_select.analysis.sources import FORMATS, TOPICS, Texts, read_corpus
from emo_select.errors import EmoSelectError
from emo_select.models import load_tokenizer

ALL = Sampling(per_label=None, doc_tokens=0)


@pytest.fixture(scope="module")
def read() -> Callable[..., Corpus]:
    """`read(source, **settings)` with the demo's tokenizer."""
    tokenizer = load_tokenizer("demo/emo")

    def call(source: str | Path, sampling: Sampling = ALL, **settings: Any) -> Corpus:
        return read_corpus(Texts(str(source), sampling, **settings), tokenizer, 0)

    return call


def texts(found: Corpus) -> list[str]:
    tokenizer = load_tokenizer("demo/emo")
    return [tokenizer.decode(ids.tolist()) for ids in found.token_ids]


def lines(*rows: dict[str, Any]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def test_rows_in_every_wrapping(read: Callable[..., Corpus], tmp_path: Path) -> None:
    rows = [{"text": "red bell", "topic": "art"}, {"text": "a\u2028b </script>", "topic": "law"}]
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + lines(*rows))
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(lines(*rows)))
    (tmp_path / "a.jsonl.zst").write_bytes(pyarrow.compress(lines(*rows), codec="zstd", asbytes=True))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.json.gz", "a.jsonl.zst", "a.parquet"):
        found = read(tmp_path / name)
        assert texts(found) == ["red bell", "a\u2028b </script>"], name
        assert [one["topic"] for one in found.labels] == ["art", "law"]
        assert found.label_key == "topic" and found.labels[0]["source"] == "a"
    (tmp_path / "plain.txt").write_text("one line\n\nanother, with a comma\n")
    assert texts(read(tmp_path / "plain.txt")) == ["one line", "another, with a comma"]


def test_folders_are_labels(read: Callable[..., Corpus], tmp_path: Path) -> None:
    for label in ("dclm", "wiki"):
        (tmp_path / "data" / label).mkdir(parents=True)
        (tmp_path / "data" / label / "part-0.jsonl").write_bytes(lines(*({"text": f"{label} {i}"} for i in range(3))))
    found = read(tmp_path)
    assert found.counts() == {"dclm": 3, "wiki": 3}
    assert len(read(tmp_path, Sampling(per_label=None, doc_tokens=0, scan=2)).documents) == 2
    assert {one["source"] for one in read(tmp_path, Sampling(None, 0, scan=2)).labels} == {"dclm", "wiki"}


def test_topics_and_formats_beside_the_documents(read: Callable[..., Corpus], tmp_path: Path) -> None:
    for folder in ("documents", "domains_topics", "domains_formats", "tokens"):
        (tmp_path / folder).mkdir()
    data = pyarrow.compress(lines({"text": "x"}, {"text": "y"}), codec="zstd", asbytes=True)
    (tmp_path / "documents" / "CC_0.jsonl.zst").write_bytes(data)
    np.save(tmp_path / "domains_topics" / "CC_0__choice.npy", np.array([12, 0]))
    np.save(tmp_path / "domains_formats" / "CC_0__choice.npy", np.array([9, 23]))
    np.save(tmp_path / "tokens" / "CC_0.npy", np.array([1, 1]))
    found = read(tmp_path)
    assert [one["topic"] for one in found.labels] == ["health", "adult_content"]
    assert [one["format"] for one in found.labels] == ["listicle", "user_review"]
    assert read(tmp_path, label="format").label_key == "format"
    assert len(TOPICS) == len(FORMATS) == 24


def test_tasks_and_the_demo(read: Callable[..., Corpus]) -> None:
    found = read("task:demo_harbor", num_examples=5)
    assert len(found.documents) == 5 and found.counts() == {"demo_harbor": 5}
    demo = read("demo", Sampling(per_label=2))
    assert sorted(demo.counts()) == sorted({one["source"] for one in demo.labels}) and len(demo.counts()) == 8
    assert texts(demo)[0].startswith("harbor: ")


def test_token_folders_need_no_tokenizer(tmp_path: Path) -> None:
    np.asarray([5, 6, 0, 7, 0], dtype="<u4").tofile(tmp_path / "a.npy")
    found = read_corpus(Texts(str(tmp_path), ALL), None, 0)
    assert sorted(map(list, found.token_ids)) == [[5, 6, 0], [7, 0]]


def test_a_draw_is_uniform_and_in_order() -> None:
    pool, seen = Reservoir(3, 7), np.zeros(10)
    for number in range(10):
        pool.add("a", number)
    assert pool.rows() == sorted(pool.rows()) and len(pool.rows()) == 3
    for seed in range(600):
        pool = Reservoir(3, seed)
        for number in range(10):
            pool.add("a", number)
        seen[pool.rows()] += 1
    assert seen.min() > 130 and seen.max() < 230  # 180 each


@pytest.mark.parametrize(("name", "data", "said"), [
    ("gone.jsonl", None, "There are no texts at"),
    ("a.jsonl", b"{\n", "line 1"),
    ("a.jsonl", b"[1]\n", "not a JSON object"),
    ("a.jsonl", b'{"title": "x"}\n', "has no `text`"),
    ("a.jsonl", b"\xff\xfe\n", "not UTF-8"),
    ("a.jsonl", b"", "has no texts"),
    ("a.jsonl.gz", b"not packed", "cannot be read"),
    ("a.jsonl.zst", b"not packed", "cannot be read"),
    ("a.parquet", b"not columns", "not a parquet file"),
    ("a.csv", b"x,y\n", "is no file of texts"),
])
def test_bad_texts_are_one_sentence(name: str, data: bytes | None, said: str, tmp_path: Path,
                                    read: Callable[..., Corpus]) -> None:
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(EmoSelectError, match=said) as caught:
        read(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_unknown_labels_and_schemes(read: Callable[..., Corpus], tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x\n")
    with pytest.raises(EmoSelectError, match="No document has the label 'mood'"):
        read(tmp_path / "a.txt", label="mood")
    with pytest.raises(EmoSelectError, match=r"cannot be opened|cannot be read"):
        read("nosuchscheme://bucket/x.jsonl")
