"""Numbers: the golden ones of the demo pair, those of scikit-learn, and cases whose answer is plain."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from emo_select.analysis.clustermeasures import (
    adjusted_information,
    document_statistics,
    expected_information,
    normalised_information,
)
from emo_select.analysis.coverage import Topics
from emo_select.analysis.describe import epsilon_squared, roc_area, sums_by_group
from emo_select.analysis.expertviews import specialisation
from emo_select.analysis.fit import Fitting, fit
from emo_select.analysis.label import label
from emo_select.analysis.layout import Measure, ModelFolder
from emo_select.analysis.quality import contingency
from emo_select.analysis.resample import Named, mean_measure
from emo_select.analysis.routingmeasures import eta_squared, mean_cosine

Build = Callable[..., ModelFolder]


@pytest.fixture(params=["emo", "stdmoe"])
def pair(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("k", [8, 16, 32])
def test_the_demo_pair(pair: str, k: int, analysis: Path) -> None:
    folder = analysis / "demo_pair"
    expected = json.loads((folder / "pair.json").read_text())[pair][f"k{k}"]
    sources = json.loads((folder / "case.json").read_text())["document_source"]
    bounds, tokens = np.load(folder / "doc_boundaries.npy"), np.load(folder / "documents.npy")
    clusters = np.load(folder / f"{pair}_assignments_k{k}.npy").astype(np.int32)
    of_document = np.repeat(np.arange(len(bounds) - 1), np.diff(bounds))
    domains = np.unique(sources, return_inverse=True)[1]
    counts = contingency(of_document, clusters)
    ids = np.unique(tokens, return_inverse=True)[1]
    found = {
        "mean_top_cluster_share_of_doc": document_statistics(counts)[:, 0].mean(),
        "mean_doc_cluster_entropy_bits": document_statistics(counts)[:, 1].mean() * np.log2(counts.shape[1]),
        "mean_clusters_per_doc": (counts > 0).sum(axis=1).mean(),
        "nmi_token_cluster_vs_domain": normalised_information(contingency(domains[of_document], clusters)),
        "nmi_token_cluster_vs_token_id": normalised_information(contingency(ids, clusters)),
        "nmi_doc_majority_cluster_vs_domain": normalised_information(contingency(domains, counts.argmax(axis=1))),
    }
    for name, value in found.items():
        assert value == pytest.approx(expected[name], rel=1e-6), name


def test_topic_cosines_of_the_demo_pair(pair: str, analysis: Path) -> None:
    vectors = np.load(analysis / "demo_pair" / f"{pair}_topic_avg_probs.npy").astype(np.float64)
    expected = json.loads((analysis / "demo_pair" / "pair.json").read_text())[pair]["topics"]
    layers = [vectors.reshape(8, len(expected["max"]), -1)[:, layer] for layer in range(len(expected["max"]))]
    found = [mean_cosine(layer) for layer in layers]
    assert found == pytest.approx(expected["mean_off_diagonal_cosine_per_layer"], rel=1e-5)
    empty = np.zeros((8, len(layers)))
    assert Topics([], empty, empty, empty, layers).similarity(0)[0, 0] == pytest.approx(1)


def test_information_as_scikit_learn_has_it() -> None:
    from sklearn.metrics import adjusted_mutual_info_score, normalized_mutual_info_score

    generator = np.random.default_rng(0)
    first, second = generator.integers(0, 9, 500), generator.integers(0, 5, 500)
    second[:200] = first[:200] % 5
    table = contingency(first, second)
    assert normalised_information(table) == pytest.approx(normalized_mutual_info_score(first, second))
    ami = adjusted_information(table, expected_information(table))
    assert ami == pytest.approx(adjusted_mutual_info_score(first, second))


def test_shares_of_variance() -> None:
    generator = np.random.default_rng(0)
    groups = generator.integers(0, 20, 3000)
    values = generator.normal(size=(3000, 4)) + 2 * np.eye(20)[groups][:, :4]
    sums, counts = sums_by_group(values, groups, 20), np.bincount(groups)
    means = (sums / counts[:, None])[groups]
    expected = 1 - ((values - means) ** 2).sum() / ((values - values.mean(axis=0)) ** 2).sum()
    assert eta_squared(sums, counts, float((values**2).sum())) == pytest.approx(expected)
    member = (groups < 3).astype(int)
    assert epsilon_squared(contingency(groups, member)) == pytest.approx([1, 1])
    chance = epsilon_squared(contingency(groups, generator.integers(0, 2, 3000)))
    assert chance.max() < 0.02  # what many groups explain by chance is taken off


def test_document_statistics_and_curves() -> None:
    found = document_statistics(np.array([[10, 0, 0, 0], [5, 5, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]]))
    assert found[:3].tolist() == [[1, 0, 1], [0.5, pytest.approx(0.5), 2], [0.25, pytest.approx(1), 4]]
    assert np.isnan(found[3]).all()
    assert roc_area(np.array([0.0, 1, 2]), np.array([0, 1, 3]), np.array([5, 1, 0])) == pytest.approx(23.5 / 24)
    assert roc_area(np.zeros(3), np.ones(3), np.ones(3)) == 0.5


def test_specialisation_in_bits() -> None:
    counts = np.array([[4, 2, 0], [0, 2, 0]])  # labels × experts
    expected = np.log2(8 / 6)
    assert specialisation(counts) == [pytest.approx(expected), pytest.approx(_kl([0.5, 0.5], [0.75, 0.25])), None]


def _kl(first: list[float], second: list[float]) -> float:
    return float(sum(a * np.log2(a / b) for a, b in zip(first, second, strict=True)))


def test_intervals_hold_the_mean() -> None:
    values: NDArray[np.float64] = np.random.default_rng(0).normal(3, 1, 400)
    found = mean_measure(Named("x", ""), values, [2.0, 2.2])
    assert found.low is not None and found.high is not None
    assert found.low < 3 < found.high and found.high - found.low == pytest.approx(4 / 20, rel=0.2)
    assert found.null == pytest.approx(2.1)
    assert mean_measure(Named("x", ""), values[:1]).low is None


def by_name(measures: list[Measure]) -> dict[str, Measure]:
    return {one.name: one for one in measures if one.layer is None}


def test_one_document_and_one_label(small: Build) -> None:
    folder = small([[int(i) for i in np.random.default_rng(0).integers(2, 60, 60)]])
    found = by_name(label(folder, fit(folder, Fitting(ks=(3,), restarts=1)))[0].measures)
    assert found["top_cluster_share"].low is None
    assert found["ami_label"].value == 0
    models = by_name(ModelFolder(folder.path).measures)
    assert "topic_cosine" not in models and "knn_purity" not in models
    assert "pool_jaccard_document_d8" in models and "pool_jaccard_other_d8" not in models


def test_measures_of_an_extraction(extracted: dict[str, ModelFolder]) -> None:
    folder = extracted["emo_noshared_norm"]
    fits = label(folder, fit(folder, Fitting(ks=(8,), restarts=2)))
    found = by_name([*fits[0].measures, *ModelFolder(folder.path).measures])
    assert {"top_cluster_share", "cluster_entropy", "clusters_for_90", "ami_label", "ami_token", "ami_position",
            "nmi_majority_label", "first_token_share", "eta2_document", "eta2_token", "eta2_position",
            "pool_mass_label_d8", "topic_cosine", "topic_cosine_centred", "knn_purity", "specialisation",
            "dead_experts", "largest_load"} <= set(found)
    one = found["top_cluster_share"]
    assert one.low < one.value < one.high and one.null < one.value  # type: ignore[operator]
    assert abs(found["ami_label"].null or 0) < 0.05
    layers = [one for one in ModelFolder(folder.path).measures if one.name == "eta2_token" and one.layer is not None]
    assert found["eta2_token"].value == pytest.approx(np.mean([one.value for one in layers]))
