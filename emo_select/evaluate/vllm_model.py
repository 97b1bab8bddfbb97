"""EMO for vLLM: its OLMoE with EMO's norms and routing, without query/key norms. Imported by vLLM only.

`docs/evaluation.md` names the releases of vLLM that the tests run. What does not need vLLM (registration, tensor names,
routing) is in `emo_select.evaluate.vllm`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from vllm.model_executor.layers import fused_moe
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.models.olmoe import OlmoeAttention, OlmoeDecoderLayer, OlmoeForCausalLM
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper

from emo_select.evaluate.vllm import RENAMED, require_servable, routing_function

# The factory replaced the class in vLLM 0.2x; both take the same arguments here.
make_experts: Any = getattr(fused_moe, "FusedMoEFactory", None) or fused_moe.FusedMoE


class EmoAttention(OlmoeAttention):
    """Attention without query/key norms."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.q_norm, self.k_norm = nn.Identity(), nn.Identity()

    def _apply_qk_norm(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return q, k


class EmoMoE(nn.Module):
    """Router and fused experts; routed and shared experts are one set of weights, shared last."""

    def __init__(self, config: Any, quant_config: Any, prefix: str) -> None:
        super().__init__()
        self.gate = ReplicatedLinear(config.hidden_size, config.num_experts, bias=False, quant_config=None,
                                     prefix=f"{prefix}.gate")
        self.experts = make_experts(
            num_experts=config.num_experts, top_k=min(config.num_experts_per_tok, config.num_experts),
            hidden_size=config.hidden_size, intermediate_size=config.intermediate_size, renormalize=False,
            custom_routing_function=routing_function(config), quant_config=quant_config, prefix=f"{prefix}.experts",
        )

    def forward(self, hidden: Tensor) -> Tensor:
        """(…, D) → (…, D)."""
        tokens = hidden.view(-1, hidden.shape[-1])
        logits, _ = self.gate(tokens)
        output: Tensor = self.experts(tokens, logits)
        return output.view(hidden.shape)


class EmoDecoderLayer(OlmoeDecoderLayer):
    """Pre-norm layer with the configured epsilon."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        nn.Module.__init__(self)  # the parent's would build and announce its own attention
        config = vllm_config.model_config.hf_config
        self.hidden_size = config.hidden_size
        self.self_attn = EmoAttention(vllm_config=vllm_config, prefix=f"{prefix}.self_attn")
        self.mlp = EmoMoE(config, vllm_config.quant_config, f"{prefix}.mlp")
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class EmoForCausalLM(OlmoeForCausalLM):
    """EMO and its older name, from the published tensor layout."""

    # newer releases stack q, k and v by the parent's mapper, older ones while loading
    hf_to_vllm_mapper = getattr(OlmoeForCausalLM, "hf_to_vllm_mapper", WeightsMapper()) | WeightsMapper(
        orig_to_new_substr=RENAMED)

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        config = vllm_config.model_config.hf_config
        require_servable(config)
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=EmoDecoderLayer)
        self.model.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load tensors under their published names."""
        loaded: set[str] = AutoWeightsLoader(self).load_weights(weights, mapper=self.hf_to_vllm_mapper)
        return loaded
