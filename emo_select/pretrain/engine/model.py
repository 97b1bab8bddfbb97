"""A recipe as the engine's own configurations: model, data, optimiser, schedule."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from olmo_core.config import DType
from olmo_core.data import TokenizerConfig
from olmo_core.data.numpy_dataset import InstanceFilterConfig, NumpyFSLDatasetConfig
from olmo_core.data.types import NumpyDatasetDType
from olmo_core.nn.attention import AttentionBackendName, AttentionConfig
from olmo_core.nn.feed_forward import FeedForwardConfig
from olmo_core.nn.layer_norm import LayerNormConfig, LayerNormType
from olmo_core.nn.lm_head import LMHeadConfig
from olmo_core.nn.moe import MoEConfig, MoEType
from olmo_core.nn.rope import RoPEConfig
from olmo_core.nn.transformer import (
    InitMethod,
    TransformerBlockConfig,
    TransformerBlockType,
    TransformerConfig,
    TransformerType,
)
from olmo_core.optim import AdamWConfig, CosWithWarmup, OptimConfig, OptimGroupOverride, SkipStepAdamWConfig
from olmo_core.optim.scheduler import Scheduler

from emo_select.pretrain.engine.router import EmoRouterConfig
from emo_select.pretrain.engine.schedule import LinearToZero
from emo_select.pretrain.recipe import Dense, Recipe

if TYPE_CHECKING:
    from emo_select.pretrain.tokens import TokenData


def transformer(recipe: Recipe, backend: AttentionBackendName | None = None) -> TransformerConfig:
    """The model of a recipe: pre-norm, rotary positions in fp32 over the whole row, no biases, untied."""
    model = recipe.model
    norm = LayerNormConfig(name=LayerNormType.rms, eps=model.norm_eps, bias=False, dtype=DType.float32)
    attention = AttentionConfig(
        n_heads=model.heads, bias=False, rope=RoPEConfig(theta=model.rope_theta, full_precision=True),
        use_head_qk_norm=False, dtype=DType.float32, backend=backend)
    blocks = _blocks(recipe, attention, norm)
    return TransformerConfig(
        d_model=model.hidden_size,
        vocab_size=recipe.tokenizer.padded,
        n_layers=model.layers,
        block=blocks[-1],
        block_overrides={index: block for index, block in enumerate(blocks) if block is not blocks[-1]} or None,
        lm_head=LMHeadConfig(layer_norm=norm, bias=False, dtype=DType.float32),
        name=TransformerType.default if model.experts is None else TransformerType.moe,
        dtype=DType.float32,
        init_method=InitMethod.normal,
        init_seed=model.init_seed,
        init_std=model.init_std,
    )


def _blocks(recipe: Recipe, attention: AttentionConfig, norm: LayerNormConfig) -> list[TransformerBlockConfig]:
    model = recipe.model
    common = {"sequence_mixer": attention, "layer_norm": norm}
    first = 0 if model.dense is None else model.dense.layers or model.layers
    blocks: list[TransformerBlockConfig] = []
    if model.dense is not None:
        dense = TransformerBlockConfig(name=TransformerBlockType.default, feed_forward=_dense(model.dense), **common)
        blocks += [dense] * first
    if model.experts is not None:
        experts = TransformerBlockConfig(name=TransformerBlockType.moe, feed_forward_moe=_experts(recipe), **common)
        blocks += [experts] * (model.layers - first)
    return blocks


def _dense(dense: Dense) -> FeedForwardConfig:
    return FeedForwardConfig(hidden_size=dense.width, bias=dense.bias, dtype=DType.float32)


def _experts(recipe: Recipe) -> MoEConfig:
    experts = recipe.model.experts
    assert experts is not None
    return MoEConfig(
        name=MoEType.dropless, num_experts=experts.count, hidden_size=experts.width, router=_router(recipe),
        lb_loss_weight=recipe.objective.balance_weight, z_loss_weight=recipe.objective.router_z_weight,
        dtype=DType.float32)


def _router(recipe: Recipe) -> EmoRouterConfig:
    experts, objective, pool = recipe.model.experts, recipe.objective, recipe.objective.pool
    assert experts is not None
    return EmoRouterConfig(
        top_k=experts.top_k,
        num_shared_experts=experts.shared,
        min_document_expert_pool=None if pool is None else pool.smallest,
        max_document_expert_pool=None if pool is None else pool.largest,
        eval_document_expert_pool=None if pool is None else pool.evaluation,
        eos_token_id=recipe.tokenizer.eos_token_id,
        global_balance=objective.balance == "global",
        top_p=None if pool is None else pool.top_p,
        unmasked_balance=objective.unmasked_balance,
        unmasked_z=objective.unmasked_router_z,
    )


def tokenizer(recipe: Recipe) -> TokenizerConfig:
    """The engine's entry for the tokenizer."""
    return TokenizerConfig(**recipe.tokenizer.model_dump())


def dataset(recipe: Recipe, data: TokenData, work_dir: Path) -> NumpyFSLDatasetConfig:
    """Token files cut into pieces of `chunk` rows, per file; the rest of a file is dropped."""
    rows = recipe.data
    return NumpyFSLDatasetConfig(
        tokenizer=tokenizer(recipe),
        paths=[str(path) for path in data.files],
        metadata=[{"label": label} for label in data.labels],
        dtype=NumpyDatasetDType(data.dtype),
        sequence_length=rows.sequence_length,
        max_target_sequence_length=rows.sequence_length * rows.chunk,
        generate_doc_lengths=rows.mask_documents,
        instance_filter_config=InstanceFilterConfig(
            repetition_min_period=1, repetition_max_period=13, repetition_max_count=32
        ) if rows.repetition_filter else None,
        work_dir=str(work_dir),
    )


def optimizer(recipe: Recipe, fused: bool) -> OptimConfig:
    """AdamW with decay on everything but the embedding."""
    chosen = recipe.optimizer
    common = {
        "lr": chosen.learning_rate, "betas": (chosen.beta1, chosen.beta2), "eps": chosen.eps,
        "weight_decay": chosen.weight_decay,
        "group_overrides": [OptimGroupOverride(params=["embeddings.weight"], opts={"weight_decay": 0.0})],
    }
    return SkipStepAdamWConfig(**common) if chosen.skip_spikes else AdamWConfig(fused=fused, **common)


def schedule(recipe: Recipe, first_step: int = 0, rate: float | None = None) -> Scheduler:
    """The rate of each step. Annealing starts after `first_step` from `rate`, the last one before it.

    Without one, as for a released model, it is what a cosine of the recipe ends with.
    """
    shape = recipe.schedule
    if shape.shape == "cosine":
        return CosWithWarmup(warmup=shape.warmup_steps, alpha_f=shape.final_fraction)
    start = recipe.optimizer.learning_rate * shape.final_fraction if rate is None else rate
    return LinearToZero(first_step=first_step, rate=start, steps=recipe.steps, warmup=shape.warmup_steps)
