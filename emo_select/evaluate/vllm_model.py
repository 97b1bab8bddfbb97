"""EMO for vLLM: its OLMoE with EMO's norms, routing and layers, without query/key norms. Imported by vLLM only.

`docs/evaluation.md` names the releases of vLLM that the tests run. What does not need vLLM (registration, tensor names,
routing) is in `emo_select.evaluate.vllm`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import silu
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers import fused_moe
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.models import olmoe
from vllm.model_executor.models.olmoe import OlmoeAttention, OlmoeDecoderLayer, OlmoeForCausalLM
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper, extract_layer_index

from emo_select.evaluate.vllm import RENAMED, routing_function

# The factory replaced the class in vLLM 0.2x; both take the same arguments here.
make_experts: Any = getattr(fused_moe, "FusedMoEFactory", None) or fused_moe.FusedMoE


class EmoAttention(OlmoeAttention):
    """Attention without query/key norms, with the configured head size and biases."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        nn.Module.__init__(self)  # the parent knows one head size and no biases
        config, quant_config = vllm_config.model_config.hf_config, vllm_config.quant_config
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        ranks = get_tensor_model_parallel_world_size()
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        self.num_heads, self.num_kv_heads = heads // ranks, max(1, kv_heads // ranks)
        self.q_size, self.kv_size = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        self.qkv_proj = QKVParallelLinear(config.hidden_size, self.head_dim, heads, kv_heads, config.attention_bias,
                                          quant_config=quant_config, prefix=f"{prefix}.qkv_proj")
        self.o_proj = RowParallelLinear(heads * self.head_dim, config.hidden_size, config.attention_bias,
                                        quant_config=quant_config, prefix=f"{prefix}.o_proj")
        self.rotary_emb = get_rope(self.head_dim, max_position=config.max_position_embeddings,
                                   rope_parameters=config.rope_parameters, is_neox_style=True)
        self.attn = olmoe.Attention(self.num_heads, self.head_dim, self.head_dim**-0.5, num_kv_heads=self.num_kv_heads,
                                    cache_config=vllm_config.cache_config, quant_config=quant_config,
                                    prefix=f"{prefix}.attn")

    def _apply_qk_norm(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return q, k


class EmoDenseMLP(nn.Module):
    """The SwiGLU of a layer without experts."""

    def __init__(self, config: Any, quant_config: Any, prefix: str) -> None:
        super().__init__()
        hidden, width, bias = config.hidden_size, config.dense_intermediate_size, config.dense_mlp_bias
        self.gate_proj = ColumnParallelLinear(hidden, width, bias, quant_config=quant_config,
                                              prefix=f"{prefix}.gate_proj")
        self.up_proj = ColumnParallelLinear(hidden, width, bias, quant_config=quant_config, prefix=f"{prefix}.up_proj")
        self.down_proj = RowParallelLinear(width, hidden, bias, quant_config=quant_config, prefix=f"{prefix}.down_proj")

    def forward(self, hidden: Tensor) -> Tensor:
        """(…, D) → (…, D)."""
        output: Tensor = self.down_proj(silu(self.gate_proj(hidden)[0]) * self.up_proj(hidden)[0])[0]
        return output


class EmoMoE(nn.Module):
    """Router and fused experts of one layer; routed and shared experts are one set of weights, shared last."""

    def __init__(self, config: Any, quant_config: Any, layer: int, prefix: str) -> None:
        super().__init__()
        experts = config.experts_in(layer)
        self.gate = ReplicatedLinear(config.hidden_size, experts, bias=False, quant_config=None,
                                     prefix=f"{prefix}.gate")
        self.experts = make_experts(
            num_experts=experts, top_k=min(config.num_experts_per_tok, experts),
            hidden_size=config.hidden_size, intermediate_size=config.intermediate_size, renormalize=False,
            custom_routing_function=routing_function(config, layer), quant_config=quant_config,
            prefix=f"{prefix}.experts",
        )

    def forward(self, hidden: Tensor) -> Tensor:
        """(…, D) → (…, D)."""
        tokens = hidden.view(-1, hidden.shape[-1])
        logits, _ = self.gate(tokens)
        output: Tensor = self.experts(tokens, logits)
        return output.view(hidden.shape)


class EmoDecoderLayer(OlmoeDecoderLayer):
    """Pre-norm layer with the configured epsilon, with experts or dense."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        nn.Module.__init__(self)  # the parent's would build and announce its own attention
        config, layer = vllm_config.model_config.hf_config, extract_layer_index(prefix)
        self.hidden_size = config.hidden_size
        self.self_attn = EmoAttention(vllm_config=vllm_config, prefix=f"{prefix}.self_attn")
        self.mlp: nn.Module = (
            EmoMoE(config, vllm_config.quant_config, layer, f"{prefix}.mlp") if config.experts_in(layer)
            else EmoDenseMLP(config, vllm_config.quant_config, f"{prefix}.mlp"))
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class EmoForCausalLM(OlmoeForCausalLM):
    """EMO and its older name, from the published tensor layout."""

    # newer releases stack q, k and v by the parent's mapper, older ones while loading
    hf_to_vllm_mapper = getattr(OlmoeForCausalLM, "hf_to_vllm_mapper", WeightsMapper()) | WeightsMapper(
        orig_to_new_substr=RENAMED)

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        config = vllm_config.model_config.hf_config
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=EmoDecoderLayer)
        self.model.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        if config.tie_word_embeddings:
            self.lm_head: Any = self.lm_head.tie_weights(self.model.embed_tokens)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load tensors under their published names."""
        if self.config.tie_word_embeddings:
            weights = ((name, weight) for name, weight in weights if not name.startswith("lm_head."))
        loaded: set[str] = AutoWeightsLoader(self).load_weights(weights, mapper=self.hf_to_vllm_mapper)
        return loaded
