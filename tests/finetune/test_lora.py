"""Adapters on attention, dense parts and fused experts: what trains, saving, merging, loading in stock transformers."""

import json
import shutil

import pytest
import torch
from finetune_cases import CPU, GOLDEN, golden_tokens, golden_training
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, OlmoeConfig, OlmoeForCausalLM

from emo_select.checkpoint import open_checkpoint
from emo_select.errors import CheckpointError, NumericError, SpecError, UnknownNameError
from emo_select.finetune import lora as lora_module
from emo_select.finetune.lora import lora_targets
from emo_select.finetune.run import finetune_tokens
from emo_select.models import load_model
from emo_select.models.adapters import adapter_fingerprint, base_and_adapter, merge_adapter
from emo_select.spec import Lora

CASE = "moe_densefirst_k8"


def train(out, lora, *, model=GOLDEN / CASE / "model", **changes):
    training = golden_training(CASE, lora=lora, learning_rate="5e-3", epochs=0.5, **changes)
    return finetune_tokens(model, golden_tokens(CASE), out, training, CPU, pad_token=1)


@torch.no_grad()
def logits_of(model):
    return model(torch.tensor([golden_tokens(CASE)[0]["input_ids"]])).logits


def test_merged_checkpoint_equals_adapter_and_leaves_the_shared_expert(tmp_path):
    report = train(tmp_path / "out", Lora(rank=4, merge=True))
    assert report.checkpoints == [0, 4]
    merged, start = tmp_path / "out" / "checkpoint-4", GOLDEN / CASE / "model"
    adapted = PeftModel.from_pretrained(load_model(str(start)), merged / "adapter")
    torch.testing.assert_close(logits_of(load_model(str(merged))), logits_of(adapted), atol=1e-5, rtol=1e-4)
    old, new = load_file(start / "model.safetensors"), load_file(merged / "model.safetensors")
    moved = {name for name in old if not old[name].equal(new[name])}
    assert moved == {name for name in old if adaptable(name)}
    assert {name: t.dtype for name, t in old.items()} == {name: t.dtype for name, t in new.items()}


def adaptable(name: str) -> bool:
    """Attention, the dense first layer's MLP and routed experts 0 to 6; not router, shared expert 7, norms or head."""
    if ".experts.7." in name or ".mlp.gate.weight" in name:
        return False
    return ".self_attn." in name or ".mlp." in name


def test_router_and_shared_expert_by_flag(tmp_path):
    train(tmp_path / "out", Lora(rank=2, targets=("experts",), router=True, shared=True, merge=True))
    old = load_file(GOLDEN / CASE / "model" / "model.safetensors")
    new = load_file(tmp_path / "out" / "checkpoint-4" / "model.safetensors")
    moved = {name for name in old if not old[name].equal(new[name])}
    assert moved == {name for name in old if ".mlp.gate.weight" in name or ".experts." in name}


def test_adapter_loads_in_stock_transformers(tmp_path):
    """A family that transformers knows, adapters on its fused experts, none of our code on loading."""
    config = OlmoeConfig(
        vocab_size=64, hidden_size=24, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_experts=6, num_experts_per_tok=2, output_router_logits=True, pad_token_id=1,
        eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    OlmoeForCausalLM(config).save_pretrained(tmp_path / "start")
    train(tmp_path / "out", Lora(rank=2, merge=True), model=tmp_path / "start")
    merged = tmp_path / "out" / "checkpoint-4"
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "start")
    before = logits_of(base)
    adapted = logits_of(PeftModel.from_pretrained(base, merged / "adapter"))
    assert (adapted - before).abs().max() > 1e-3
    stock = logits_of(AutoModelForCausalLM.from_pretrained(merged))
    torch.testing.assert_close(stock, adapted, atol=1e-5, rtol=1e-4)


@pytest.fixture(scope="module")
def unmerged(tmp_path_factory):
    """Where a training left checkpoint-0 and an adapter."""
    out = tmp_path_factory.mktemp("unmerged") / "out"
    train(out, Lora(rank=2))
    return out


def test_unmerged_checkpoint_is_an_adapter(unmerged):
    names = {path.name for path in (unmerged / "checkpoint-4").iterdir()}
    assert names >= {"adapter_config.json", "adapter_model.safetensors", "README.md", ".emo-select.json"}
    assert not any(name.startswith(("config", "model")) for name in names)
    assert "PeftModel.from_pretrained(model, folder)" in (unmerged / "checkpoint-4" / "README.md").read_text()


def test_a_training_that_was_moved_loads_in_stock_peft(unmerged, tmp_path, monkeypatch):
    """By name of its model from anywhere, by its own word from its own folder."""
    moved = shutil.copytree(unmerged, tmp_path / "elsewhere" / "moved")
    adapter = moved / "checkpoint-4"
    ours = logits_of(merge_adapter(load_model(str(moved / "checkpoint-0")), adapter))
    base = AutoModelForCausalLM.from_pretrained(moved / "checkpoint-0")
    torch.testing.assert_close(logits_of(PeftModel.from_pretrained(base, adapter)), ours, atol=1e-5, rtol=1e-4)
    monkeypatch.chdir(adapter)
    torch.testing.assert_close(logits_of(AutoPeftModelForCausalLM.from_pretrained(".")), ours, atol=1e-5, rtol=1e-4)


def test_a_model_that_stayed_behind_is_missed_by_name(unmerged, tmp_path):
    alone = shutil.copytree(unmerged / "checkpoint-4", tmp_path / "alone")
    with pytest.raises(CheckpointError, match=r"should be in .*checkpoint-0"):
        base_and_adapter(str(alone))
    config = json.loads((alone / "adapter_config.json").read_text())
    (alone / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "../here"}))
    (tmp_path / "here").mkdir()
    assert base_and_adapter(str(alone)) == (str(tmp_path / "here"), alone)


def test_an_adapter_is_found_with_its_model_and_merged_in_memory(unmerged, tmp_path):
    """The model is the one beside it, wherever both have moved, else the one that it names."""
    base, adapter = base_and_adapter(str(unmerged / "checkpoint-4"))
    assert base == str(unmerged / "checkpoint-0")
    adapted = logits_of(PeftModel.from_pretrained(load_model(base), adapter))
    assert (logits_of(load_model(base)) - adapted).abs().max() > 1e-3
    torch.testing.assert_close(logits_of(merge_adapter(load_model(base), adapter)), adapted, atol=1e-5, rtol=1e-4)
    alone = shutil.copytree(adapter, tmp_path / "alone")
    assert base_and_adapter(base) == (base, None)
    before = adapter_fingerprint(adapter)
    tensors = load_file(alone / "adapter_model.safetensors")
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, alone / "adapter_model.safetensors")
    assert adapter_fingerprint(adapter) == before != adapter_fingerprint(alone)


def test_an_adapter_that_cannot_be_used_is_named(unmerged, tmp_path):
    with pytest.raises(CheckpointError, match="does not fit its model"):
        merge_adapter(load_model(str(GOLDEN / "moe_shared1_k8" / "model")), unmerged / "checkpoint-4")
    broken = shutil.copytree(unmerged / "checkpoint-4", tmp_path / "broken")
    (broken / "adapter_model.safetensors").write_bytes(b"{}")
    with pytest.raises(CheckpointError, match="does not fit its model"):
        merge_adapter(load_model(str(GOLDEN / CASE / "model")), broken)
    (broken / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"has no adapter_model.safetensors"):
        adapter_fingerprint(broken)
    (broken / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="does not say which model"):
        base_and_adapter(str(broken))


def test_experts_without_gradient_stop_the_training(tmp_path, monkeypatch):
    add = lora_module.add_adapters

    def deaf(model, targets, lora):
        adapted = add(model, targets, lora)
        for name, parameter in adapted.named_parameters():
            if ".experts." in name and parameter.requires_grad:
                parameter.register_hook(torch.zeros_like)
        return adapted

    monkeypatch.setattr(lora_module, "add_adapters", deaf)
    with pytest.raises(NumericError, match="No routed expert received a gradient"):
        train(tmp_path / "out", Lora(rank=2))


@pytest.mark.parametrize(
    ("lora", "error", "message"),
    [
        (Lora(targets=("q_prj",)), UnknownNameError, "did you mean 'q_proj'"),
        (Lora(dropout=0.1), SpecError, "dropout"),
    ],
)
def test_wrong_targets_before_the_model_is_loaded(lora, error, message, tmp_path, monkeypatch):
    monkeypatch.setattr("emo_select.models.loading.load_model", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(error, match=message):
        train(tmp_path / "out", lora)
    with pytest.raises(SpecError, match="leave out --freeze or --lora"):
        train(tmp_path / "out", Lora(), freeze="routed")


def test_groups_resolve_to_the_modules_of_the_model():
    with open_checkpoint(GOLDEN / CASE / "model") as checkpoint:
        found = lora_targets(checkpoint, Lora(targets=("dense", "experts"), router=True))
        assert found.modules == ("mlp.down_proj", "mlp.gate_proj", "mlp.up_proj")
        assert found.parameters == ("mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight")
        assert lora_targets(checkpoint, Lora(targets=("q_proj",))).modules == ("self_attn.q_proj",)
