"""docs/families.md, followed: a family that has no row gets one as the page says, and then everything works with it."""

import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Dots1Config, Dots1ForCausalLM

from emo_select.checkpoint import open_checkpoint
from emo_select.errors import ModelError
from emo_select.experts import select_random
from emo_select.experts.prune import prune_checkpoint
from emo_select.models import families

PAGE = (Path(__file__).parents[2] / "docs" / "families.md").read_text()


@pytest.fixture(scope="module")
def unknown(tmp_path_factory):
    """A small model of a family that is not among the rows."""
    folder = tmp_path_factory.mktemp("dots1")
    torch.manual_seed(0)
    config = Dots1Config(vocab_size=40, hidden_size=16, intermediate_size=24, moe_intermediate_size=8,
                         n_routed_experts=8, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=2,
                         num_experts_per_tok=2,
                         n_shared_experts=1, first_k_dense_replace=1, n_group=1, topk_group=1, layer_types=None,
                         max_position_embeddings=64)
    Dots1ForCausalLM(config).save_pretrained(folder)
    return folder


def test_the_page_names_fields_and_helpers_that_exist():
    fields = set(families.Family.__dataclass_fields__)
    steps = PAGE[PAGE.index("## Adding a row"):]
    named = {name for item in re.findall(r"^   - ((?:`\w+`(?:, )?)+)", steps, flags=re.M)
             for name in re.findall(r"`(\w+)`", item)}
    assert named and named <= fields
    for helper in re.findall(r"`(_\w+)`", steps):
        assert hasattr(families, helper), helper


def test_a_new_row_makes_a_family_work(unknown, tmp_path, monkeypatch):
    config = open_checkpoint(unknown).config
    if not families.is_moe(config):
        with pytest.raises(ModelError, match=r"docs/families\.md"):
            families.family_of(config)
    row = families.Family(
        "dots1", "Dots1DecoderLayer", families._swiglu("mlp.experts"),
        ("mlp.gate.weight", "mlp.gate.e_score_correction_bias"), families._dense_first,
        count_keys=("n_routed_experts",), width_key="moe_intermediate_size", separate_shared=("mlp.shared_experts",),
        scoring="sigmoid", groups=True,
        defaults={"num_experts_per_tok": 6, "first_k_dense_replace": 0, "n_group": 1, "topk_group": 1})
    monkeypatch.setattr(families, "FAMILIES", (*families.FAMILIES, row))
    keep = select_random(config, 4, 0)
    prune_checkpoint(unknown, keep, tmp_path / "pruned")
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    assert model.config.n_routed_experts == 4
    assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()
