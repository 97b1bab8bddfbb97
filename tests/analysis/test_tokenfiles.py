"""Token files: the published sampler document for document, and ours, which finds every document once."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from emo_select.analysis import tokenfiles
from emo_select.analysis.corpus import Corpus, Sampling
from emo_select.analysis.tokenfiles import Published, composition, published_sample, read_mix, sample, topic_mix
from emo_select.errors import SpecError


def test_the_composition_is_the_published_one(analysis: Path) -> None:
    root = analysis / "s3"
    text = json.dumps(composition(read_mix(str(root / "mix.txt"), str(root)))).replace(str(root), "s3://ai2-llm")
    expected = json.loads((analysis / "pretraining" / "pretraining_mix.json").read_text())
    assert json.loads(text) == expected
    assert list(json.loads(text)["sources"]) == list(expected["sources"])


@pytest.mark.parametrize("source", ["mix.txt", "composition"])
def test_the_published_documents(source: str, analysis: Path, golden_corpus: Corpus) -> None:
    folder = analysis / "pretraining"
    if source == "composition":
        mix = read_mix(str(folder / "pretraining_mix.json"), str(analysis / "s3"))
        found = published_sample(mix, Published(430, 48, chunk_bytes=4000), eos=0)
    else:
        found = golden_corpus
    for model in ("emo_shared1", "emo_noshared_norm"):
        np.testing.assert_array_equal(found.tokens, np.load(folder / model / "documents.npy"))
        np.testing.assert_array_equal(found.bounds, np.load(folder / model / "doc_boundaries.npy"))


def test_published_topics(analysis: Path) -> None:
    topics = next((analysis / "s3" / "preprocessed" / "cc_all_dressed").rglob("vigintile_0020")).parents[1]
    asked = Published(7200, 0, chunk_bytes=4000, evenly=True)
    packed = (analysis / "weborganizer" / "emo_shared1" / "metadata_docs.jsonl.gz").read_bytes()
    expected = gzip.decompress(packed).splitlines()
    rows = [(row["source"], row["doc_len"]) for row in map(json.loads, expected)]
    found = published_sample(topic_mix(str(topics)), asked, eos=0)
    assert [(one.labels["source"], one.length) for one in found.documents] == rows


def _token_folder(root: Path, lengths: dict[str, list[int]]) -> list[list[int]]:
    """Files of documents, each of whose tokens is unique to it."""
    documents, number = [], 1
    for name, sizes in lengths.items():
        ids: list[int] = []
        for size in sizes:
            documents.append([number] * (size - 1) + [0])
            ids += documents[-1]
            number += 1
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        np.asarray(ids, dtype="<u4").tofile(root / name)
    return documents


def test_every_document_is_found_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenfiles, "WINDOW_BYTES", 40)  # ten tokens: documents end, begin and lie across its bounds
    sizes = [5, 5, 10, 3, 7, 1, 9, 10, 10, 2, 6]
    documents = _token_folder(tmp_path, {"web/a.npy": sizes, "web/b.npy": sizes[::-1], "code/c.npy": [4, 6, 10]})
    found = sample(read_mix(str(tmp_path)), Sampling(per_label=None, doc_tokens=0), eos=0)
    assert sorted(map(list, found.token_ids)) == sorted(documents)
    assert found.counts() == {"web": 22, "code": 3}


def test_a_cap_per_label_is_kept_and_seeded(tmp_path: Path) -> None:
    _token_folder(tmp_path, {"web/a.npy": [8] * 50, "code/c.npy": [8] * 3})
    mix = read_mix(str(tmp_path))
    found = [sample(mix, Sampling(per_label=10, doc_tokens=4, seed=seed), eos=0) for seed in (1, 1, 2)]
    assert found[0].counts() == {"web": 10, "code": 3}
    assert {len(ids) for ids in found[0].token_ids} == {4}
    assert found[0].fingerprint == found[1].fingerprint != found[2].fingerprint


@pytest.mark.parametrize(("make", "said"), [
    (lambda folder: (folder / "mix.txt").write_text("web part.npy\n"), "not `label,path`"),
    (lambda folder: (folder / "mix.txt").write_text("web,gone.npy\n"), "cannot be read"),
    (lambda folder: (folder / "mix.txt").write_text("# nothing\n"), "empty or missing"),
])
def test_a_bad_mix_is_one_sentence(make: Any, said: str, tmp_path: Path) -> None:
    make(tmp_path)
    with pytest.raises(SpecError, match=said):
        read_mix(str(tmp_path / "mix.txt"), str(tmp_path))
