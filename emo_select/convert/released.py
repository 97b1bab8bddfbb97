"""config.json and generation_config.json of a released checkpoint, from the training's model and back."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from typing import Any

from emo_select.convert.experiment import Layer, Pools, Tokens, TrainingModel
from emo_select.errors import ModelError

PUBLISHED_BALANCE = 0.01  # what the published converter leaves in every config, whatever the training used
MODEL_TYPES = ("emo", "flex_olmo_noqknorm_prenorm", "olmo2_noqknorm_prenorm")
STOP_TOKENS = ("<|im_end|>", "<|endoftext|>")


def check_convertible(model: TrainingModel) -> None:
    """Refuse what no released model computes.

    Raises:
        ModelError: with the reason.
    """
    shared = max((layer.shared for layer in model.layers), default=0)
    if shared > 1:
        raise ModelError(f"This model has {shared} shared experts per layer: training gives each the weight 1, but a "
                         "released model divides the weight 1 among them by a softmax, so the converted model would "
                         "be wrong; only models with at most one shared expert can be converted.")
    for what, values in (("width of the experts", {layer.width for layer in model.moe}),
                         ("experts per token", {layer.top_k for layer in model.moe}),
                         ("width of the dense layers", {layer.width for layer in model.layers if not layer.experts}),
                         ("biases of the dense layers", {layer.bias for layer in model.layers if not layer.experts})):
        if len(values) > 1:
            raise ModelError(f"Layers differ in the {what} ({', '.join(map(str, sorted(values)))}); released models "
                             "have one value for all.")
    if not model.moe and model.layers[0].bias:
        raise ModelError("This dense model has biases in its MLPs; the released dense architecture has none.")


def released_config(model: TrainingModel, *, dtype: str, max_length: int, published: bool = False) -> dict[str, Any]:
    """config.json of the released model, with the keys and values of the published converter.

    Unless `published`, the weight of the balance loss is the training's where that is known.
    """
    check_convertible(model)
    common = {
        "attention_bias": False, "attention_dropout": 0.0, "dtype": dtype, "eos_token_id": model.tokens.eos,
        "hidden_act": "silu", "hidden_size": model.hidden, "initializer_range": 0.02,
        "max_position_embeddings": max_length, "num_attention_heads": model.heads,
        "num_hidden_layers": len(model.layers), "num_key_value_heads": model.kv_heads,
        "pad_token_id": model.tokens.pad, "rms_norm_eps": model.norm_eps, "rope_scaling": None,
        "rope_theta": model.rope_theta, "tie_word_embeddings": False, "use_cache": True,
        "transformers_version": importlib.metadata.version("transformers"), "vocab_size": model.vocabulary,
    } | ({"bos_token_id": model.tokens.bos} if model.tokens.bos is not None else {})
    own = _sparse(model, published) if model.moe else {
        "architectures": ["Olmo2NoQKNormPrenormForCausalLM"], "model_type": "olmo2_noqknorm_prenorm",
        "intermediate_size": model.layers[0].width}
    return dict(sorted((common | own).items()))


def _sparse(model: TrainingModel, published: bool) -> dict[str, Any]:
    first = model.moe[0]
    dense = next((layer for layer in model.layers if not layer.experts), None)
    counts, shared = [layer.experts for layer in model.layers], [layer.shared for layer in model.layers]
    active = [list(layer.always_active) for layer in model.layers]
    differ = len(set(counts)) > 1 or len(set(shared)) > 1
    own_active = first.always_active and any(row != active[0] for row in active)
    balance = PUBLISHED_BALANCE if published or model.balance is None else model.balance
    return {
        "architectures": ["EmoForCausalLM"], "model_type": "emo", "intermediate_size": first.width,
        "num_experts": first.experts, "num_experts_per_tok": first.top_k, "num_shared_experts": first.shared,
        "num_experts_per_layer": counts if differ else None, "num_shared_experts_per_layer": shared if differ else None,
        "always_active_experts": list(first.always_active) or None if not own_active else None,
        "always_active_experts_per_layer": active if own_active else None,
        "dense_intermediate_size": dense.width if dense else None, "dense_mlp_bias": dense.bias if dense else False,
        "norm_topk_prob": False, "output_router_logits": True, "router_aux_loss_coef": balance,
    }


def generation_config(stops: list[int], pad: int | None, *, published: bool = False) -> dict[str, Any]:
    """generation_config.json: sampling, and with a tokenizer the tokens that end a text and that pad it.

    The published converter names the last one `pad_token`, which nothing reads; `published` keeps that.
    """
    tokens = {"eos_token_id": stops, "pad_token" if published else "pad_token_id": pad} if stops else {}
    return {"_from_model_config": True, "do_sample": True, **tokens,
            "transformers_version": importlib.metadata.version("transformers")}


def read_released(config: Mapping[str, Any], *, balance: float, pools: Pools | None = None,
                  router: str | None = None) -> TrainingModel:
    """The training's model of a released checkpoint's config.json; the inverse of `released_config`.

    Raises:
        ModelError: another architecture, or a setting that the trainer has no equal for.
    """
    _check_released(config)
    model = TrainingModel(
        hidden=config["hidden_size"], vocabulary=config["vocab_size"], heads=config["num_attention_heads"],
        kv_heads=config.get("num_key_value_heads") or config["num_attention_heads"],
        layers=tuple(_released_layer(config, index) for index in range(config["num_hidden_layers"])),
        rope_theta=config.get("rope_theta") or (config.get("rope_parameters") or {}).get("rope_theta", 500_000),
        norm_eps=config["rms_norm_eps"], balance=balance, router=router, pools=pools,
        sequence_length=config.get("max_position_embeddings"),
        tokens=Tokens(config["vocab_size"], _first(config.get("eos_token_id")), config.get("pad_token_id"),
                      config.get("bos_token_id")))
    check_convertible(model)
    return model


def _released_layer(config: Mapping[str, Any], index: int) -> Layer:
    if config["model_type"] == "olmo2_noqknorm_prenorm":
        return Layer(width=config["intermediate_size"])
    counts, shared = config.get("num_experts_per_layer"), config.get("num_shared_experts_per_layer")
    count = counts[index] if counts else config["num_experts"]
    if not count:
        return Layer(width=config["dense_intermediate_size"], bias=bool(config.get("dense_mlp_bias")))
    active = config.get("always_active_experts_per_layer")
    return Layer(width=config["intermediate_size"], experts=count,
                 shared=shared[index] if counts and shared else config.get("num_shared_experts", 0),
                 top_k=min(config["num_experts_per_tok"], count),
                 always_active=tuple((active[index] if active else config.get("always_active_experts")) or ()))


def _check_released(config: Mapping[str, Any]) -> None:
    kind = config.get("model_type")
    if kind not in MODEL_TYPES:
        raise ModelError(f"A {kind!r} cannot become a training checkpoint; {', '.join(MODEL_TYPES)} can.")
    rope = config.get("rope_scaling") or {}
    for key, bad in (("attention_bias", config.get("attention_bias")), ("norm_topk_prob", config.get("norm_topk_prob")),
                     ("tie_word_embeddings", config.get("tie_word_embeddings")),
                     ("rope_scaling", rope.get("rope_type", rope.get("type", "default")) != "default"),
                     ("hidden_act", config.get("hidden_act", "silu") != "silu")):
        if bad:
            raise ModelError(f"This checkpoint has {key} {config.get(key)!r}, which the trainer's model has no equal "
                             "for; it cannot become a training checkpoint.")


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, list) and value else value
