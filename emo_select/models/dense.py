"""The dense baseline of the published comparisons, as a native transformers model."""

from __future__ import annotations

from torch import nn
from transformers.generation import GenerationMixin
from transformers.modeling_utils import PreTrainedModel
from transformers.models.olmo2.modeling_olmo2 import Olmo2ForCausalLM, Olmo2MLP, Olmo2Model

from emo_select.models.caching import NEW, OLD
from emo_select.models.config import Olmo2NoQKNormPrenormConfig
from emo_select.models.emo import EmoAttention, EmoRMSNorm, EmoRotaryEmbedding, PrenormDecoderLayer


class Olmo2NoQKNormPrenormDecoderLayer(PrenormDecoderLayer):
    """A layer with OLMo-2's MLP."""

    def __init__(self, config: Olmo2NoQKNormPrenormConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx, Olmo2MLP(config))


class Olmo2NoQKNormPrenormPreTrainedModel(PreTrainedModel):
    """What transformers needs to know to load, shard, checkpoint and record the dense model."""

    config_class = Olmo2NoQKNormPrenormConfig
    config: Olmo2NoQKNormPrenormConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Olmo2NoQKNormPrenormDecoderLayer"]
    _skip_keys_device_placement = [OLD, NEW]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": Olmo2NoQKNormPrenormDecoderLayer, "attentions": EmoAttention}


class Olmo2NoQKNormPrenormModel(Olmo2NoQKNormPrenormPreTrainedModel):
    """Embedding, decoder layers, final norm."""

    def __init__(self, config: Olmo2NoQKNormPrenormConfig) -> None:
        super().__init__(config)
        self.padding_idx, self.vocab_size = config.pad_token_id, config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(
            Olmo2NoQKNormPrenormDecoderLayer(config, layer) for layer in range(config.num_hidden_layers)
        )
        self.norm = EmoRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = EmoRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    forward = Olmo2Model.forward


class Olmo2NoQKNormPrenormForCausalLM(Olmo2NoQKNormPrenormPreTrainedModel, GenerationMixin):
    """The dense model with a language-modelling head; losses and outputs are those of OLMo-2."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: Olmo2NoQKNormPrenormConfig) -> None:
        super().__init__(config)
        self.model = Olmo2NoQKNormPrenormModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    forward = Olmo2ForCausalLM.forward
