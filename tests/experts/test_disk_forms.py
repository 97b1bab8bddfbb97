"""The same model in the forms that people have it in on disk gives the same selection and the same pruned model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM

from emo_select.checkpoint import open_checkpoint
from emo_select.experts import StreamOptions, select_layerwise
from emo_select.experts.keepset import KeepSet
from emo_select.experts.prune import prune_checkpoint
from emo_select.finetune.merge import merge_back

PROMPTS = [[3 + (7 * row + 5 * at) % 61 for at in range(6 + row)] for row in range(4)]
FP32 = StreamOptions(dtype="float32", device="cpu")


def selected(folder: Path) -> KeepSet:
    with open_checkpoint(folder) as checkpoint:
        return select_layerwise(checkpoint, PROMPTS, [6], options=FP32)[6]


def stock(folder: Path) -> Any:
    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(report.values()), report
    return model.eval()


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss", "granitemoe", "llama4_text"])
def test_a_model_saved_as_it_is_in_memory(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    model.save_pretrained(tmp_path / "usual")
    model.save_pretrained(tmp_path / "memory", save_original_format=False)
    kept = selected(tmp_path / "usual")
    assert selected(tmp_path / "memory").experts == kept.experts
    names = set(load_file(tmp_path / "memory" / "model.safetensors"))
    for form in ("usual", "memory"):
        prune_checkpoint(tmp_path / form, kept, tmp_path / f"{form}-pruned")
    assert set(load_file(tmp_path / "memory-pruned" / "model.safetensors")) == names
    usual, memory = (stock(tmp_path / f"{form}-pruned").state_dict() for form in ("usual", "memory"))
    assert usual.keys() == memory.keys() and all(torch.equal(usual[name], memory[name]) for name in usual)
    merge_back(tmp_path / "memory-pruned", str(tmp_path / "memory"), tmp_path / "merged")
    full, merged = (load_file(tmp_path / name / "model.safetensors") for name in ("memory", "merged"))
    assert full.keys() == merged.keys() and all(torch.equal(full[name], merged[name]) for name in full)


def multimodal(tmp_path: Path) -> tuple[Path, Any]:
    """A tiny image-and-text model, stored and in memory."""
    from transformers import AutoModelForImageTextToText, Qwen3VLMoeConfig

    text = {"vocab_size": 64, "hidden_size": 16, "moe_intermediate_size": 12, "intermediate_size": 24,
            "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8,
            "num_experts": 12, "num_experts_per_tok": 3, "max_position_embeddings": 64, "pad_token_id": 0,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16,
              "patch_size": 4, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    config = Qwen3VLMoeConfig(text_config=text, vision_config=vision, image_token_id=60, video_token_id=61,
                              vision_start_token_id=62, vision_end_token_id=63)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config).eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point() and "norm" not in name:
                tensor.normal_(std=0.3)
    model.save_pretrained(tmp_path / "whole")
    return tmp_path / "whole", model


@pytest.mark.parametrize("transposed", [False, True], ids=["as-saved", "as-on-the-hub"])
def test_the_text_part_of_a_multimodal_model(transposed: bool, tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText

    folder, model = multimodal(tmp_path)
    kept = selected(folder)
    if transposed:
        tensors = load_file(folder / "model.safetensors")
        turned = {name: value.transpose(1, 2).contiguous() for name, value in tensors.items() if ".experts." in name}
        save_file({**tensors, **turned}, folder / "model.safetensors", metadata={"format": "pt"})
        assert selected(folder).experts == kept.experts
    prune_checkpoint(folder, kept, tmp_path / "pruned")
    config = json.loads((tmp_path / "pruned" / "config.json").read_text())
    assert config["text_config"]["num_experts"] == 6 and config["vision_config"]["depth"] == 1
    before, after = (load_file(at / "model.safetensors") for at in (folder, tmp_path / "pruned"))
    vision = [name for name in before if "visual" in name]
    assert vision and all(torch.equal(before[name], after[name]) for name in vision)
    pruned, report = AutoModelForImageTextToText.from_pretrained(tmp_path / "pruned", output_loading_info=True)
    assert not any(report.values())
    rows = {name: value for name, value in pruned.state_dict().items() if value.shape != model.state_dict()[name].shape}
    assert rows
    for name, value in rows.items():
        layer = int(name.split("layers.")[1].split(".")[0])
        assert torch.equal(value, model.state_dict()[name][list(kept.experts[layer] or ())]), name
