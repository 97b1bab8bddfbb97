"""Configurations of the two published architectures, with the key names of the published `config.json`.

Annotations are evaluated here (no `from __future__ import annotations`): `strict` checks every value against them.
"""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig
from transformers.models.olmo2.configuration_olmo2 import Olmo2Config


class _PublishedKeys:
    """Writes RoPE settings as `rope_theta` and `rope_scaling`, the keys that every published reader knows."""

    auto_map: ClassVar[dict[str, str]] = {}  # some programs (TRL) look there without asking whether it is there

    def to_dict(self) -> dict[str, Any]:
        """The values of `config.json`; reading them back gives an equal configuration."""
        output: dict[str, Any] = super().to_dict()  # type: ignore[misc]
        rope = dict(output.pop("rope_parameters", None) or {})
        if "rope_theta" in rope:
            output["rope_theta"] = rope.pop("rope_theta")
            output["rope_scaling"] = rope if rope.get("rope_type", "default") != "default" else None
        return output


@strict
class EmoConfig(_PublishedKeys, PreTrainedConfig):
    """An EMO Mixture-of-Experts (arXiv 2605.06663): a pre-norm decoder whose last experts of each layer are shared.

    Counts named `num_experts*` and `num_shared_experts*` are per layer and include the shared experts;
    `num_experts_per_tok` counts shared and always-active experts too. An entry 0 of `num_experts_per_layer`
    makes that layer a dense SwiGLU of width `dense_intermediate_size`.
    """

    model_type = "emo"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "cache"]
    attribute_map: ClassVar[dict[str, str]] = {"num_local_experts": "num_experts"}
    default_theta = 500000.0

    vocab_size: int = 100352
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 4096
    initializer_range: float | int = 0.02
    rms_norm_eps: float | int = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = 100277
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = 100257
    tie_word_embeddings: bool = False
    rope_parameters: dict[str, Any] | None = None
    attention_bias: bool = False
    attention_dropout: float | int = 0.0
    num_experts_per_tok: int = 5
    num_experts: int = 7
    num_shared_experts: int = 0
    norm_topk_prob: bool = False
    output_router_logits: bool = False
    router_aux_loss_coef: float | int = 0.01
    always_active_experts: list[int] | None = None
    always_active_experts_per_layer: list[list[int]] | None = None
    num_experts_per_layer: list[int] | None = None
    num_shared_experts_per_layer: list[int] | None = None
    dense_intermediate_size: int | None = None
    dense_mlp_bias: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        super().__post_init__(**kwargs)

    def experts_in(self, layer: int) -> int:
        """Experts of `layer`, shared ones included; 0 for a dense layer."""
        return self.num_experts if self.num_experts_per_layer is None else self.num_experts_per_layer[layer]

    def shared_in(self, layer: int) -> int:
        """Shared experts of `layer`. The per-layer list only counts beside a per-layer list of experts."""
        if self.num_experts_per_layer is None or self.num_shared_experts_per_layer is None:
            return min(self.num_shared_experts, self.experts_in(layer))
        return self.num_shared_experts_per_layer[layer]

    def always_active_in(self, layer: int) -> list[int]:
        """Experts of `layer` that every token uses, in the listed order."""
        if self.always_active_experts_per_layer is not None:
            return self.always_active_experts_per_layer[layer]
        return self.always_active_experts or []

    def moe_layers(self) -> list[int]:
        """Indices of the layers that have experts."""
        return [layer for layer in range(self.num_hidden_layers) if self.experts_in(layer) > 0]

    def check_experts(self) -> None:
        """Refuse counts that contradict each other.

        Raises:
            ValueError: with one sentence that names the key.
        """
        self._check_list_lengths()
        for layer in self.moe_layers():
            self._check_layer(layer)
        if len(self.moe_layers()) < self.num_hidden_layers and self.dense_intermediate_size is None:
            raise ValueError("A dense layer (0 in num_experts_per_layer) needs dense_intermediate_size.")

    def _check_list_lengths(self) -> None:
        for key in ("num_experts_per_layer", "num_shared_experts_per_layer", "always_active_experts_per_layer"):
            entries = getattr(self, key)
            if entries is not None and len(entries) != self.num_hidden_layers:
                raise ValueError(f"{key} has {len(entries)} entries for {self.num_hidden_layers} layers.")

    def _check_layer(self, layer: int) -> None:
        experts, shared, active = self.experts_in(layer), self.shared_in(layer), self.always_active_in(layer)
        if self.norm_topk_prob and (shared or active):
            raise ValueError("norm_topk_prob is not defined together with shared or always-active experts.")
        if not 0 <= shared < experts:
            raise ValueError(f"Layer {layer} has {shared} shared experts of {experts}; at least one must be routed.")
        if any(not 0 <= expert < experts for expert in active) or len(set(active)) != len(active):
            raise ValueError(f"The always-active experts {active} of layer {layer} are not distinct experts of it.")
        if min(self.num_experts_per_tok, experts) < max(len(active), shared):
            raise ValueError(f"num_experts_per_tok {self.num_experts_per_tok} is below the experts that layer "
                             f"{layer} always uses.")


class FlexOlmoNoQKNormPrenormConfig(EmoConfig):
    """The same architecture under the name that early copies of the checkpoints carry."""

    model_type = "flex_olmo_noqknorm_prenorm"


class Olmo2NoQKNormPrenormConfig(_PublishedKeys, Olmo2Config):
    """The dense baseline: OLMo-2 sizes with norms before attention and MLP, and without query/key norms."""

    model_type = "olmo2_noqknorm_prenorm"
