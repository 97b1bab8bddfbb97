"""The derivation against what was once written down by hand, for published configurations at their full size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from emo_select.errors import ModelError
from emo_select.models.derive import derive
from emo_select.models.derived import derived_family
from emo_select.models.families import family_of, num_groups, top_k


def swiglu(gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj", place: str = "mlp") -> dict[str, Any]:
    """Parameters in memory and the tensors they are made of, for experts with one tensor per matrix."""
    names = {name: f"{place}.experts.{{e}}.{name}.weight" for name in (gate, up, down)}
    return {"mlp.experts.gate_up_proj": (names[gate], names[up]), "mlp.experts.down_proj": (names[down],)}


CORRECTED = {"mlp.gate.weight", "mlp.gate.e_score_correction_bias"}
FUSED = ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")
# model_type → what the row said: experts, router, counting keys, experts per token, always-on modules, groups, counts
ROWS: dict[str, tuple[Any, ...]] = {
    "olmoe": (swiglu(), {"mlp.gate.weight"}, {"num_experts"}, 8, set(), 1, [64] * 16),
    "flex_olmo": (swiglu(), {"mlp.gate.weight"}, {"num_experts"}, 5, set(), 1, [7] * 32),
    "mixtral": (swiglu("w1", "w3", "w2", "block_sparse_moe"), {"block_sparse_moe.gate.weight"}, {"num_local_experts"},
                2, set(), 1, [8] * 32),
    "qwen2_moe": (swiglu(), {"mlp.gate.weight"}, {"num_experts"}, 4, {"mlp.shared_expert", "mlp.shared_expert_gate"},
                  1, [60] * 24),
    "qwen3_moe": (swiglu(), {"mlp.gate.weight"}, {"num_experts", "num_local_experts"}, 8, set(), 1, [128] * 24),
    "deepseek_v2": (swiglu(), {"mlp.gate.weight"}, {"n_routed_experts"}, 6, {"mlp.shared_experts"}, 1, [64] * 32),
    "deepseek_v3": (swiglu(), CORRECTED, {"n_routed_experts"}, 8, {"mlp.shared_experts"}, 8, [0] * 3 + [256] * 58),
    "glm4_moe": (swiglu(), CORRECTED, {"n_routed_experts"}, 8, {"mlp.shared_experts"}, 1, [0] + [128] * 45),
    "gpt_oss": ({f"mlp.experts.{name}": (f"mlp.experts.{name}",) for name in FUSED},
                {"mlp.router.weight", "mlp.router.bias"}, {"num_local_experts"}, 4, set(), 1, [128] * 36),
}


@pytest.mark.parametrize("model_type", ROWS)
def test_it_finds_what_the_row_said(model_type: str) -> None:
    changes = {"num_experts_per_tok": 6} if model_type == "deepseek_v2" else {}  # the class has no default
    config = AutoConfig.for_model(model_type, **changes).to_dict()
    family = family_of(config)
    experts, router, keys, chosen, shared, groups, counts = ROWS[model_type]
    assert {fused.parameter: fused.parts for fused in family.experts} == experts
    assert not any(fused.converted for fused in family.experts)
    assert set(family.router) == router and keys <= set(family.count_keys) and set(family.separate_shared) == shared
    assert (top_k(config), num_groups(config), list(family.counts)) == (chosen, groups, counts)
    place = "mlp.router" if model_type == "gpt_oss" else "mlp.gate"
    assert (family.moe_module, family.router_module, family.experts_module) == ("mlp", place, "mlp.experts")
    assert family.disk_layers[0] == family.layers == "model.layers" and not family.rows and not family.tails


def test_dense_layers_follow_the_configuration() -> None:
    changes = {"num_hidden_layers": 6, "decoder_sparse_step": 2, "mlp_only_layers": [3], "hidden_size": 16,
               "num_experts": 8}
    assert family_of(AutoConfig.for_model("qwen2_moe", **changes).to_dict()).counts == (0, 8, 0, 0, 0, 8)


def test_a_record_gives_the_same_family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMO_SELECT_CACHE_DIR", str(tmp_path))
    config = json.loads(AutoConfig.for_model("glm4_moe", num_hidden_layers=3).to_json_string(use_diff=False))
    first = derived_family(config)
    assert len(list((tmp_path / "families").iterdir())) == 1
    monkeypatch.setattr("emo_select.models.derive.derive", None)  # it is not called again
    assert derived_family(config) == first == derived_family({**config, "torch_dtype": "bfloat16"})


def test_a_damaged_record_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMO_SELECT_CACHE_DIR", str(tmp_path))
    config = json.loads(AutoConfig.for_model("olmoe", num_hidden_layers=1).to_json_string(use_diff=False))
    first = derived_family(config)
    record = next((tmp_path / "families").iterdir())
    for content in ("", "[]", "{}", record.read_text()[:-40]):
        record.write_text(content)
        assert derived_family(config) == first


@pytest.mark.parametrize(("changes", "says"), [
    ({"hidden_size": "wide"}, "The configuration cannot be used"),
    ({"num_attention_heads": 0}, "The configuration cannot be"),
])
def test_a_configuration_that_cannot_be_built_is_one_sentence(changes: dict[str, Any], says: str) -> None:
    config = AutoConfig.for_model("olmoe", num_hidden_layers=1).to_dict()
    with pytest.raises(ModelError, match=says) as refusal:
        derive({**config, **changes})
    assert "\n" not in str(refusal.value)
