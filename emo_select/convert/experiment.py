"""The model that a training's config.json describes, as one typed value. Classes are known by name, none is imported.

A setting that the released models cannot have (query norms, sliding windows, another activation, …) is refused here by
its name: converted without it, the model would compute something else.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from emo_select.checkpoint.reader import read_config
from emo_select.errors import CheckpointError, ModelError

CLASS = "_CLASS_"
_MOE = "olmo_core.nn.moe"
OUR_ROUTER = "emo_select.pretrain.engine.router.EmoRouterConfig"
STANDARD_ROUTER = f"{_MOE}.router.MoERouterConfig"
STANDARD_ROUTERS = frozenset({
    STANDARD_ROUTER,
    f"{_MOE}.router_lbreducedp.MoELinearLBReduceDPRouterConfig",
    f"{_MOE}.router_lbreducedp_sharedexp.MoELinearLBReduceDPSharedExpRouterConfig",
    f"{_MOE}.mutualinfo_router.MoEMutualInfoRouterConfig",
})
EMO_ROUTERS = frozenset({
    f"{_MOE}.twolevel_router.MoETwoLevelRouterConfig",
    f"{_MOE}.twolevel_batchlb_router.MoETwoLevelBatchLBRouterConfig",
    f"{_MOE}.twolevel_pbatchlb_router.MoETwoLevelPBatchLBRouterConfig",
    f"{_MOE}.twolevel_batchlb_fullzloss_router.MoETwoLevelBatchLBFullZLossRouterConfig",
    f"{_MOE}.twolevel_batchlb_nomaskaux_router.MoETwoLevelBatchLBNoMaskAuxRouterConfig",
    f"{_MOE}.twolevel_batchlb_reducedp_router.MoETwoLevelBatchLBReduceDPRouterConfig",
    f"{_MOE}.twolevel_batchlb_reducedp_sharedexp_router.MoETwoLevelBatchLBReduceDPSharedExpRouterConfig",
    f"{_MOE}.twolevel_batchlb_reducedp_sharedexp_randpool_router.MoETwoLevelBatchLBReduceDPSharedExpRandPoolRouterConfig",
    f"{_MOE}.twolevel_sampling_nolb_router.MoETwoLevelSamplingNoLBRouterConfig",
    f"{_MOE}.twolevel_topp_batchlb_router.MoETwoLevelTopPBatchLBRouterConfig",
})
# Released models weigh all shared experts; these routers choose among them, so that no released model is their equal.
SHARED_POOL_ROUTER = (f"{_MOE}.twolevel_batchlb_reducedp_sharedexppool_router."
                      "MoETwoLevelBatchLBReduceDPSharedExpPoolRouterConfig")
CLASSES: Mapping[str, frozenset[str]] = {
    "model": frozenset({"olmo_core.nn.transformer.config.TransformerConfig"}),
    "block": frozenset({"olmo_core.nn.transformer.config.TransformerBlockConfig"}),
    "attention": frozenset({"olmo_core.nn.attention.AttentionConfig"}),
    "rope": frozenset({"olmo_core.nn.rope.RoPEConfig"}),
    "norm": frozenset({"olmo_core.nn.layer_norm.LayerNormConfig"}),
    "feed-forward": frozenset({"olmo_core.nn.feed_forward.FeedForwardConfig"}),
    "MoE": frozenset({f"{_MOE}.moe.MoEConfig", f"{_MOE}.MoEConfig"}),
    "router": STANDARD_ROUTERS | EMO_ROUTERS | {OUR_ROUTER},
    "LM head": frozenset({"olmo_core.nn.lm_head.LMHeadConfig"}),
    "tokenizer": frozenset({"olmo_core.data.tokenizer.TokenizerConfig"}),
}
# Settings under which a released model computes the same: part → name → accepted values. Absent means the first.
NEUTRAL: Mapping[str, Mapping[str, tuple[Any, ...]]] = {
    "model": {"name": ("default", "moe"), "embedding_norm": (None,), "block_pattern": (None,),
              "embed_scale": (None, 1, 1.0), "tie_word_embeddings": (False, None)},
    "block": {"dropout": (None, 0, 0.0), "attention_residual_alpha": (None, 1, 1.0),
              "feed_forward_residual_alpha": (None, 1, 1.0)},
    "attention": {"name": ("default",), "type": ("attention",), "bias": (False,), "gate": (None,), "clip_qkv": (None,),
                  "qk_norm": (None,), "dropout": (None, 0, 0.0), "sliding_window": (None,),
                  "scalable_softmax": (False,), "attention_sinks": (False,)},
    "rope": {"name": ("default",), "no_global_rope": (False,), "scaling": (None,),
             "partial_rotary_factor": (None, 1, 1.0)},
    "norm": {"name": ("rms",), "bias": (False,), "elementwise_affine": (None, True)},
    "feed-forward": {"name": ("default",), "activation": ("silu", None)},
    "MoE": {"name": ("dropless", "default"), "shared_mlp": (None,), "latent_moe": (None,)},
    "router": {"name": ("default",), "gating_function": ("softmax", None), "normalize_expert_weights": (None,),
               "uniform_expert_assignment": (False, None), "random_expert_assignment": (False, None),
               "bias_gamma": (None,), "num_forced_experts": (0, None), "extension_finetune_mode": (False, None)},
    "LM head": {"name": ("default",), "bias": (False,)},
}
# What an absent setting means where that is not the first of the accepted values.
ABSENT = {("attention", "bias"): True, ("LM head", "bias"): True, ("norm", "bias"): True, ("norm", "name"): "default"}
NORM_EPS, ROPE_THETA = 1e-5, 500_000  # the trainer's defaults


@dataclass(frozen=True)
class Pools:
    """Sizes of the document pools: drawn from `least`…`most` in training, `evaluation` at evaluation."""

    least: int
    most: int
    evaluation: int | None = None


@dataclass(frozen=True)
class Layer:
    """The feed-forward part of a block. `width` is that of one expert, or of the dense MLP where `experts` is 0."""

    width: int
    experts: int = 0  # shared ones included
    shared: int = 0
    top_k: int = 0  # shared ones included
    always_active: tuple[int, ...] = ()
    bias: bool = False  # of a dense MLP
    dropless: bool = True  # the other class stores w1 and w3 transposed


@dataclass(frozen=True)
class Tokens:
    """What the trainer knows of its tokenizer."""

    vocab_size: int | None = None
    eos: int | None = None
    pad: int | None = None
    bos: int | None = None
    identifier: str | None = None


@dataclass(frozen=True)
class TrainingModel:
    """A model of the trainer, with all that a released one needs to equal it."""

    hidden: int
    vocabulary: int  # rows of embedding and head
    heads: int
    kv_heads: int
    layers: tuple[Layer, ...]
    rope_theta: float = ROPE_THETA
    norm_eps: float = NORM_EPS
    balance: float | None = None  # weight of the load-balancing loss
    router: str | None = None  # class name
    pools: Pools | None = None
    sequence_length: int | None = None
    tokens: Tokens = field(default_factory=Tokens)

    @property
    def moe(self) -> tuple[Layer, ...]:
        """Layers with experts."""
        return tuple(layer for layer in self.layers if layer.experts)


def read_experiment(folder: Path) -> TrainingModel:
    """Read config.json of a training checkpoint's folder (`step<N>`).

    Raises:
        CheckpointError: config.json is missing, damaged or lacks an entry.
        ModelError: a class that is not on the list, or a setting that no released model has.
    """
    if not (folder / "config.json").exists():
        raise CheckpointError(_no_config(folder))
    config = read_config(folder)
    if "model" not in config:
        raise CheckpointError(f"{folder / 'config.json'} has no entry 'model', so it is not that of a training; a "
                              "checkpoint of a training is a folder step<N>.")
    try:
        return _model(config)
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder / 'config.json'} does not describe a model of the trainer ({error!r})."
                              ) from None


def _no_config(folder: Path) -> str:
    if not folder.is_dir():
        return f"There is no folder {folder}; give the folder step<N> of a training."
    steps = sorted((int(path.name[4:]), path) for path in folder.glob("step*") if path.name[4:].isdigit())
    hint = f"convert one of its steps, such as {steps[-1][1]}" if steps else "give the folder step<N> of a training"
    return f"{folder} has no config.json; {hint}."


def _model(config: Mapping[str, Any]) -> TrainingModel:
    model = _part("model", config["model"])
    blocks = list(_blocks(model))
    attention = [_part("attention", block.get("sequence_mixer") or block.get("attention")) for block in blocks]
    ropes = [_part("rope", entry["rope"]) for entry in attention]
    norms = [_part("norm", norm) for norm in (*(block["layer_norm"] for block in blocks), _head(model)["layer_norm"])]
    moes = [block["feed_forward_moe"] for block in blocks if block.get("feed_forward_moe")]
    router = moes[0]["router"] if moes else {}
    heads = _only("n_heads", [entry["n_heads"] for entry in attention])
    head_size = _only("head_dim", [entry.get("head_dim") or model["d_model"] // heads for entry in attention])
    if head_size * heads != model["d_model"]:
        raise ModelError(f"Heads of {head_size} do not make up a hidden size of {model['d_model']}; released models "
                         "have no such attention.")
    return TrainingModel(
        hidden=model["d_model"], vocabulary=model["vocab_size"], heads=heads,
        kv_heads=_only("n_kv_heads", [entry.get("n_kv_heads") or heads for entry in attention]),
        layers=tuple(_layer(block) for block in blocks),
        rope_theta=_only("theta", [rope.get("theta", ROPE_THETA) for rope in ropes]),
        norm_eps=_only("eps", [norm.get("eps") or NORM_EPS for norm in norms]),
        balance=moes[0].get("lb_loss_weight") if moes else None,
        router=router.get(CLASS), pools=_pools(router), sequence_length=_sequence_length(config),
        tokens=_tokens(config),
    )


def _part(kind: str, entry: Any) -> Mapping[str, Any]:
    """An entry whose class is on the list and whose settings a released model can have."""
    name = entry.get(CLASS)
    if name == SHARED_POOL_ROUTER:
        raise ModelError("This router chooses among a pool of shared experts; released models use every shared expert "
                         "for every token, so none computes the same.")
    if name is not None and name not in CLASSES[kind]:
        raise ModelError(f"config.json has a {kind} of class {name!r}, which is not among those that can be converted.")
    for setting, accepted in NEUTRAL.get(kind, {}).items():
        value = entry.get(setting, ABSENT.get((kind, setting), accepted[0]))
        if value not in accepted:
            raise ModelError(f"The training's {kind} has {setting} {value!r}; released models have no such {kind}, so "
                             "a converted one would compute something else.")
    return entry  # type: ignore[no-any-return]


def _blocks(model: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    overrides = model.get("block_overrides") or {}
    for layer in range(model["n_layers"]):
        block = _part("block", overrides.get(str(layer), overrides.get(layer, model["block"])))
        kind, has_experts = block.get("name", "default"), bool(block.get("feed_forward_moe"))
        if kind != ("moe" if has_experts else "default") or (has_experts and block.get("feed_forward")):
            raise ModelError(f"Layer {layer} is a block of kind {kind!r}; only pre-norm blocks without query norms "
                             "('default', 'moe') have an equal among released models.")
        yield block


def _layer(block: Mapping[str, Any]) -> Layer:
    if not block.get("feed_forward_moe"):
        dense = _part("feed-forward", block["feed_forward"])
        return Layer(width=dense["hidden_size"], bias=dense.get("bias") is not False)  # absent means with
    moe = _part("MoE", block["feed_forward_moe"])
    router = _part("router", moe["router"])
    return Layer(width=moe["hidden_size"], experts=moe["num_experts"], top_k=router["top_k"],
                 shared=router.get("num_shared_experts") or 0, dropless=moe.get("name", "default") == "dropless",
                 always_active=tuple(router.get("always_active_experts") or ()))


def _head(model: Mapping[str, Any]) -> Mapping[str, Any]:
    return _part("LM head", model["lm_head"])


def _pools(router: Mapping[str, Any]) -> Pools | None:
    least, most = router.get("min_document_expert_pool"), router.get("max_document_expert_pool")
    fixed = router.get("document_expert_pool")
    if least is not None and most is not None:
        return Pools(least, most, router.get("eval_document_expert_pool"))
    return Pools(fixed, fixed, fixed) if fixed is not None else None


def _sequence_length(config: Mapping[str, Any]) -> int | None:
    found = ((config.get(part) or {}).get(key) for part, key in (
        ("train_module", "max_sequence_length"), ("dataset", "sequence_length"), ("recipe", "sequence_length")))
    return next((value for value in found if isinstance(value, int)), None)


def _tokens(config: Mapping[str, Any]) -> Tokens:
    entry = (config.get("dataset") or {}).get("tokenizer")
    if not entry:
        return Tokens()
    entry = _part("tokenizer", entry)
    return Tokens(entry.get("vocab_size"), entry.get("eos_token_id"), entry.get("pad_token_id"),
                  entry.get("bos_token_id"), entry.get("identifier"))


def _only(name: str, values: list[Any]) -> Any:
    if len(set(values)) != 1:
        raise ModelError(f"Layers differ in {name} ({', '.join(map(str, sorted(set(values))))}); released models have "
                         "one value for all.")
    return values[0]


def with_vocabulary(model: TrainingModel, rows: int) -> TrainingModel:
    """The same model with `rows` tokens."""
    return replace(model, vocabulary=rows)
