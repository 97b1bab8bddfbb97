"""config.json of a training checkpoint for a model that was released, with the class names of ai2-olmo-core."""

from __future__ import annotations

from typing import Any

from emo_select.convert.experiment import CLASS, OUR_ROUTER, STANDARD_ROUTER, Layer, TrainingModel

_CORE = "olmo_core"


def experiment_config(model: TrainingModel) -> dict[str, Any]:
    """The entries of an experiment that describe the model and its tokenizer; there is no optimiser or data in it."""
    first, others = _main_block(model)
    overrides = {str(i): _block(model, layer) for i, layer in enumerate(model.layers) if layer != first and others}
    return {
        "model": {
            "d_model": model.hidden, "vocab_size": model.vocabulary, "n_layers": len(model.layers),
            "block": _block(model, first), "lm_head": _lm_head(model), "name": "moe" if model.moe else "default",
            "dtype": "float32", "init_method": "normal", "init_seed": 0, "init_std": 0.02,
            **({"block_overrides": overrides} if overrides else {}),
            CLASS: f"{_CORE}.nn.transformer.config.TransformerConfig",
        },
        "dataset": {"tokenizer": _tokenizer(model), "sequence_length": model.sequence_length},
    }


def _main_block(model: TrainingModel) -> tuple[Layer, bool]:
    """The most usual layer with experts (of a dense model: layer 0), and whether there are others."""
    candidates = model.moe or model.layers
    main = max(dict.fromkeys(candidates), key=candidates.count)
    return main, any(layer != main for layer in model.layers)


def _block(model: TrainingModel, layer: Layer) -> dict[str, Any]:
    kv = {} if model.kv_heads == model.heads else {"n_kv_heads": model.kv_heads}
    rope = {"name": "default", "theta": model.rope_theta, "full_precision": True, "no_global_rope": False,
            CLASS: f"{_CORE}.nn.rope.RoPEConfig"}
    attention = {"name": "default", "n_heads": model.heads, **kv, "bias": False, "rope": rope, "dtype": "float32",
                 CLASS: f"{_CORE}.nn.attention.AttentionConfig", "type": "attention"}
    mlp = ({"feed_forward_moe": _moe(model, layer), "name": "moe"} if layer.experts else
           {"feed_forward": _dense(layer), "name": "default"})
    return {"sequence_mixer": attention, "layer_norm": _norm(model), **mlp,
            CLASS: f"{_CORE}.nn.transformer.config.TransformerBlockConfig"}


def _dense(layer: Layer) -> dict[str, Any]:
    return {"hidden_size": layer.width, "name": "default", "bias": layer.bias, "dtype": "float32",
            "activation": "silu", CLASS: f"{_CORE}.nn.feed_forward.FeedForwardConfig"}


def _moe(model: TrainingModel, layer: Layer) -> dict[str, Any]:
    return {"name": "dropless", "num_experts": layer.experts, "hidden_size": layer.width,
            "router": _router(model, layer), "lb_loss_weight": model.balance, "lb_loss_granularity": "local_batch",
            "z_loss_weight": 0.001, "scale_loss_by_num_layers": True, "dtype": "float32",
            CLASS: f"{_CORE}.nn.moe.moe.MoEConfig"}


def _router(model: TrainingModel, layer: Layer) -> dict[str, Any]:
    plain = {"name": "default", "top_k": layer.top_k, "uniform_expert_assignment": False,
             "gating_function": "softmax"}
    if not (layer.shared or model.pools):  # the engine's own router
        return {**plain, CLASS: STANDARD_ROUTER}
    pools = model.pools
    sizes = {"min_document_expert_pool": pools and pools.least, "max_document_expert_pool": pools and pools.most,
             "eval_document_expert_pool": pools and pools.evaluation}
    return {**plain, "num_shared_experts": layer.shared, **sizes, "eos_token_id": model.tokens.eos, CLASS: OUR_ROUTER}


def _lm_head(model: TrainingModel) -> dict[str, Any]:
    return {"name": "default", "layer_norm": _norm(model), "bias": False, "dtype": "float32",
            "loss_implementation": "default", CLASS: f"{_CORE}.nn.lm_head.LMHeadConfig"}


def _norm(model: TrainingModel) -> dict[str, Any]:
    return {"name": "rms", "eps": model.norm_eps, "bias": False, "dtype": "float32",
            CLASS: f"{_CORE}.nn.layer_norm.LayerNormConfig"}


def _tokenizer(model: TrainingModel) -> dict[str, Any]:
    tokens = model.tokens
    optional = {"bos_token_id": tokens.bos, "identifier": tokens.identifier}
    return {"vocab_size": tokens.vocab_size, "eos_token_id": tokens.eos, "pad_token_id": tokens.pad,
            **{key: value for key, value in optional.items() if value is not None},
            CLASS: f"{_CORE}.data.tokenizer.TokenizerConfig"}
