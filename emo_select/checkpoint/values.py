"""config.json's values, looked at before anything is built from them: kinds, and sizes that no model has."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from emo_select.errors import CheckpointError

COUNTS = ("hidden_size", "intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size",
          "dense_intermediate_size", "vocab_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
          "head_dim", "max_position_embeddings", "num_experts", "num_local_experts", "n_routed_experts",
          "num_experts_per_tok", "decoder_sparse_step", "n_group", "topk_group", "kv_lora_rank", "q_lora_rank")
FROM_ZERO = ("num_shared_experts", "n_shared_experts", "first_k_dense_replace", "num_nextn_predict_layers",
             "intermediate_size", "decoder_sparse_step", "n_group", "topk_group")
NUMBERS = ("rms_norm_eps", "rope_theta", "initializer_range", "routed_scaling_factor", "attention_dropout",
           "router_aux_loss_coef", "layer_norm_eps")
FLAGS = ("tie_word_embeddings", "norm_topk_prob", "attention_bias", "use_cache")
TEXTS = ("model_type", "hidden_act", "topk_method", "scoring_func")
LISTS = ("always_active_experts", "num_experts_per_layer", "num_shared_experts_per_layer", "mlp_only_layers")
LISTS_PER_LAYER = ("always_active_experts_per_layer",)
OBJECTS = ("rope_scaling", "rope_parameters")
LIMITS = {"num_hidden_layers": 10_000, "num_experts": 100_000, "num_local_experts": 100_000,
          "n_routed_experts": 100_000, "num_experts_per_tok": 100_000}
LARGEST = 2**31


def check_values(config: Mapping[str, Any]) -> None:
    """Raise `CheckpointError` naming the first key whose value is of a wrong kind, or larger than any model's.

    A null, as an absent key, means the architecture's default.
    """
    for key, value in config.items():
        if value is None:
            continue
        if key in COUNTS or key in FROM_ZERO:
            _check_count(key, value)
        elif key in NUMBERS and (isinstance(value, bool) or not isinstance(value, int | float)
                                 or not math.isfinite(value)):
            raise _wrong(key, "a number", value)
        elif key in FLAGS and not isinstance(value, bool):
            raise _wrong(key, "true or false", value)
        elif key in TEXTS and not isinstance(value, str):
            raise _wrong(key, "a text", value)
        elif key in LISTS and not _is_list(value):
            raise _wrong(key, "a list of whole numbers", value)
        elif key in LISTS_PER_LAYER and not (isinstance(value, list) and all(map(_is_list, filter(None, value)))):
            raise _wrong(key, "a list of lists of whole numbers", value)
        elif key in OBJECTS and not isinstance(value, dict):
            raise _wrong(key, "an object", value)


def _is_list(value: Any) -> bool:
    return isinstance(value, list) and all(type(one) is int and one >= 0 for one in value)


def _check_count(key: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < (key not in FROM_ZERO):
        raise _wrong(key, "a whole number", value)
    limit = LIMITS.get(key, LARGEST)
    if value > limit:
        raise CheckpointError(f"{key} in config.json is {value:,}, which no model has (at most {limit:,}).")


def _wrong(key: str, kind: str, value: Any) -> CheckpointError:
    shown = repr(value)
    return CheckpointError(f"{key} in config.json must be {kind}, not {shown[:60]}.")
