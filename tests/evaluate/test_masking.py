"""A masked full model gives the numbers of the pruned checkpoint, for every family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from emo_select.checkpoint import open_checkpoint
from emo_select.errors import KeepKError
from emo_select.evaluate.masking import masked
from emo_select.experts import prune_checkpoint, select_random
from emo_select.models import EmoConfig, EmoForCausalLM, load_model

FAMILIES: dict[str, dict[str, Any]] = {
    "Olmoe": {"num_experts": 8, "num_experts_per_tok": 4, "norm_topk_prob": True},
    "Mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2},
    "Qwen2Moe": {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 2,
                 "shared_expert_intermediate_size": 16},
    "DeepseekV3": {"n_routed_experts": 16, "num_experts_per_tok": 4, "n_group": 2, "topk_group": 1, "q_lora_rank": 16,
                   "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
                   "num_key_value_heads": 4, "moe_intermediate_size": 16, "first_k_dense_replace": 1},
    "GptOss": {"num_local_experts": 8, "num_experts_per_tok": 4, "head_dim": 8},
}
KEEP = 6


def emo(**changes: Any) -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 400, "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 3,
                             "num_attention_heads": 4, "num_experts": 9, "num_experts_per_tok": 4,
                             "num_shared_experts": 1, "initializer_range": 0.15, "pad_token_id": 1}
    return EmoForCausalLM(EmoConfig(**(sizes | changes))).eval()


def assert_masked_equals_pruned(model: Any, folder: Path, keep_k: int) -> None:
    model.save_pretrained(folder / "full")
    ids = torch.randint(2, 400, (2, 40), generator=torch.Generator().manual_seed(1))
    with open_checkpoint(folder / "full") as checkpoint, torch.no_grad():
        config = dict(checkpoint.config)
        keep_set = select_random(config, keep_k, seed=2)
        prune_checkpoint(str(folder / "full"), keep_set, folder / "pruned")
        full, pruned = load_model(str(folder / "full")), load_model(str(folder / "pruned"))
        unmasked = full(ids, output_router_logits=False).logits
        expected = pruned(ids, output_router_logits=False).logits
        with masked(full, config, keep_set):
            found = full(ids, output_router_logits=False).logits
        restored = full(ids, output_router_logits=False).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert (unmasked - expected).abs().max() > 1e-2
    assert torch.equal(unmasked, restored)


@pytest.mark.parametrize("name", FAMILIES)
def test_families(make_model: Any, tmp_path: Path, name: str) -> None:
    assert_masked_equals_pruned(make_model(name, **FAMILIES[name]), tmp_path, KEEP)


@pytest.mark.parametrize("changes", [
    {}, {"num_shared_experts": 2, "num_experts": 10}, {"num_shared_experts": 0, "norm_topk_prob": True},
    {"num_shared_experts": 0, "always_active_experts": [1, 5]},
    {"num_experts_per_layer": [9, 0, 7], "num_shared_experts_per_layer": [1, 0, 2], "dense_intermediate_size": 24},
], ids=["shared", "two shared", "renormalised", "always active", "per layer"])
@pytest.mark.parametrize("keep_k", [3, 6])  # 3 is below the top-k of 4
def test_emo(tmp_path: Path, changes: dict[str, Any], keep_k: int) -> None:
    assert_masked_equals_pruned(emo(**changes), tmp_path, keep_k)


def test_a_selection_of_another_model_is_refused(tmp_path: Path) -> None:
    keep_set = select_random(emo(num_experts=20).config.to_dict(), 15)
    model = emo()
    with pytest.raises(KeepKError), masked(model, model.config.to_dict(), keep_set):
        pass
