"""What of the vLLM backend can be checked without vLLM: registration, tensor names, routing, and the mistakes."""

from __future__ import annotations

import importlib.util
import sys
import tomllib
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from emo_select.errors import UnknownNameError, UsageError
from emo_select.evaluate import EvalOptions, evaluate_keep_set, load_engine, vllm
from emo_select.evaluate.vllm import RENAMED, routing_function
from emo_select.experts.keepset import KeepSet
from emo_select.models import EmoConfig, EmoForCausalLM

SIZES: dict[str, Any] = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 1,
                         "num_attention_heads": 4, "num_experts": 9, "num_experts_per_tok": 4, "pad_token_id": 1,
                         "initializer_range": 0.2}


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """A stand-in for vLLM's model registry."""
    models: dict[str, str] = {"OlmoeForCausalLM": "built in"}
    module = ModuleType("vllm")
    module.ModelRegistry = SimpleNamespace(  # type: ignore[attr-defined]
        get_supported_archs=lambda: models.keys(), register_model=lambda name, target: models.update({name: target}))
    monkeypatch.setitem(sys.modules, "vllm", module)
    return models


def test_registration_is_repeatable_and_names_a_class_that_exists(registry: dict[str, str]) -> None:
    vllm.register()
    vllm.register()
    assert registry.keys() == {"OlmoeForCausalLM", *vllm.ARCHITECTURES}
    module, _, name = registry["EmoForCausalLM"].partition(":")
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None
    assert f"\nclass {name}(" in Path(spec.origin).read_text()


def test_the_entry_point_is_declared() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["vllm.general_plugins"] == {"emo_select": "emo_select.evaluate.vllm:register"}
    assert project["optional-dependencies"]["vllm"] == [f"vllm>={'.'.join(map(str, vllm.OLDEST))}"]


def test_tensor_names_become_those_of_vllms_olmoe(make_model: Any, tmp_path: Path) -> None:
    EmoForCausalLM(EmoConfig(**SIZES, num_shared_experts=1)).save_pretrained(tmp_path / "emo")
    make_model("Olmoe", num_experts=9, num_experts_per_tok=4, num_hidden_layers=1).save_pretrained(tmp_path / "olmoe")
    emo, olmoe = (names(tmp_path / folder) for folder in ("emo", "olmoe"))
    renamed = set()
    for name in emo:
        for old, new in RENAMED.items():
            name = name.replace(old, new)
        renamed.add(name)
    assert renamed == {name for name in olmoe if "q_norm" not in name and "k_norm" not in name}


def names(folder: Path) -> set[str]:
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())


@pytest.mark.parametrize("changes", [
    {"num_shared_experts": 1}, {"num_shared_experts": 2}, {"norm_topk_prob": True}, {"always_active_experts": [2, 5]},
    {"num_shared_experts": 1, "num_experts": 3, "num_experts_per_tok": 3},
], ids=["shared", "two shared", "renormalised", "always active", "pruned below top-k"])
def test_routing_equals_the_native_block(changes: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = EmoForCausalLM(EmoConfig(**(SIZES | changes)))
    block = model.model.layers[0].mlp
    hidden = torch.randn(1, 50, SIZES["hidden_size"])
    with torch.no_grad():
        logits = hidden[0] @ block.gate.weight.T
        weights, index = routing_function(model.config, 0)(hidden[0], logits, model.config.num_experts_per_tok, False)
        assert weights.dtype == torch.float32 and index.dtype == torch.int32
        assert torch.allclose(block.experts(hidden[0], index.long(), weights), block(hidden)[0], atol=1e-6)


def test_what_vllm_cannot_run_is_said() -> None:
    assert "dense baseline" in str(vllm.unservable({"model_type": "olmo2_noqknorm_prenorm"}))
    assert vllm.unservable({"model_type": "emo", "hidden_size": 32, "num_attention_heads": 4}) is None
    with pytest.raises(UsageError, match="pip install"):
        load_engine("demo/emo", EvalOptions(backend="vllm"))
    with pytest.raises(UnknownNameError, match="vllm"):
        EvalOptions(backend="vlm")
    with pytest.raises(UsageError, match="prune it for vLLM"):
        evaluate_keep_set("x", [], KeepSet(experts=((0,),), method="random", keep_k=1), Path(),
                          EvalOptions(backend="vllm"))
