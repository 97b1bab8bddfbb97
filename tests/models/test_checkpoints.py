"""Reading and writing checkpoints: the published layout both ways, and nothing but a whole, fitting checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from emo_select.errors import CheckpointError, ModelError
from emo_select.models import EmoConfig, EmoForCausalLM, load_model, load_tokenizer

NAMES = sorted(path.name for path in (Path(__file__).parents[1] / "golden" / "models").iterdir())


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for shard in sorted(directory.glob("model*.safetensors"))
            for name, tensor in load_file(shard).items()}


def config(directory: Path) -> dict:
    return json.loads((directory / "config.json").read_text())


@pytest.fixture
def copy(golden: Path, tmp_path: Path):
    """`copy(name)`: a golden checkpoint that the test may damage."""

    def make(name: str = "emo_gqa") -> Path:
        (tmp_path / name).mkdir()
        for file in (golden / "models" / name).iterdir():
            if not file.name.startswith("expected"):
                shutil.copy(file, tmp_path / name)
        return tmp_path / name

    return make


def edit_tensors(directory: Path, change) -> None:
    stored = load_file(directory / "model.safetensors")
    change(stored)
    save_file(stored, directory / "model.safetensors", metadata={"format": "pt"})


def edit_config(directory: Path, **values) -> None:
    (directory / "config.json").write_text(json.dumps(config(directory) | values))


@pytest.mark.parametrize("name", NAMES)
def test_saving_what_was_loaded_changes_no_byte(name, golden, tmp_path):
    source, first, second = golden / "models" / name, tmp_path / "first", tmp_path / "second"
    load_model(str(source), dtype="auto").save_pretrained(first)
    load_model(str(first), dtype="auto").save_pretrained(second)
    original, saved = tensors(source), tensors(first)
    assert original.keys() == saved.keys()
    assert all(original[key].dtype == saved[key].dtype and torch.equal(original[key], saved[key]) for key in saved)
    for file in ("model.safetensors", "config.json"):
        assert (first / file).read_bytes() == (second / file).read_bytes()


def test_sharded_save_reads_back(golden, tmp_path):
    model = load_model(str(golden / "models" / "emo_sharded"))
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    again = load_model(str(tmp_path)).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", NAMES)
def test_saved_config_keeps_the_published_keys(name, golden, tmp_path):
    """Readers of the published code know rope_theta and rope_scaling, and nothing of rope_parameters."""
    source = config(golden / "models" / name)
    load_model(str(golden / "models" / name), dtype="auto").config.save_pretrained(tmp_path)
    saved = config(tmp_path)
    assert "rope_parameters" not in saved
    for key in source.keys() - {"transformers_version", "dtype", "torch_dtype"}:
        assert saved.get(key) == source[key], key


def test_missing_config_values_are_the_published_defaults(golden):
    loaded = load_model(str(golden / "models" / "emo_minimal_config")).config
    assert (loaded.num_experts, loaded.num_experts_per_tok, loaded.num_shared_experts) == (7, 5, 0)
    assert loaded.rope_parameters["rope_theta"] == 500000.0
    assert loaded.num_key_value_heads == loaded.num_attention_heads


def test_alias_of_early_checkpoints_loads_and_keeps_its_name(copy, golden, tmp_path):
    directory = copy("emo_shared1")
    edit_config(directory, model_type="flex_olmo_noqknorm_prenorm",
                architectures=["FlexOlmoNoQKNormPrenormForCausalLM"])
    model, emo = load_model(str(directory)), load_model(str(golden / "models" / "emo_shared1"))
    ids = torch.arange(10)[None]
    assert isinstance(model, EmoForCausalLM)
    assert torch.equal(model(ids).logits, emo(ids).logits)
    model.save_pretrained(tmp_path / "saved")
    assert config(tmp_path / "saved")["model_type"] == "flex_olmo_noqknorm_prenorm"
    assert tensors(tmp_path / "saved").keys() == tensors(directory).keys()


def test_code_named_in_auto_map_is_not_run(copy, capsys):
    directory = copy("emo_gqa")
    (directory / "modeling_emo.py").write_text("raise SystemExit('this code must not run')")
    (directory / "configuration_emo.py").write_text("raise SystemExit('this code must not run')")
    assert type(load_model(str(directory))) is EmoForCausalLM
    notice = [line for line in capsys.readouterr().err.splitlines() if "auto_map" in line]
    assert len(notice) == 1


def test_dtype_auto_keeps_the_stored_one(golden):
    stored = load_model(str(golden / "models" / "emo_bf16"), dtype="auto")
    assert {parameter.dtype for parameter in stored.parameters()} == {torch.bfloat16}
    assert not stored.training


def test_missing_tensor_is_named(copy):
    directory = copy()
    edit_tensors(directory, lambda stored: stored.pop("model.layers.1.mlp.experts.3.up_proj.weight"))
    with pytest.raises(CheckpointError, match=r"no tensor model\.layers\.1\.mlp\.experts\.3\.up_proj\.weight;"):
        load_model(str(directory))


def test_experts_are_not_shifted_over_a_gap(copy):
    """With one expert renumbered the count still fits; stacking them in order would misplace the rest."""
    directory = copy()

    def renumber(stored):
        for part in ("gate", "up", "down"):
            stored[f"model.layers.1.mlp.experts.12.{part}_proj.weight"] = stored.pop(
                f"model.layers.1.mlp.experts.3.{part}_proj.weight")

    edit_tensors(directory, renumber)
    with pytest.raises(CheckpointError, match=r"experts\.12\.down_proj\.weight is expert 12 of layer 1"):
        load_model(str(directory))


def test_unexpected_tensor_is_named(copy):
    directory = copy()
    edit_tensors(directory, lambda stored: stored.update({"model.layers.0.mlp.gate.bias": torch.zeros(12)}))
    with pytest.raises(CheckpointError, match=r"unexpected: model\.layers\.0\.mlp\.gate\.bias"):
        load_model(str(directory))


def test_tensor_of_another_shape_is_named(copy):
    directory = copy()
    edit_tensors(directory, lambda stored: stored.update({"model.norm.weight": torch.ones(31)}))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight in .* shape \[31\], but .* makes it \[32\]"):
        load_model(str(directory))


def test_config_that_counts_other_experts_than_the_weights(copy):
    directory = copy()
    edit_config(directory, num_experts=11)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_model(str(directory))


def test_unknown_tensor_of_a_foreign_architecture_is_refused(tmp_path):
    """The check does not depend on the architecture being one of ours."""
    from transformers import OlmoeConfig, OlmoeForCausalLM

    model = OlmoeForCausalLM(OlmoeConfig(vocab_size=32, hidden_size=16, intermediate_size=8, num_hidden_layers=1,
                                         num_attention_heads=2, num_experts=4, num_experts_per_tok=2))
    model.save_pretrained(tmp_path)
    assert load_model(str(tmp_path)).config.model_type == "olmoe"
    edit_tensors(tmp_path, lambda stored: stored.pop("model.norm.weight"))
    with pytest.raises(CheckpointError, match=r"no tensor model\.norm\.weight"):
        load_model(str(tmp_path))


@pytest.mark.parametrize(("values", "sentence"), [
    ({"num_experts_per_layer": [12, 12]}, "num_experts_per_layer in config.json must list one number for each"),
    ({"num_experts_per_layer": [0, 12, 12]}, "config.json gives that layer 0 experts"),
    ({"norm_topk_prob": True}, "norm_topk_prob is not defined together with shared"),
    ({"num_shared_experts": 12}, "at least one must be routed"),
    ({"always_active_experts": [3, 12]}, "always-active experts"),
    ({"num_shared_experts": 4}, "num_experts_per_tok 3 is below"),
    ({"num_experts": "many"}, "num_experts"),
    ({"model_type": "emu"}, "trust_remote_code"),
    ({"model_type": "emu", "auto_map": {}}, "emu"),
])
def test_contradicting_config_is_one_sentence(copy, values, sentence):
    directory = copy()
    edit_config(directory, **values)
    with pytest.raises((ModelError, CheckpointError), match=sentence) as raised:
        load_model(str(directory))
    assert "\n" not in str(raised.value)


def test_truncated_file_is_refused(copy):
    weights = copy() / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load_model(str(weights.parent))


def test_unknown_implementation_is_a_model_error(copy):
    directory = str(copy())
    with pytest.raises(ModelError, match="experts_implementation"):
        load_model(directory, experts_implementation="quick")
    with pytest.raises(ModelError, match="attn_implementation"):
        load_model(directory, attn_implementation="quick")


def test_grouped_products_need_aligned_widths(golden):
    directory = str(golden / "models" / "emo_noshared_norm")  # its experts are 10 wide
    with pytest.raises(ModelError, match="multiples of 8"):
        load_model(directory, experts_implementation="grouped_mm")
    assert EmoForCausalLM.from_pretrained(directory).config._experts_implementation == "eager"


def test_folder_without_tokenizer(copy):
    with pytest.raises(ModelError, match="has no tokenizer files"):
        load_tokenizer(str(copy()))


def test_released_size_has_the_published_number_of_parameters():
    released = EmoConfig(vocab_size=100352, hidden_size=2048, intermediate_size=1024, num_hidden_layers=16,
                         num_attention_heads=16, num_experts=128, num_experts_per_tok=8, num_shared_experts=1)
    with torch.device("meta"):
        assert EmoForCausalLM(released).num_parameters() == 13_568_641_024


def test_saved_file_declares_its_format(golden, tmp_path):
    load_model(str(golden / "models" / "emo_shared1")).save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
