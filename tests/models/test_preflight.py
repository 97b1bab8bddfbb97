"""A configuration is compared with all weights, from headers alone, before anything is built or written."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from emo_select.checkpoint import open_checkpoint, resolve
from emo_select.errors import CheckpointError, EmoSelectError, ModelError
from emo_select.models.files import require_tokenizer
from emo_select.models.preflight import check_weights

WEIGHTS = "model.safetensors"


@pytest.fixture
def model(tmp_path):
    """A copy of the shipped model, to damage."""
    folder = tmp_path / "model"
    shutil.copytree(resolve("demo/emo"), folder)
    return folder


def change(folder, **values):
    config = json.loads((folder / "config.json").read_text())
    config = {key: value for key, value in (config | values).items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(config))


def check(folder):
    with open_checkpoint(folder) as checkpoint:
        check_weights(checkpoint)


def test_every_golden_checkpoint_fits(golden):
    found = [path.parent for path in sorted(golden.rglob("config.json")) if list(path.parent.glob("*.safetensors*"))]
    assert len(found) > 10
    for folder in found:
        check(folder)


VALUES = {
    "experts": ({"num_experts": 10**9}, "num_experts .*1,000,000,000, which no model has"),
    "layers": ({"num_hidden_layers": 10**9}, "num_hidden_layers .*which no model has"),
    "one layer more": ({"num_hidden_layers": 9}, "layer"),
    "one layer less": ({"num_hidden_layers": 1}, "layer"),
    "one expert more": ({"num_experts": 33}, "experts"),
    "one expert less": ({"num_experts": 31}, "31 experts"),
    "intermediate size": ({"intermediate_size": 7}, r"experts.0.* has shape .*makes it"),
    "hidden size": ({"hidden_size": 8}, "hidden_size|shape"),
    "vocabulary": ({"vocab_size": 10}, "weight in .*makes it"),
    "heads": ({"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 4}, "self_attn.* has shape"),
    "keys": ({"num_key_value_heads": 1}, "self_attn.k_proj.* has shape"),
    "per token": ({"num_experts_per_tok": 1000}, "1000 experts per token .*32 experts"),
    "a text for a number": ({"hidden_size": "64"}, "hidden_size .*whole number, not '64'"),
    "a fraction": ({"num_experts": 32.5}, "num_experts .*whole number"),
    "a list": ({"intermediate_size": [64]}, "intermediate_size .*whole number"),
    "a flag": ({"num_hidden_layers": True}, "num_hidden_layers .*whole number"),
    "none": ({"num_attention_heads": 0}, "num_attention_heads .*whole number"),
    "not a number": ({"rms_norm_eps": float("nan")}, "rms_norm_eps .*a number"),
    "endless": ({"rope_theta": float("inf")}, "rope_theta .*a number"),
    "no size": ({"num_attention_heads": None}, "does not say num_attention_heads"),
    "no width": ({"intermediate_size": None}, "does not say intermediate_size"),
    "yes": ({"tie_word_embeddings": "yes"}, "tie_word_embeddings .*true or false"),
    "a number for a text": ({"model_type": 3}, "model_type .*a text"),
}


@pytest.mark.timeout(20)  # a size like this once filled the memory
@pytest.mark.parametrize("values, message", VALUES.values(), ids=VALUES)
def test_a_configuration_that_does_not_fit_is_refused(values, message, model):
    change(model, **values)
    with pytest.raises(EmoSelectError, match=message):
        check(model)


def test_missing_weights_are_named(model):
    tensors = load_file(model / WEIGHTS)  # of torch: numpy knows no bfloat16
    for name, message in {"lm_head.weight": "tie_word_embeddings", "model.norm.weight": "no tensor model",
                          "model.layers.1.self_attn.q_proj.weight": "layers.1.self_attn.q_proj.weight, which its other"
                          }.items():
        save_file({key: value for key, value in tensors.items() if key != name}, model / WEIGHTS)
        with pytest.raises(CheckpointError, match=message):
            check(model)


def test_weights_that_are_no_numbers_with_a_point_are_refused(model):
    tensors = load_file(model / WEIGHTS)
    name = "model.layers.0.self_attn.q_proj.weight"
    save_file(tensors | {name: tensors[name].to(torch.int8)}, model / WEIGHTS)
    with pytest.raises(CheckpointError, match=r"q_proj\.weight is stored as I8"):
        check(model)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", ["config.json", WEIGHTS])
def test_a_pipe_is_no_file_of_a_checkpoint(name, model):
    (model / name).unlink()
    os.mkfifo(model / name)
    with pytest.raises(CheckpointError, match="is a pipe, not"):
        open_checkpoint(model)


def test_a_model_without_tokenizer_files_is_refused(model):
    (model / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"no tokenizer files \(tokenizer.json, "):
        require_tokenizer(model)
