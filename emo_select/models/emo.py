"""EMO as a native transformers model: published tensors on disk, fused expert tensors in memory.

Shapes: B sequences, S positions, T = B·S tokens, D hidden, E experts of a layer (shared last), R routed, K experts
per token, I width of an expert.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.generation import GenerationMixin
from transformers.integrations import use_experts_implementation
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.models.flex_olmo.modeling_flex_olmo import FlexOlmoModel
from transformers.models.olmo2.modeling_olmo2 import Olmo2Attention, Olmo2RMSNorm, Olmo2RotaryEmbedding
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import OutputRecorder

from emo_select.models.balancing import load_balancing_loss
from emo_select.models.caching import NEW, OLD, cache_argument
from emo_select.models.config import EmoConfig, FlexOlmoNoQKNormPrenormConfig

CACHE = cache_argument(Olmo2Attention)  # as the layers of this transformers take it, and as its outputs call it


class EmoRMSNorm(Olmo2RMSNorm):
    """RMS norm that multiplies by its weight in fp32 and then casts back."""


class EmoRotaryEmbedding(Olmo2RotaryEmbedding):
    """Rotary tables (cos, sin), each (B, S, head dimension) in fp32. Holds no weights: build it on the real device."""


class EmoAttention(Olmo2Attention):
    """Grouped-query attention with rotary embeddings and without query/key norms."""

    def __init__(self, config: Any, layer_idx: int | None = None) -> None:
        super().__init__(config, layer_idx)
        self.q_norm, self.k_norm = nn.Identity(), nn.Identity()


class EmoDenseMLP(nn.Module):
    """SwiGLU of a layer without experts."""

    def __init__(self, config: EmoConfig) -> None:
        super().__init__()
        assert config.dense_intermediate_size is not None  # EmoConfig.check_experts
        width, bias = config.dense_intermediate_size, config.dense_mlp_bias
        self.gate_proj = nn.Linear(config.hidden_size, width, bias=bias)
        self.up_proj = nn.Linear(config.hidden_size, width, bias=bias)
        self.down_proj = nn.Linear(width, config.hidden_size, bias=bias)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden: Tensor) -> Tensor:
        """(…, D) → (…, D)."""
        return self.down_proj(self.act_fn(self.gate_proj(hidden)) * self.up_proj(hidden))  # type: ignore[no-any-return]


class EmoRouter(nn.Module):
    """Chooses the experts of each token and their weights.

    `weight` is (E, D), the shared experts in its last `num_shared` rows. `pool`, if set, takes the routed logits
    (T, R) and returns a boolean (T, R): experts outside it get probability 0 before the top-k is drawn. The training
    objective of EMO restricts the experts of a document with it; at inference it is None.
    """

    def __init__(self, config: EmoConfig, layer_idx: int) -> None:
        super().__init__()
        self.num_experts = config.experts_in(layer_idx)
        self.num_shared = config.shared_in(layer_idx)
        self.top_k = min(config.num_experts_per_tok, self.num_experts)
        self.always_active = list(config.always_active_in(layer_idx))
        self.norm_topk_prob = config.norm_topk_prob
        self.pool: Callable[[Tensor], Tensor] | None = None
        self.weight = nn.Parameter(torch.empty(self.num_experts, config.hidden_size))

    @property
    def num_routed(self) -> int:
        """R: experts that compete for the tokens."""
        return self.num_experts - self.num_shared

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(…, D) → logits (T, E), weights (T, K) in the dtype of `hidden`, expert indices (T, K)."""
        logits = self.logits(hidden)
        weights, index = self.route(logits)
        return logits, weights.to(logits.dtype), index

    def logits(self, hidden: Tensor) -> Tensor:
        """(…, D) → (T, E)."""
        return F.linear(hidden.reshape(-1, hidden.shape[-1]), self.weight)

    def scores(self, hidden: Tensor) -> tuple[Tensor, Tensor, str]:
        """(…, D) → logits (T, E), the probabilities (T, E) in fp32 that experts are chosen by, how they were made."""
        logits = self.logits(hidden)
        if self.always_active or not self.num_shared:
            return logits, self.probabilities(logits), "softmax"
        shared = F.softmax(logits[:, self.num_routed:], dim=-1, dtype=torch.float)
        return logits, torch.cat((self.probabilities(logits[:, :self.num_routed]), shared), dim=-1), "softmax"

    def route(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (T, E) → weights (T, K) in fp32 and expert indices (T, K); weights are softmax probabilities.

        Always-active experts come first, with their probability among all experts. Without them the routed experts
        come first, then the shared ones, which have a softmax of their own. Weights only sum to one when
        `norm_topk_prob` is set, which excludes both.
        """
        if self.always_active:
            return self._route_with_always_active(self.probabilities(logits))
        weights, index = torch.topk(self.probabilities(logits[:, :self.num_routed]), self.top_k - self.num_shared)
        if self.norm_topk_prob:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        if not self.num_shared:
            return weights, index
        shared = torch.arange(self.num_routed, self.num_experts, device=index.device).expand(len(index), -1)
        shared_weights = F.softmax(logits[:, self.num_routed:], dim=-1, dtype=torch.float)
        return torch.cat((weights, shared_weights), dim=-1), torch.cat((index, shared), dim=-1)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Softmax in fp32 over the given columns, restricted to the pool if there is one."""
        if self.pool is not None:
            logits = logits.masked_fill(~self.pool(logits), float("-inf"))
        return F.softmax(logits, dim=-1, dtype=torch.float)

    def _route_with_always_active(self, probabilities: Tensor) -> tuple[Tensor, Tensor]:
        active = torch.tensor(self.always_active, device=probabilities.device).expand(len(probabilities), -1)
        others = probabilities.scatter(1, active, float("-inf"))
        weights, index = torch.topk(others, self.top_k - len(self.always_active))
        return torch.cat((probabilities.gather(1, active), weights), dim=-1), torch.cat((active, index), dim=-1)


@use_experts_implementation
class EmoExperts(nn.Module):
    """SwiGLU experts in two tensors: `gate_up_proj` (E, 2·I, D) and `down_proj` (E, D, I), shared experts last."""

    def __init__(self, config: EmoConfig, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        width, hidden = config.intermediate_size, config.hidden_size
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * width, hidden))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden, width))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Weighted sum of the chosen experts: hidden (T, D), index and weights (T, K) → (T, D).

        This is the `eager` implementation; transformers replaces it by `grouped_mm` or `batched_mm` on request.
        """
        chosen = index.reshape(-1)
        order = torch.argsort(chosen, stable=True)  # choices by expert
        counts = torch.bincount(chosen, minlength=self.num_experts).tolist()
        tokens, scales = (order // index.shape[1]).split(counts), weights.reshape(-1, 1)[order].split(counts)
        # unbind gives one stacked gradient; indexing would add a zero-filled full-size one per expert
        parameters = zip(self.gate_up_proj.unbind(0), self.down_proj.unbind(0), strict=True)
        output = torch.zeros_like(hidden)
        for token, scale, (gate_up, down) in zip(tokens, scales, parameters, strict=True):
            if len(token):
                gate, up = F.linear(hidden[token], gate_up).chunk(2, dim=-1)
                output.index_add_(0, token, (F.linear(self.act_fn(gate) * up, down) * scale).to(output.dtype))
        return output


class EmoSparseMoeBlock(nn.Module):
    """Router and experts of one layer."""

    def __init__(self, config: EmoConfig, layer_idx: int) -> None:
        super().__init__()
        self.gate = EmoRouter(config, layer_idx)
        self.experts = EmoExperts(config, config.experts_in(layer_idx))

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, S, D) → (B, S, D)."""
        tokens = hidden.reshape(-1, hidden.shape[-1])
        _, weights, index = self.gate(tokens)
        return self.experts(tokens, index, weights).reshape(hidden.shape)  # type: ignore[no-any-return]


class PrenormDecoderLayer(GradientCheckpointingLayer):
    """x + attention(norm(x)), then x + mlp(norm(x)). Runs alone, given rotary tables and a causal mask."""

    def __init__(self, config: Any, layer_idx: int, mlp: nn.Module) -> None:
        super().__init__()
        self.self_attn = EmoAttention(config, layer_idx)
        self.mlp = mlp
        self.pre_attention_layernorm = EmoRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.pre_feedforward_layernorm = EmoRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """(B, S, D) → (B, S, D); `position_embeddings` are the (cos, sin) of `EmoRotaryEmbedding`.

        `cache` and `past_key_values` are two names of one thing, as in transformers.
        """
        kwargs[CACHE] = cache if cache is not None else past_key_values
        attended, _ = self.self_attn(
            hidden_states=self.pre_attention_layernorm(hidden_states),
            attention_mask=attention_mask,
            position_ids=position_ids,
            position_embeddings=position_embeddings,
            **kwargs,
        )
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.pre_feedforward_layernorm(hidden_states))  # type: ignore[no-any-return]


class EmoDecoderLayer(PrenormDecoderLayer):
    """A layer with experts, or with a dense MLP where the configuration gives it no experts."""

    def __init__(self, config: EmoConfig, layer_idx: int) -> None:
        sparse = config.experts_in(layer_idx) > 0
        super().__init__(config, layer_idx, EmoSparseMoeBlock(config, layer_idx) if sparse else EmoDenseMLP(config))


class EmoPreTrainedModel(PreTrainedModel):
    """What transformers needs to know to load, shard, checkpoint and record an EMO model."""

    config_class = EmoConfig
    config: EmoConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["EmoDecoderLayer"]
    _skip_keys_device_placement = [OLD, NEW]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {
        "router_logits": OutputRecorder(EmoRouter, index=0),
        "hidden_states": EmoDecoderLayer,
        "attentions": EmoAttention,
    }

    def _grouped_mm_can_dispatch(self) -> bool:
        # torch refuses rows that are not a multiple of 16 bytes (8 elements of bfloat16); transformers then takes eager
        if self.config.hidden_size % 8 or self.config.intermediate_size % 8:
            raise ValueError("experts_implementation grouped_mm needs hidden_size and intermediate_size to be "
                             "multiples of 8; use eager or batched_mm.")
        return bool(super()._grouped_mm_can_dispatch())

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, EmoExperts):
            init.normal_(module.gate_up_proj, mean=0.0, std=self.config.initializer_range)
            init.normal_(module.down_proj, mean=0.0, std=self.config.initializer_range)
        elif isinstance(module, EmoRouter):
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)


class EmoModel(EmoPreTrainedModel):
    """Embedding, decoder layers, final norm."""

    def __init__(self, config: EmoConfig) -> None:
        super().__init__(config)
        config.check_experts()
        self.padding_idx, self.vocab_size = config.pad_token_id, config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(EmoDecoderLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = EmoRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = EmoRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    # Cache, mask, positions and recorded outputs are those of FlexOlmo; only the layers differ.
    forward = FlexOlmoModel.forward


@dataclass
class EmoCausalLMOutput(MoeCausalLMOutputWithPast):
    """Adds `ce_loss`, the cross entropy without the load-balancing part (which is `aux_loss`, unscaled)."""

    ce_loss: Tensor | None = None


class EmoForCausalLM(EmoPreTrainedModel, GenerationMixin):
    """EMO with a language-modelling head; `loss` = cross entropy + router_aux_loss_coef · load-balancing loss."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: EmoConfig) -> None:
        super().__init__(config)
        self.model = EmoModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> EmoCausalLMOutput:
        """Logits (B, S or `logits_to_keep`, vocabulary), router logits per MoE layer (T, E), and the losses.

        The cross entropy is the mean over shifted labels other than -100, or their sum divided by
        `num_items_in_batch` if the trainer passes it.
        """
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_router_logits=output_router_logits,
            **{CACHE: cache if cache is not None else past_key_values},
            **kwargs,
        )
        logits = self.lm_head(at_positions(outputs.last_hidden_state, logits_to_keep))
        ce_loss = None if labels is None else self.loss_function(logits, labels, self.vocab_size, **kwargs)
        aux_loss = None
        if output_router_logits:
            mask = _counted_tokens(labels, attention_mask, outputs.last_hidden_state.shape[1])
            aux_loss = load_balancing_loss(self.config, outputs.router_logits, mask, kwargs.get("num_items_in_batch"))
        return EmoCausalLMOutput(
            loss=self._total_loss(ce_loss, aux_loss),
            aux_loss=aux_loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
            ce_loss=ce_loss,
            **{CACHE: getattr(outputs, CACHE)},
        )

    def _total_loss(self, ce_loss: Tensor | None, aux_loss: Tensor | None) -> Tensor | None:
        if ce_loss is None or aux_loss is None:
            return ce_loss
        return ce_loss + self.config.router_aux_loss_coef * aux_loss.to(ce_loss.device)


def _counted_tokens(labels: Tensor | None, attention_mask: Any, length: int) -> Tensor | None:
    """The tokens (B, S) that the load-balancing loss counts: with labels, else the S new ones of a padding mask that
    covers a cache too. A mask of another form (by query, by kind of layer) does not say."""
    if labels is not None:
        return labels != -100
    plain = isinstance(attention_mask, Tensor) and attention_mask.dim() == 2
    return attention_mask[:, -length:] if plain else None


def at_positions(hidden: Tensor, kept: int | Tensor) -> Tensor:
    """The positions of `hidden` (B, S, D) whose logits are wanted, as transformers from 5.21 on understands them.

    An int: the last ones (0: all); (K,): the same in every row; integers (B, K): of each row; booleans (B, S): those
    that are true, in one list (K, D).
    """
    if isinstance(kept, int):
        return hidden[:, slice(-kept, None)]
    if kept.ndim == 1:
        return hidden[:, kept]
    return hidden[kept] if kept.dtype == torch.bool else torch.take_along_dim(hidden, kept[..., None], dim=1)


class FlexOlmoNoQKNormPrenormModel(EmoModel):
    """EMO under the name that early copies of the checkpoints carry."""

    config_class = FlexOlmoNoQKNormPrenormConfig


class FlexOlmoNoQKNormPrenormForCausalLM(EmoForCausalLM):
    """EMO under the name that early copies of the checkpoints carry."""

    config_class = FlexOlmoNoQKNormPrenormConfig


# Like OLMoE, one tensor per expert matrix on disk and fused tensors in memory.
for _config in (EmoConfig, FlexOlmoNoQKNormPrenormConfig):
    register_checkpoint_conversion_mapping(
        _config.model_type, get_checkpoint_conversion_mapping("olmoe"), overwrite=True)
