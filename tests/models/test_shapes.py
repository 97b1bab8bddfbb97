"""Shapes from config.json alone, compared with headers of real checkpoints and the published parameter counts."""

import json
from pathlib import Path

import pytest

from emo_select.checkpoint import PUBLISHED, open_checkpoint
from emo_select.checkpoint.sources import MODELS
from emo_select.errors import CheckpointError, ModelError
from emo_select.models.families import experts_per_layer, is_moe
from emo_select.models.shapes import config_of, experts_of, open_or_outline, outline, released
from emo_select.spec import RunSpec

PARAMETERS = {"moe_1b14b": 13_568_641_024, "moe_1b4b": 3_901_818_880, "dense_1b": 1_484_851_200}
MODEL_FOLDERS = sorted((Path(__file__).parents[1] / "golden" / "models").iterdir())


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_released_model_has_the_published_number_of_parameters(name):
    found = open_or_outline(name)
    assert not found.has_weights
    size = "dense_1b" if "Dense" in name else "moe_1b4b" if "1b4b" in name else "moe_1b14b"
    assert found.total_bytes == 4 * PARAMETERS[size]


@pytest.mark.parametrize("folder", MODEL_FOLDERS, ids=lambda folder: folder.name)
def test_shapes_are_those_of_the_headers(folder):
    """Also of architectures that only transformers can lay out."""
    real = open_checkpoint(folder)
    found = outline(real.config, folder)
    assert {name: info.shape for name, info in found.tensors.items()} == {
        name: info.shape for name, info in real.tensors.items()}


def test_an_architecture_of_transformers_is_laid_out_as_on_disk():
    config = {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2, "num_hidden_layers": 1,
              "hidden_size": 16, "intermediate_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1,
              "vocab_size": 32, "tie_word_embeddings": False}
    names = outline(config, Path("m")).tensors
    assert names["model.layers.0.block_sparse_moe.experts.3.w1.weight"].shape == (8, 16)
    assert names["model.layers.0.block_sparse_moe.gate.weight"].shape == (4, 16)


def test_a_folder_with_only_a_configuration_is_outlined_and_cannot_be_read(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(released("allenai/StdMoE_1b4b_130B")))
    found = open_or_outline(str(tmp_path))
    assert is_moe(found.config)
    assert max(experts_per_layer(found.config)) == 32
    with pytest.raises(ModelError, match="not on this machine"):
        found.read("model.norm.weight")


def test_a_configuration_that_lacks_a_size_is_named():
    with pytest.raises(CheckpointError, match="intermediate_size"):
        outline({"model_type": "emo", "num_hidden_layers": 1, "hidden_size": 8, "vocab_size": 8, "num_experts": 4,
                 "num_attention_heads": 1}, Path("m"))


def test_experts_are_known_of_released_models_and_nothing_of_others():
    assert (experts_of("allenai/Emo_1b14b_1T"), experts_of("allenai/Emo_1b14b_1T@main")) == (128, 128)
    assert experts_of("allenai/Dense_1b_130B") is None
    assert config_of("nobody/nothing") is None


def test_a_fetched_copy_is_found_under_its_hub_id(tmp_path, monkeypatch):
    folder = tmp_path / MODELS / "some" / "model"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(released("allenai/StdMoE_1b4b_130B") | {"num_experts": 24}))
    assert experts_of("some/model") is None
    assert experts_of("some/model", str(tmp_path)) == 24
    monkeypatch.setenv("EMO_SELECT_DATA_DIR", str(tmp_path))
    assert RunSpec(model="some/model", task="mmlu", keep_k="50%").keep_k == 12
    with pytest.raises(ModelError, match="lacks some of its weights"):
        open_checkpoint("some/model")
