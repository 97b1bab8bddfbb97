"""Clustering: the published definitions exactly, and objectives that are no worse than the published ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from analysis_cases import MODELS
from golden_fits import Golden

from emo_select.analysis.embeddings import embedding
from emo_select.analysis.fit import Fitting, cluster, draw_balanced, fit, unit
from emo_select.analysis.kmeans import has_faiss, kmeans, mean_cosine
from emo_select.analysis.layout import ModelFolder
from emo_select.analysis.pca import fit_pca
from emo_select.analysis.quality import adjusted_rand, published_quality, survival
from emo_select.errors import SpecError, UnknownNameError

Build = Callable[..., ModelFolder]


@pytest.fixture(params=MODELS)
def gold(request: pytest.FixtureRequest, analysis: Path) -> Golden:
    return Golden(analysis / "pretraining" / request.param)


def test_principal_components(gold: Golden) -> None:
    for name in ("probs", "doc_probs", "topk_binary"):
        values = gold.derived(name).astype(np.float32)
        pca = fit_pca(lambda values=values: [(i, values[i:i + 500]) for i in range(0, len(values), 500)],
                      *values.shape)
        expected = json.loads((gold.folder / "pca" / f"{name}.json").read_text())
        assert len(pca.components) == expected["components_95"]
        curve = np.array(expected["cumulative_variance_exact_svd"])
        np.testing.assert_allclose(pca.cumulative[:len(curve)], curve, atol=1e-5)
    values = gold.derived("probs").astype(np.float32)
    found = fit_pca(lambda: [(0, values)], *values.shape).apply(values)
    published = np.load(gold.folder / "pca" / "probs.mean_pca.npy")
    grams = found @ found.T, published @ published.T
    assert np.abs(grams[0] - grams[1]).max() <= 0.02 * np.abs(grams[1]).max()


def test_published_metrics_of_published_clusters(gold: Golden) -> None:
    for run in gold.runs():
        if run.prepared is None:
            continue
        rows = range(len(run.rows)) if run.kept is None else run.kept
        found = published_quality(run.prepared, run.assignments, [run.rows[i]["source"] for i in rows])
        assert found == pytest.approx(run.info["metrics"], rel=1e-6), run.folder.name


def test_balanced_rows_are_the_published_ones(gold: Golden) -> None:
    runs = [run for run in gold.runs() if run.kept is not None]
    assert runs
    for run in runs:
        labels = np.array([row["source"] for row in run.rows])
        most = 100 if "balancedN100" in run.folder.name else None
        np.testing.assert_array_equal(draw_balanced(labels, most, 42), run.kept)


def test_objectives_reach_the_published_ones(gold: Golden) -> None:
    expected = json.loads((gold.folder / "runs" / "objective.json").read_text())
    for run in gold.runs():
        if run.prepared is None or run.info["method"] != "spherical_kmeans" or run.info["k"] > 8:
            continue
        if run.folder.name not in expected:
            continue
        published = expected[run.folder.name]["mean_cosine_to_own_centre"]
        assert mean_cosine(run.prepared, run.assignments) == pytest.approx(published, rel=1e-6)
        one = kmeans(unit(run.prepared), run.info["k"], restarts=8)
        assert one.objective == pytest.approx(mean_cosine(run.prepared, one.assignments), rel=1e-5)
        assert one.objective >= published, run.folder.name
        assert min(one.objectives) >= 0.95 * published


def test_hierarchical_clusters_are_the_published_ones(gold: Golden) -> None:
    for run in gold.runs():
        if run.info["method"] == "hierarchical" and run.prepared is not None:
            found = cluster(run.prepared, run.info["k"], Fitting(method="hierarchical"))
            assert adjusted_rand(found.assignments, run.assignments) == 1


def test_clusters_that_are_plain_to_see_are_found() -> None:
    generator = np.random.default_rng(0)
    centres = generator.normal(size=(6, 20))
    truth = generator.integers(0, 6, 600).astype(np.int32)
    values = unit((centres[truth] + 0.1 * generator.normal(size=(600, 20))).astype(np.float32))
    engines = ["torch", "faiss"] if has_faiss() else ["torch"]
    for engine in engines:
        found = kmeans(values, 6, engine=engine)  # type: ignore[arg-type]
        assert adjusted_rand(found.assignments, truth) == 1
        assert len(np.unique(found.assignments)) == 6


def test_as_many_clusters_as_rows_and_rows_that_are_alike() -> None:
    values = unit(np.random.default_rng(0).normal(size=(7, 5)).astype(np.float32))
    assert sorted(kmeans(values, 7, restarts=2).assignments) == list(range(7))
    alike = np.repeat(values[:2], 5, axis=0)
    assert kmeans(alike, 4, restarts=2).objective == pytest.approx(1, abs=1e-5)
    with pytest.raises(SpecError, match="8 clusters need at least 8 rows"):
        kmeans(values, 8)


def test_survival_of_clusters() -> None:
    best, other = (np.array(rows, dtype=np.int32) for rows in ([0, 0, 1, 1, 2, 2], [1, 1, 0, 0, 0, 2]))
    assert survival(best, [other], 3) == pytest.approx((1, 2 / 3, 1 / 2))


def test_a_fit_on_disk(extracted: dict[str, ModelFolder], tmp_path: Path) -> None:
    folder = extracted["emo_noshared_norm"]
    fits = fit(folder, Fitting(ks=(4, 8), restarts=3))
    assert [one.info.k for one in fits] == [4, 8]
    info = fits[1].info
    assert info.routing_fingerprint == folder.info.fingerprint
    assert info.stability is not None and len(info.survival) == 8
    assert fits[1].centres.shape == (8, info.components) and fits[1].nearest.shape == (8, 8)
    assert set(fits[1].assignments) == set(range(8))
    before = (fits[0].path / "fit.json").stat().st_mtime_ns
    again = fit(folder, Fitting(ks=(4,), restarts=3))
    assert (again[0].path / "fit.json").stat().st_mtime_ns == before  # left alone
    assert fit(folder, Fitting(ks=(4,), restarts=2))[0].path != again[0].path


def test_balanced_and_document_fits(extracted: dict[str, ModelFolder]) -> None:
    folder = extracted["emo_noshared_norm"]
    balanced = fit(folder, Fitting(ks=(4,), restarts=2, balance_by="source"))[0]
    clusters = folder.token_clusters(balanced)
    assert (clusters >= 0).sum() == len(balanced.rows) == balanced.info.rows
    sources = np.array(folder.labels("source"))[folder.document_of[balanced.rows]]
    assert len(set(np.unique(sources, return_counts=True)[1])) == 1
    documents = fit(folder, Fitting(embedding="doc_probs", ks=(4,), restarts=2))[0]
    assert documents.of_documents and len(documents.assignments) == folder.info.documents


@pytest.mark.parametrize("name", ["probs", "topk", "logits", "layer1_probs", "doc_probs", "doc_topk_freq",
                                  "doc_logits", "doc_layer0_probs"])
def test_embeddings_are_the_published_derivations(name: str, extracted: dict[str, ModelFolder], analysis: Path) -> None:
    view, gold = embedding(extracted["emo_shared1"], name), Golden(analysis / "pretraining" / "emo_shared1")
    found = np.concatenate([block for _, block in view.blocks()])
    assert found.shape == (view.rows, view.columns)
    if name == "logits":
        expected = gold.logits
    elif name == "layer1_probs":
        expected = gold.derived("probs")[:, 31:62]
    else:
        expected = gold.derived({"topk": "topk_binary"}.get(name, name))
    limit = 0.05 if "topk" in name else 5e-3
    assert (np.abs(found - expected.astype(np.float32)) > limit).mean() < 1e-3
    rows = np.array([0, 3, 4])
    np.testing.assert_array_equal(view.take(rows), found[rows])


@pytest.mark.parametrize(("wanted", "said"), [
    (Fitting(embedding="nonsense"), "Unknown embedding"),
    (Fitting(embedding="layer9_probs"), "no MoE layer 9"),
    (Fitting(preprocess="whiten"), "Unknown preprocessing"),
    (Fitting(method="dbscan"), "Unknown method"),
    (Fitting(ks=(100_000,)), "ask for fewer with --k"),
    (Fitting(ks=(0,)), "from 1 on"),
    (Fitting(balance_by="topic"), "No document has the label 'topic'"),
])
def test_bad_settings_are_one_sentence(wanted: Fitting, said: str, extracted: dict[str, ModelFolder]) -> None:
    with pytest.raises((SpecError, UnknownNameError), match=said):
        fit(extracted["emo_shared1"], wanted)


def test_rows_that_are_all_alike_are_one_sentence(small: Build) -> None:
    with pytest.raises(SpecError, match="nothing to cluster"):
        fit(small([[5]]), Fitting(ks=(1,)))
