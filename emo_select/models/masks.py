"""Whether a decoder can be given an attention mask of one's own: tokens of several texts in one row."""

from __future__ import annotations

from typing import Any


def why_no_mask(config: Any, max_length: int) -> str | None:
    """Why a decoder of this transformers configuration takes no such mask for texts up to `max_length` tokens."""
    if config.is_encoder_decoder:
        return "it is an encoder-decoder"
    if config._attn_implementation not in ("sdpa", "eager"):
        return f"{config._attn_implementation} attention takes no custom mask"
    for name in ("sliding_window", "attention_chunk_size"):
        window = getattr(config, name, None)
        if window and window < max_length and _is_local(config):
            return f"its attention is limited to {window} tokens"
    return None


def _is_local(config: Any) -> bool:
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return any(kind != "full_attention" for kind in kinds)
    return bool(getattr(config, "use_sliding_window", True))
