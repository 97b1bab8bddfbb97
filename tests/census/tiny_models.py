"""Tiny random models of every causal Mixture-of-Experts family that the installed transformers has.

`moe_types()` finds the families in transformers itself, so that a newer release brings its new ones along. Whatever a
configuration class knows of `SIZES` is set, part by part where configurations are nested; `EXTRA` says what a family
needs besides. Twelve experts, three per token where the family can, 64 tokens, three layers, some 20,000 weights.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import model_type_to_module_name
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

EXPERTS, TOP_K, VOCABULARY, LAYERS = 12, 3, 64, 3
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "vocab_size_per_layer_input": VOCABULARY,
    "unpadded_vocab_size": VOCABULARY, "max_position_embeddings": 64,
    "model_max_length": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "hidden_size": 16, "num_hidden_layers": LAYERS, "num_layers": LAYERS, "head_dim": 8,
    "num_attention_heads": 2, "num_key_value_heads": 2,
    "intermediate_size": 24, "dense_intermediate_size": 24, "ffn_hidden_size": 24, "intermediate_size_mlp": 24,
    "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8, "shared_intermediate_size": 8,
    "shared_experts_intermediate_size": 8, "expert_ffn_hidden_size": 8, "moe_shared_expert_intermediate_size": 8,
    "num_experts": EXPERTS, "num_local_experts": EXPERTS, "n_routed_experts": EXPERTS, "moe_num_experts": EXPERTS,
    "num_experts_per_tok": TOP_K, "num_experts_per_token": TOP_K, "moe_topk": TOP_K, "moe_k": TOP_K,
    "top_k_experts": TOP_K, "n_group": 3, "num_expert_group": 3, "topk_group": 2, "routed_scaling_factor": 1.5,
    "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8,
    "index_head_dim": 8, "index_n_heads": 2, "index_topk": 64, "sliding_window": 8, "sliding_window_size": 8,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 2,
    "linear_head_dim": 8, "linear_num_heads": 2, "router_jitter_noise": 0.0, "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 0,
}
MIXED = ["linear_attention", "full_attention", "linear_attention"]
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
# What a family needs besides or instead of SIZES; nested configurations are tiny by the same rule, part by part.
EXTRA: dict[str, dict[str, Any]] = {
    "beam": {"mlp_layer_types": ["dense", "sparse", "sparse"]},
    "dbrx": {"d_model": 16, "n_heads": 2, "n_layers": LAYERS, "max_seq_len": 64,
             "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
             "ffn_config": {"hidden_size": 16, "ffn_hidden_size": 8, "moe_num_experts": EXPERTS, "moe_top_k": TOP_K}},
    "deepseek_v2": {"topk_method": "group_limited_greedy"},
    "deepseek_v4": {"mlp_layer_types": ["moe"] * LAYERS, "num_key_value_heads": 1, "o_groups": 2, "o_lora_rank": 8,
                    "hc_mult": 2, "layer_types": ["sliding_attention", "compressed_sparse_attention",
                                                  "heavily_compressed_attention"]},
    "dots3_note_audio_encoder": {"adapter_input_size": 16, "adapter_out_dim": 16},
    "doge": {"is_moe": True, "num_experts": 16},
    "dots1": {"n_shared_experts": 1},
    "dots3_note_vision_encoder": {"pyramid_num_routed": [-1] * LAYERS, "adapter_in_dim": 16, "adapter_out_dim": 16},
    "dots3_note_text": {"swa_num_attention_heads": 2, "swa_num_key_value_heads": 2, "swa_q_lora_rank": 8,
                        "swa_kv_lora_rank": 8, "swa_head_dim": 8, "swa_qk_nope_head_dim": 4, "swa_v_head_dim": 8},
    "gemma4_text": {"enable_moe_block": True, "hidden_size_per_layer_input": 8, "global_head_dim": 8},
    "granitemoehybrid": {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1,
                         "layer_types": ["mamba", "attention", "mamba"]},
    "inkling2_text": {"conv_kernel_size": 2}, "inkling_text": {"conv_kernel_size": 2},
    "jamba": {"attn_layer_period": 3, "attn_layer_offset": 1, "mamba_d_state": 4, "mamba_dt_rank": 4},
    "jetmoe": {"kv_channels": 8, "num_key_value_heads": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1},
    "longcat_flash": {"zero_expert_num": 2, "num_layers": 2, "head_dim": 4},
    "mimo_v2_flash": {"num_attention_heads": 4, "rope_parameters": {
        "full_attention": ROPE | {"partial_rotary_factor": 0.5},
        "sliding_attention": ROPE | {"partial_rotary_factor": 0.5}}},
    "nemotron_h": {"layers_block_type": ["linear_attention", "moe", "full_attention", "moe"], "mamba_num_heads": 2,
                   "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 1, "use_mamba_kernels": False},
    "phimoe": {"num_experts_per_tok": 2},
    "bailing_hybrid": {"layer_types": MIXED}, "kimi_linear": {"layer_types": MIXED},
    "qwen3_next": {"layer_types": MIXED}, "qwen3_5_moe_text": {"layer_types": MIXED},
    "qwen2_moe": {"mlp_only_layers": [0]}, "qwen3_moe": {"decoder_sparse_step": 2},
    "qwen4_exp_text": {"layer_types": ["linear_attention", "indexed_attention", "linear_attention"], "hc_count": 2,
                       "hc_lowrank": 4, "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8,
                       "indexer_budget": 8, "indexer_compress_ratio": 2},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 8},
}


def moe_types() -> list[str]:
    """Every `model_type` with a causal language model whose configuration speaks of experts."""
    models = Path(transformers.__file__).parent / "models"
    return [name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
            if any("expert" in file.read_text(encoding="utf-8")
                   for file in (models / model_type_to_module_name(name)).glob("configuration_*.py"))]


def tiny_config(model_type: str, **changes: Any) -> PreTrainedConfig:
    """A configuration of the family with `changes` (of the text part where it is nested)."""
    kind = CONFIG_MAPPING[model_type]
    values = tiny_values(kind)
    values.get("text_config", values).update(changes)
    return kind(**values)


def tiny_values(kind: Any) -> dict[str, Any]:
    """What makes a configuration of this class tiny."""
    values = {key: value for key, value in SIZES.items() if key in kind.__dataclass_fields__}
    values |= EXTRA.get(kind.model_type, {})
    for name, part in kind.sub_configs.items():
        if name not in values and issubclass(part, PreTrainedConfig):
            values[name] = tiny_values(part)
    return values


def tiny_model(model_type: str, **changes: Any) -> PreTrainedModel:
    """A random model in evaluation mode, with routers peaked enough that choices matter."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(model_type, **changes)).eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point() and "norm" not in name:
                tensor.normal_(std=0.5 if "bias" in name else 0.3)
    return model


@cache
def tiny_checkpoint(model_type: str, folder: Path) -> tuple[PreTrainedModel, Path]:
    """The model (not to be changed) and where it is saved: a folder of the family's name in `folder`. Built once."""
    model = tiny_model(model_type)
    model.save_pretrained(folder / model_type)
    return model, folder / model_type
