"""What routers say, stored layer by layer: the published logits, rows in order, and the same bytes after a kill."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from analysis_cases import MODELS, corpus_of

from emo_select.analysis.corpus import Corpus
from emo_select.analysis.layout import ModelFolder
from emo_select.analysis.routing import extract, probabilities
from emo_select.checkpoint import open_checkpoint
from emo_select.errors import SpecError
from emo_select.experts import StreamOptions
from emo_select.experts.routers import Scores
from emo_select.experts.stream import Reader
from emo_select.models import load_model

Build = Callable[..., ModelFolder]


@pytest.mark.parametrize("model", MODELS)
def test_the_published_logits(model: str, extracted: dict[str, ModelFolder], analysis: Path) -> None:
    folder, expected = extracted[model], analysis / "pretraining" / model
    found = np.concatenate([folder.logits(layer.layer) for layer in folder.info.layers], axis=1)
    published, exact = np.load(expected / "embeddings_logits.npy"), np.load(expected / "logits_fp32.npy")
    apart = np.abs(found.view(np.int16).astype(int) - published.view(np.int16).astype(int))
    assert (apart > 0).mean() < 0.004 and np.abs(found.astype(np.float32) - exact).max() < 5e-3
    probs = np.concatenate([folder.probs(layer.layer) for layer in folder.info.layers], axis=1)
    derived = np.load(expected / "derived" / "embeddings_probs.npy")
    np.testing.assert_allclose(probs.astype(np.float32), derived.astype(np.float32), atol=2e-3)


@pytest.mark.parametrize("model", MODELS)
def test_chosen_experts(model: str, extracted: dict[str, ModelFolder], analysis: Path) -> None:
    folder = extracted[model]
    columns = sum(layer.experts for layer in folder.info.layers)
    packed = np.load(analysis / "pretraining" / model / "derived" / "embeddings_topk_binary.packed.npy")
    expected = np.unpackbits(packed, axis=1)[:, :columns]
    found, first = np.zeros_like(expected), 0
    for layer in folder.info.layers:
        np.put_along_axis(found, folder.topk(layer.layer).astype(np.int64) + first, 1, axis=1)
        first += layer.experts
    assert (found != expected).sum() <= 20  # the published derivation sees equal float16 logits


@pytest.mark.parametrize("model", ["emo_shared1", "emo_densefirst", "emo_densefirst_bias_variable",
                                   "emo_alwaysactive", "emo_alwaysactive_perlayer"])
def test_every_architecture_as_the_model_itself(model: str, small: Build, golden: Path) -> None:
    if not (golden / "models" / model).is_dir():
        pytest.skip(f"there is no golden model {model}")
    texts = [[5, 9, 11, 30, 7], [8, 8], [40, 41, 42]]
    folder = small(texts, model=model, logits=True)
    whole: Any = load_model(str(golden / "models" / model), dtype="float32")
    for number, ids in enumerate(texts):
        with torch.no_grad():
            said = whole(torch.tensor([ids]), output_router_logits=True).router_logits
        said = [one for one in said if one is not None]
        rows = slice(folder.bounds[number], folder.bounds[number + 1])
        assert len(said) == len(folder.info.layers)
        for layer, logits in zip(folder.info.layers, said, strict=True):
            expected = logits.view(len(ids), -1)[:, :layer.experts].numpy()
            np.testing.assert_allclose(folder.logits(layer.layer)[rows].astype(np.float32), expected, atol=4e-3)
            assert all(set(layer.always_active) <= set(row) for row in folder.topk(layer.layer)[rows].tolist())


def test_sigmoid_routers_give_a_distribution() -> None:
    logits = torch.tensor([[0.0, 2.0, -1.0]])
    found = probabilities(Scores(logits, logits.sigmoid(), "sigmoid"), 3)
    affinities = logits[0].sigmoid()
    torch.testing.assert_close(found[0], affinities / affinities.sum())


def test_shared_prefixes_and_repeated_documents(golden: Path, tmp_path: Path) -> None:
    prefix = [int(i) for i in np.random.default_rng(0).integers(2, 60, 700)]
    texts = [[*prefix, 5, 6], [*prefix, 7], [9, 9, 9], [*prefix, 5, 6]]
    folders = []
    for name, order in (("together", texts), ("apart", texts[:1])):
        with open_checkpoint(golden / "models" / "emo_shared1") as checkpoint:
            extract(checkpoint, corpus_of(order), "m", tmp_path / name)
        folders.append(ModelFolder(tmp_path / name))
    together, apart = (folder.probs(2) for folder in folders)
    np.testing.assert_allclose(together[:702].astype(float), apart.astype(float), atol=2e-3)
    np.testing.assert_array_equal(together[:702], together[-702:])
    assert np.abs(together[702:702 + 700].astype(float) - apart[:700].astype(float)).max() < 2e-3
    assert together[1403:1406].any()


class Killed(BaseException):
    """Stands for the end of the process between two layers."""


@pytest.mark.parametrize("layer", [1, 2, 3])
def test_killed_between_layers_the_bytes_are_the_same(layer: int, golden: Path, tmp_path: Path,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = corpus_of([[5, 9, 11], [7, 8], [40, 41, 42, 43]])
    with open_checkpoint(golden / "models" / "emo_shared1") as checkpoint:
        extract(checkpoint, corpus, "m", tmp_path / "whole")
        with monkeypatch.context() as patch:
            asked = _die_at(layer, patch)
            with pytest.raises(Killed):
                extract(checkpoint, corpus, "m", tmp_path / "killed")
            assert not (tmp_path / "killed" / "routing").exists()
        with monkeypatch.context() as patch:
            asked = _die_at(99, patch)
            extract(checkpoint, corpus, "m", tmp_path / "killed")
            assert asked[0] == layer  # it went on where it stopped
    files = sorted(path.name for path in (tmp_path / "whole" / "routing").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "killed" / "routing").iterdir())
    for name in files:
        assert (tmp_path / "whole" / "routing" / name).read_bytes() == \
            (tmp_path / "killed" / "routing" / name).read_bytes(), name


def _die_at(layer: int, patch: pytest.MonkeyPatch) -> list[int]:
    plain, asked = Reader.shell, list[int]()

    def shell(self: Reader, wanted: int) -> Any:
        if wanted == layer:
            raise Killed
        asked.append(wanted)
        return plain(self, wanted)

    patch.setattr(Reader, "shell", shell)
    return asked


def test_scratch_file_and_small_batches_change_nothing(small: Build, golden: Path, tmp_path: Path) -> None:
    texts = [[5, 9, 11, 30, 7], [8, 8], [40, 41, 42]]
    plain = small(texts)
    options = StreamOptions(memory_budget=0, token_budget=3, scratch=tmp_path / "scratch")
    with open_checkpoint(golden / "models" / "emo_shared1") as checkpoint:
        extract(checkpoint, corpus_of(texts), "m", tmp_path / "other", options=options)
    other = ModelFolder(tmp_path / "other")
    for layer in plain.info.layers:
        np.testing.assert_allclose(plain.probs(layer.layer).astype(float), other.probs(layer.layer).astype(float),
                                   atol=1e-3)


def test_other_texts_do_not_replace_what_is_there(small: Build) -> None:
    folder = small([[5, 9, 11]])
    before = (folder.routing / "info.json").read_bytes()
    small([[5, 9, 11]])  # the same again is left alone
    with pytest.raises(SpecError, match="holds the routing of other texts"):
        small([[5, 9, 12]])
    assert (folder.routing / "info.json").read_bytes() == before


def test_one_token(small: Build) -> None:
    folder = small([[5]])
    assert folder.info.tokens == 1 and folder.positions.tolist() == [0]
    assert folder.probs(0).astype(np.float32).sum() == pytest.approx(1, abs=1e-2)


def test_documents_lie_in_order(extracted: dict[str, ModelFolder], golden_corpus: Corpus) -> None:
    folder = extracted["emo_shared1"]
    assert [one.labels["source"] for one in folder.documents] == [one["source"] for one in golden_corpus.labels]
    assert folder.positions[folder.bounds[3]] == 0 and folder.document_of[folder.bounds[3]] == 3
