"""Golden data of the analysis, and small extractions that tests share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from analysis_cases import MODELS, corpus_of

from emo_select.analysis.corpus import Corpus
from emo_select.analysis.layout import ModelFolder
from emo_select.analysis.routing import extract
from emo_select.analysis.tokenfiles import Published, published_sample, read_mix
from emo_select.checkpoint import open_checkpoint


@pytest.fixture(scope="session")
def analysis(shared_dir: Path) -> Path:
    """The reference numbers of the analysis."""
    folder = shared_dir / "golden" / "analysis"
    if not folder.is_dir():
        pytest.skip(f"there is no {folder}")
    return folder


@pytest.fixture(scope="session")
def golden_corpus(analysis: Path) -> Corpus:
    """The documents that the published sampler drew."""
    mix = read_mix(str(analysis / "s3" / "mix.txt"), str(analysis / "s3"))
    return published_sample(mix, Published(430, 48, chunk_bytes=4000), eos=0)


@pytest.fixture(scope="session")
def extracted(golden_corpus: Corpus, golden: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelFolder]:
    """Both golden models on those documents."""
    root = tmp_path_factory.mktemp("extracted")
    for model in MODELS:
        with open_checkpoint(golden / "models" / model) as checkpoint:
            extract(checkpoint, golden_corpus, model, root / model, logits=True)
    return {model: ModelFolder(root / model) for model in MODELS}


@pytest.fixture
def small(golden: Path, tmp_path: Path) -> Callable[..., ModelFolder]:
    """`small(texts, labels, model)`: the routing of a few made-up documents."""

    def build(texts: list[list[int]], labels: list[str] | None = None, model: str = "emo_shared1", **options: Any
              ) -> ModelFolder:
        with open_checkpoint(golden / "models" / model) as checkpoint:
            extract(checkpoint, corpus_of(texts, labels), model, tmp_path / model, **options)
        return ModelFolder(tmp_path / model)

    return build
