"""Topic coverage: the published vectors, matrices and orders, and the thresholds that are right."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from analysis_cases import MODELS, corpus_of

from emo_select.analysis.corpus import Corpus
from emo_select.analysis.coverage import KINDS, Coverage, collect, colour_limits, heatmaps, shown_layers, summarise
from emo_select.analysis.coverageplots import draw_coverage, figure6, shared_order
from emo_select.analysis.layout import LayerInfo
from emo_select.analysis.tokenfiles import Published, published_sample, topic_mix
from emo_select.checkpoint import open_checkpoint
from emo_select.errors import SpecError


@pytest.fixture(scope="module")
def corpus(analysis: Path) -> Corpus:
    folder = next((analysis / "s3" / "preprocessed" / "cc_all_dressed").rglob("vigintile_0020")).parents[1]
    return published_sample(topic_mix(str(folder)), Published(7200, 0, chunk_bytes=4000, evenly=True), eos=0)


@pytest.fixture(scope="module")
def covered(corpus: Corpus, golden: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Coverage]:
    root = tmp_path_factory.mktemp("coverage")
    found = {}
    for model in MODELS:
        with open_checkpoint(golden / "models" / model) as checkpoint:
            found[model] = collect(checkpoint, corpus, model, root / model)
    return found


@pytest.mark.parametrize("model", MODELS)
def test_document_vectors(model: str, covered: dict[str, Coverage], analysis: Path) -> None:
    for kind in KINDS:
        expected = np.load(analysis / "weborganizer" / model / f"embeddings_doc_{kind}.npy")
        found = covered[model].vectors(kind)
        assert found.dtype == expected.dtype
        np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("model", MODELS)
def test_pictures(model: str, covered: dict[str, Coverage], analysis: Path) -> None:
    folder = analysis / "weborganizer"
    order = json.loads((folder / "topic_order.json").read_text())
    assert shared_order([covered["emo_shared1"], covered["emo_noshared_norm"]]) == order
    for kind in KINDS:
        expected = json.loads((folder / model / f"heatmaps_{kind}.json").read_text())
        topics = covered[model].topics(kind, published_threshold=True).ordered(order)
        found = heatmaps(topics, kind)
        assert list(found) == list(expected)
        for name, picture in expected.items():
            for key, value in picture.items():
                if key in ("matrix", "matrices"):
                    np.testing.assert_allclose(found[name][key], value, atol=5e-6, err_msg=name)
                else:
                    assert found[name][key] == value, name


def test_figure_6(covered: dict[str, Coverage], analysis: Path, tmp_path: Path) -> None:
    expected = json.loads((analysis / "weborganizer" / "figure6.json").read_text())
    order, matrices = expected["calls"][0]["topics"], []
    for call, model in zip(expected["calls"], (expected["left"], expected["right"]), strict=True):
        topics = covered[model].topics("probs").ordered(order)
        assert shown_layers(len(topics.vectors)) == call["layers"]
        found = [topics.similarity(layer) for layer in call["layers"]]
        np.testing.assert_allclose(found, call["matrices"], atol=5e-6)
        matrices += found
    assert colour_limits(matrices) == pytest.approx((call["vmin"], call["vmax"]), abs=5e-6)
    pytest.importorskip("matplotlib")
    models = [covered[expected["left"]], covered[expected["right"]]]
    assert figure6(models, tmp_path / "figure6.png", order).stat().st_size > 10_000
    assert len(draw_coverage(models[0], tmp_path / "pictures", order)) == 10


def test_npz_keys_are_the_published_ones(covered: dict[str, Coverage], analysis: Path) -> None:
    expected = np.load(analysis / "weborganizer" / "emo_shared1" / "doc_probs_heatmap_data.npz")
    found = np.load(covered["emo_shared1"].path / "doc_probs_heatmap_data.npz")
    assert sorted(found) == sorted(expected)
    for key in expected:
        assert found[key].dtype == expected[key].dtype and found[key].shape == expected[key].shape
        if key != "topics":
            np.testing.assert_allclose(found[key], expected[key], atol=5e-6)


def test_the_uniform_share_of_tokens_is_k_over_e() -> None:
    layers = [LayerInfo(layer=0, experts=4, chosen=2)]
    values = np.array([[0.9, 0.4, 0.4, 0.3]], dtype=np.float32)  # adds up to 2; alike would be 0.5 each
    assert summarise(values, ["a"], layers, "topk_freq").above_uniform.tolist() == [[1]]
    assert summarise(values, ["a"], layers, "topk_freq", published_threshold=True).above_uniform.tolist() == [[4]]
    assert summarise(values / 2, ["a"], layers, "probs").above_uniform.tolist() == [[1]]


def test_layers_of_unequal_size_and_one_topic(golden: Path, tmp_path: Path) -> None:
    with open_checkpoint(golden / "models" / "emo_densefirst") as checkpoint:
        found = collect(checkpoint, corpus_of([[5, 6, 7], [8]], ["a", "a"]), "m", tmp_path / "m")
        topics = found.topics("probs")
        assert topics.names == ["a"] and topics.similarity(0).tolist() == [[pytest.approx(1)]]
        with pytest.raises(SpecError, match="other texts or of another model"):
            collect(checkpoint, corpus_of([[5, 6]], ["a"]), "m", tmp_path / "m")
