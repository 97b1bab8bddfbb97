"""Words, kinds and names of clusters, on clusters whose nature is known."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from emo_select.analysis.describe import Clustered, describe_clusters
from emo_select.analysis.fit import Fitting, fit
from emo_select.analysis.label import label
from emo_select.analysis.layout import ClusterName, FitFolder, ModelFolder, read_names, write_array, write_names
from emo_select.analysis.naming import name_clusters
from emo_select.analysis.words import Pieces, TokenWords, token_words
from emo_select.errors import CheckpointError, SpecError
from emo_select.models import load_tokenizer
from emo_select.storage import write_json

Build = Callable[..., ModelFolder]


@pytest.fixture
def known(small: Build) -> Clustered:
    """Forty documents of two labels, and three clusters: first tokens, one frequent token, each label's own tokens."""
    generator = np.random.default_rng(0)
    texts = [[int(i) for i in [generator.integers(10, 30), *np.where(
        generator.random(29) < 0.3, 7, generator.integers(10 + 10 * (n % 2), 20 + 10 * (n % 2), 29))]]
        for n in range(40)]
    folder = small(texts, ["even", "odd"] * 20)
    clusters = np.where(folder.tokens == 7, 1, 2 + folder.document_of % 2).astype(np.int32)
    clusters[folder.positions == 0] = 0
    made = fit(folder, Fitting(ks=(4,), restarts=1))[0]
    write_array(made.path / "assignments.npy", clusters)
    return Clustered(folder, FitFolder(made.path), token_words(folder, None))


def test_kinds_words_and_labels(known: Clustered) -> None:
    found = {cluster.id: cluster for cluster in describe_clusters(known)}
    assert [found[c].kind for c in range(4)] == ["position", "word", found[2].kind, found[3].kind]
    assert found[0].explained["position"] == pytest.approx(1)
    assert found[1].explained["token"] == pytest.approx(1)
    assert found[1].token_words[0].word == "7" and found[1].better == "tokens"
    assert found[2].explained["document"] > 0.3
    assert {word.word for word in found[2].token_words} <= {str(i) for i in range(10, 20)}
    assert found[2].labels[0].name == "even" and found[2].labels[0].lift == pytest.approx(2)
    assert sum(cluster.share for cluster in found.values()) == pytest.approx(1)
    assert all(0 <= exemplar.share <= 1 for cluster in found.values() for exemplar in cluster.exemplars)
    layers = found[2].experts
    assert len(layers) == 4 and layers[0].experts[0].share >= layers[0].experts[-1].share


def test_words_are_put_together_from_tokens(known: Clustered) -> None:
    tokenizer = load_tokenizer("demo/emo")
    pieces = Pieces(tokenizer)
    text = "harbor: green bell = Überraschung 日本\n\n"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    split = pieces.split(ids)
    assert len(split) == len(ids) and "".join(split) == text  # a character of several tokens is whole
    assert "�" not in "".join(split)
    words: TokenWords = _words_of(ids)
    assert {"harbor", "green", "bell", "überraschung", "日本", "=", "↵↵"} <= set(words.words)
    assert words.stop[words.words.index("↵↵")] and not words.stop[words.words.index("bell")]
    assert words.begins.sum() == len({*np.cumsum(words.begins)})


def _words_of(ids: list[int]) -> TokenWords:
    class Folder:
        tokens, bounds = np.array(ids, dtype=np.int32), np.array([0, len(ids)])

    return token_words(Folder(), load_tokenizer("demo/emo"))  # type: ignore[arg-type]


def test_names_that_were_edited_stay(known: Clustered) -> None:
    path = known.fit.path
    label(known.folder, [known.fit])
    names = read_names(path, 4)
    assert all(names[c].label == names[c].made != "" for c in range(4))
    write_names(path, {**names, 1: ClusterName(label="sevens", category="code", made=names[1].made)})
    command = f"{sys.executable} -c \"import sys, json; d = json.load(sys.stdin); print('c', d['cluster'])\""
    label(known.folder, [FitFolder(path)], command)
    assert [read_names(path, 4)[c].label for c in range(4)] == ["c 0", "sevens", "c 2", "c 3"]


@pytest.mark.parametrize(("command", "said"), [
    ("/nonexistent/program", "cannot be run"), (f"{sys.executable} -c pass", "gave no label"),
    (f"{sys.executable} -c 'raise SystemExit(3)'", "gave no label"),
])
def test_a_label_command_that_fails(command: str, said: str, known: Clustered) -> None:
    clusters = describe_clusters(known)
    with pytest.raises(SpecError, match=said):
        name_clusters(known, clusters, Pieces(None), command)
    assert not (known.fit.path / "labels.yaml").exists()


def test_published_labels_and_damaged_files(known: Clustered) -> None:
    path = known.fit.path
    write_json(path / "cluster_labels.json", {"2": {"label": "health", "category": "health"}})
    assert read_names(path, 4)[2].label == "health" and read_names(path, 4)[0].label == "Cluster 0"
    (path / "labels.yaml").write_text("0: shortest\n1: {label: long, category: news}\n")
    assert read_names(path, 4)[0].label == "shortest" and read_names(path, 4)[1].category == "news"
    for text in ("- a list\n", "0: {label: [\n", "0: {name: x}\n"):
        (path / "labels.yaml").write_text(text)
        with pytest.raises(CheckpointError):
            read_names(path, 4)


def test_a_fit_of_other_columns_is_not_labelled(known: Clustered, small: Build, tmp_path: Path) -> None:
    info = known.fit.info.model_copy(update={"routing_fingerprint": "other"})
    write_json(known.fit.path / "fit.json", info.model_dump(mode="json"))
    with pytest.raises(SpecError, match="made from other columns"):
        label(known.folder, [FitFolder(known.fit.path)])
