"""Whether a decoder can take packed inputs: asked of its configuration, then of the model itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from emo_select.evaluate.prefixes import ScoredInput
from emo_select.evaluate.scoring import SharedPrefixScorer
from emo_select.models.masks import why_no_mask

PROBE_PREFIX, PROBE_PACK = 70, 16  # long enough to be cached, small enough for several rows
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
LOW_PRECISION_TOLERANCE = 0.15


def why_not(model: Any, max_length: int) -> str | None:
    """Why this model has to take the stock path, or None when packing gives its own numbers."""
    return why_no_mask(model.config.get_text_config(), max_length) or _probe_fails(model)


@torch.inference_mode()
def padding_matters(model: Any) -> bool:
    """Whether padding behind a text changes what the model says of it, as with some kinds of linear attention.

    It is taken to where it cannot be tried, as with positions that end before the padded text does.
    """
    ids = torch.from_numpy(_probe(model.config.get_text_config().vocab_size)[0][0].tokens)[None]
    ids = ids.to(model.get_input_embeddings().weight.device)
    padded = torch.cat([ids, torch.zeros_like(ids)], dim=1)
    try:
        alone, beside = (model(input_ids=row, use_cache=False).logits[0, : ids.shape[1]].float()
                         for row in (ids, padded))
    except (RuntimeError, IndexError, ValueError):
        return True
    allowed = TOLERANCE.get(model.dtype, LOW_PRECISION_TOLERANCE)
    return bool((alone - beside).abs().max() > allowed * alone.std())


def _probe_fails(model: Any) -> str | None:
    """Score a few made-up continuations packed and one by one; both have to agree."""
    inputs, targets = _probe(model.config.get_text_config().vocab_size)
    try:
        scorer = SharedPrefixScorer(model, 8 * PROBE_PACK, pack=PROBE_PACK)
        packed = {index: total for index, total, _ in scorer.score(inputs, targets)}
        plain = [_plain_score(model, row, target) for row, target in zip(inputs, targets, strict=True)]
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError, NotImplementedError) as error:
        return f"it does not take a cached prefix with a custom mask ({type(error).__name__})"
    allowed = TOLERANCE.get(model.dtype, LOW_PRECISION_TOLERANCE)
    worst = max(abs(packed[index] - total) / scale for index, (total, scale) in enumerate(plain))
    return None if worst < allowed else f"packed and separate inputs differ by {worst:.1e}"


def _probe(vocab_size: int) -> tuple[list[ScoredInput], list[np.ndarray[Any, Any]]]:
    rng = np.random.default_rng(0)
    prefix = rng.integers(0, vocab_size, PROBE_PREFIX)
    inputs, targets = [], []
    for _ in range(4):
        context = np.concatenate([prefix, rng.integers(0, vocab_size, 12)])
        for _ in range(2):
            continuation = rng.integers(0, vocab_size, 9)
            inputs.append(ScoredInput(np.concatenate([context, continuation[:-1]]), len(context) - 1))
            targets.append(continuation)
    return inputs, targets


@torch.inference_mode()
def _plain_score(model: Any, row: ScoredInput, target: np.ndarray[Any, Any]) -> tuple[float, float]:
    """Summed log-probability by one plain forward, and the spread of the logits as its scale."""
    ids = torch.from_numpy(row.tokens)[None].to(model.get_input_embeddings().weight.device)
    logits = model(input_ids=ids, use_cache=False).logits[0, row.first_scored :].float()
    chosen = logits.log_softmax(-1).gather(-1, torch.from_numpy(target)[:, None].to(logits.device))
    return float(chosen.sum()), float(logits.std()) * len(target) ** 0.5
