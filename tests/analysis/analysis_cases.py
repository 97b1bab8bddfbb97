"""The golden models of the analysis, and corpora of made-up documents."""

from __future__ import annotations

import numpy as np

from emo_select.analysis.corpus import Corpus

MODELS = ("emo_shared1", "emo_noshared_norm")


def corpus_of(texts: list[list[int]], labels: list[str] | None = None) -> Corpus:
    """A corpus of these ids."""
    names = labels or ["a"] * len(texts)
    return Corpus([np.asarray(ids, dtype=np.int32) for ids in texts], [{"source": name} for name in names])
