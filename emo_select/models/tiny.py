"""A small copy of an architecture: the same switches, kinds of layers and kinds of routers, with few and narrow layers.

What a real configuration says of sizes is replaced, everything else stays, so that what is true of random weights in
the copy is true of the architecture.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Config = Mapping[str, Any]
HIDDEN, HEADS, HEAD, WIDTH, EXPERTS, TOP_K, VOCABULARY = 32, 4, 8, 16, 12, 3, 64
SMALL = 2_000_000
"""Weights of a model that need not be made any smaller."""

SIZES: Mapping[str, int] = {
    "vocab_size": VOCABULARY, "vocab_size_per_layer_input": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1,
    "hidden_size": HIDDEN, "d_model": HIDDEN, "num_attention_heads": HEADS, "n_heads": HEADS, "head_dim": HEAD,
    "global_head_dim": HEAD, "kv_channels": HEAD, "intermediate_size": WIDTH, "dense_intermediate_size": WIDTH,
    "intermediate_size_mlp": WIDTH, "ffn_hidden_size": WIDTH, "moe_intermediate_size": WIDTH,
    "shared_expert_intermediate_size": WIDTH, "shared_intermediate_size": WIDTH, "expert_ffn_hidden_size": WIDTH,
    "shared_experts_intermediate_size": WIDTH, "moe_shared_expert_intermediate_size": WIDTH,
    "num_experts": EXPERTS, "num_local_experts": EXPERTS, "n_routed_experts": EXPERTS, "moe_num_experts": EXPERTS,
    "kv_lora_rank": 8, "q_lora_rank": 8, "o_lora_rank": 8, "qk_rope_head_dim": HEAD, "qk_nope_head_dim": 4,
    "v_head_dim": HEAD, "index_head_dim": HEAD, "index_n_heads": 2, "index_topk": 4, "sliding_window": 8,
    "sliding_window_size": 8, "attention_chunk_size": 8, "linear_key_head_dim": HEAD, "linear_value_head_dim": HEAD,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_head_dim": HEAD, "linear_num_heads": HEADS,
    "mamba_n_heads": 8, "mamba_d_head": HEAD, "mamba_num_heads": 8, "mamba_head_dim": HEAD, "mamba_d_state": 8,
    "mamba_dt_rank": 4, "ssm_state_size": 8, "hidden_size_per_layer_input": 8, "router_hidden_size": HEAD,
    "num_nextn_predict_layers": 0, "swa_num_attention_heads": HEADS, "swa_head_dim": HEAD, "swa_v_head_dim": HEAD,
    "swa_kv_lora_rank": 8, "swa_q_lora_rank": 8, "swa_qk_nope_head_dim": 4, "hc_lowrank": 4, "indexer_head_dim": HEAD,
    "indexer_n_heads": 2, "indexer_budget": 8, "indexer_compress_ratio": 2,
}
CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts", "moe_top_k")
KEY_HEADS = ("num_key_value_heads", "kv_n_heads", "swa_num_key_value_heads")
LAYERS = ("num_hidden_layers", "num_layers", "n_layers")


def tiny_config(config: Config, layers: int) -> dict[str, Any]:
    """`config`, with its first `layers` layers and small sizes; parts of a nested one alike."""
    count = next((config[key] for key in LAYERS if isinstance(config.get(key), int)), None)
    return {key: _value(config, key, value, count, layers) for key, value in config.items()}


def every_key(config: Config, length: int) -> dict[str, Any]:
    """`config` with attention that looks at all of up to `length` keys where it would look for the best few of them.

    In a small copy many are equally good, and any of them may be taken.
    """
    return {key: every_key(value, length) if isinstance(value, dict)
            else max(value, length) if key == "index_topk" and value else value for key, value in config.items()}


def _value(config: Config, key: str, value: Any, count: int | None, layers: int) -> Any:
    if isinstance(value, dict):
        return _rope(value, config) if key in ("rope_scaling", "rope_parameters") else tiny_config(value, layers)
    if isinstance(value, list) and len(value) == count:
        return [_number(config, key, entry) for entry in value[:layers]]
    if key in LAYERS:
        return min(layers, value)
    return _number(config, key, value)


def _number(config: Config, key: str, value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int) or not value:
        return value
    if key in CHOSEN:
        return min(value, TOP_K)
    if key in KEY_HEADS:
        heads = config.get("num_attention_heads") or config.get("n_heads")
        return 1 if value == 1 else HEADS if value == heads else HEADS // 2
    if key in ("n_group", "num_expert_group"):
        return min(value, 3)
    if key == "topk_group":
        return min(value, 2)
    if key == "eos_token_id":
        return 2
    return SIZES.get(key, value)


def _rope(rope: Config, config: Config) -> dict[str, Any]:
    """Frequencies per dimension, and dimensions per section, cut to the smaller head."""
    half = HEAD // 2
    found: dict[str, Any] = {}
    for key, value in rope.items():
        if isinstance(value, dict):
            found[key] = _rope(value, config)
        elif key in ("short_factor", "long_factor"):
            found[key] = value[:half]
        elif key == "mrope_section":
            share = float(rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1)
            found[key] = [int(half * share), *[0] * (len(value) - 1)]
        else:
            found[key] = value
    return found
