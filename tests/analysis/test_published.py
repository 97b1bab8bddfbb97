"""The published layout: derivations, summaries, label aid exact, and files that say what they hold."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from analysis_cases import MODELS
from golden_fits import Golden

from emo_select.analysis.describe import sums_by_group
from emo_select.analysis.fit import Fitting, fit, nearest_places
from emo_select.analysis.label import label
from emo_select.analysis.layout import ModelFolder
from emo_select.analysis.published import cluster_samples, derive, document_means, summary, write_published
from emo_select.errors import EmoSelectError


@pytest.fixture(params=MODELS)
def gold(request: pytest.FixtureRequest, analysis: Path) -> Golden:
    return Golden(analysis / "pretraining" / request.param)


def test_derivations(gold: Golden) -> None:
    probs, topk = (derive(gold.logits, gold.layers, kind) for kind in ("probs", "topk_binary"))
    assert probs.dtype == np.float16 and topk.dtype == np.uint8
    np.testing.assert_allclose(probs.astype(np.float32), gold.derived("probs").astype(np.float32), atol=5e-4)
    assert (topk != gold.derived("topk_binary")).sum() <= 20  # equal float16 logits
    sources = {"doc_probs": "probs", "doc_topk_freq": "topk_binary", "doc_layer0_probs": "layer0_probs"}
    for name, source in sources.items():
        expected = gold.derived(name)
        found = document_means(gold.derived(source), gold.bounds, expected.dtype)
        np.testing.assert_allclose(found.astype(np.float32), expected.astype(np.float32), atol=5e-4)


def test_summaries(gold: Golden) -> None:
    seen = 0
    for run in gold.runs():
        if run.prepared is None:
            continue
        rows = np.arange(len(run.rows)) if run.kept is None else run.kept
        of_rows = np.full(len(run.rows), -1, dtype=np.int32)
        of_rows[rows] = run.assignments
        k = run.info["k"]
        nearest = [rows[places].tolist() for places in nearest_places(run.prepared, run.assignments, k, 5)]
        place = None if run.kept is None else {int(row): i for i, row in enumerate(rows)}
        found = summary(of_rows, sums_by_group(run.values, of_rows, k), nearest, run.rows, place)
        assert found == json.loads((run.folder / "summary.json").read_text()), run.folder.name
        seen += 1
    assert seen > 5


def test_the_label_aid(gold: Golden) -> None:
    expected = json.loads((gold.folder / "explorer" / "cluster_samples.json").read_text())
    assigned = np.load(gold.folder / "runs" / "probs_mean_pca_l2_spherical_kmeans_k16" / "assignments.npy")

    def decode(ids: Sequence[int], skip: bool) -> str:
        return " ".join(f"t{number}" for number in ids if not (skip and number == 0))

    sources = np.array([one["source"] for one in gold.documents])
    for c, text in cluster_samples(assigned.astype(np.int32), gold.tokens, gold.bounds, sources, 16, decode):
        lines, want = [line.strip() for line in text.split("\n")], expected[f"cluster_{c:02d}.txt"]
        assert lines[2:2 + len(want["sources"])] == want["sources"]
        assert want["frequent"] in lines and want["enriched"] in lines
        first = next(i for i, line in enumerate(lines) if line.endswith("Sampled contexts ==="))
        assert lines[first + 1:first + 1 + len(want["contexts"])] == [one.strip() for one in want["contexts"]]


def test_files_of_a_whole_analysis(extracted: dict[str, ModelFolder], analysis: Path, tmp_path: Path) -> None:
    folder, expected = extracted["emo_shared1"], analysis / "pretraining" / "emo_shared1"
    fits = label(folder, fit(folder, Fitting(ks=(4,), restarts=2)))
    target = write_published(folder, fits, tmp_path / "emo_shared1")
    info, published = (json.loads((place / "info.json").read_text()) for place in (target, expected))
    assert {**published, "model_path": "emo_shared1"} == info and list(published) == list(info)
    for name in ("documents.npy", "doc_boundaries.npy"):
        assert (target / name).read_bytes() == (expected / name).read_bytes()
    rows = [gzip.decompress((place / "metadata_docs.jsonl.gz").read_bytes()) for place in (target, expected)]
    assert rows[0] == rows[1]
    tokens = [json.loads(line) for line in gzip.decompress((target / "metadata_tokens.jsonl.gz").read_bytes())
              .splitlines()]
    sample = json.loads((expected / "metadata_tokens.sample.json").read_text())
    assert (len(tokens), tokens[:3], tokens[-2:]) == (sample["rows"], sample["first"], sample["last"])
    logits = np.load(target / "embeddings_logits.npy")
    assert logits.dtype == np.float16 and logits.shape == np.load(expected / "embeddings_logits.npy").shape
    run = target / fits[0].name
    assert np.load(run / "assignments.npy").dtype == np.int32
    assert set(json.loads((run / "run_info.json").read_text())) == {"embedding", "preprocess", "method", "k", "metrics"}
    assert len(json.loads((run / "cluster_labels.json").read_text())) == 4
    assert len(list((run / "cluster_samples").iterdir())) == 4


def test_a_folder_of_another_is_not_replaced(extracted: dict[str, ModelFolder], tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep me")
    with pytest.raises(EmoSelectError, match="holds something else"):
        write_published(extracted["emo_shared1"], [], tmp_path / "mine")
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep me"
