"""Conversions against the published converter's output, logits of both sides, and the way back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from emo_select.checkpoint import open_checkpoint
from emo_select.convert import CoreOptions, HfOptions, to_hf, to_olmo_core
from emo_select.convert.check import compare, released_logits, training_logits
from emo_select.convert.dcp import TrainingTensors
from emo_select.convert.experiment import read_experiment

PUBLISHED = ["dense", "emo", "emo_bfloat16", "emo_tokenizer", "emo_two_processes", "std", "std_no_shared"]
WITH_CHECKPOINT = ["dense", "emo", "emo_dense_first", "emo_two_processes", "std", "std_no_shared"]


def checkpoint_of(cases: Path, case: str) -> Path:
    own = cases / case / "checkpoint"
    return own if own.exists() else cases / "emo" / "checkpoint"


@pytest.mark.parametrize("case", PUBLISHED)
def test_tensors_and_configs_are_those_of_the_published_converter(cases, tmp_path, case):
    facts = json.loads((cases / case / "case.json").read_text())
    tokenizer = str(cases / case / "hf") if case == "emo_tokenizer" else None
    to_hf(checkpoint_of(cases, case), tmp_path / "out", HfOptions(
        dtype=facts["dtype"], cut_vocabulary=True, max_length=facts["max_sequence_length"], published_config=True,
        tokenizer=tokenizer))
    reference = cases / (case if case != "emo_tokenizer" else "emo") / "hf" / "model.safetensors"
    expected, found = load_file(reference), load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == expected.keys()
    assert [n for n in found if found[n].dtype != expected[n].dtype or not torch.equal(found[n], expected[n])] == []
    for path in (cases / case / "hf").glob("*.json"):
        ours, theirs = (json.loads(p.read_text()) for p in (tmp_path / "out" / path.name, path))
        for content in (ours, theirs):
            content.pop("transformers_version", None)
        assert ours == theirs, path.name


@pytest.mark.parametrize("case", [c for c in PUBLISHED if c != "emo_tokenizer"])
def test_logits_are_those_of_trainer_and_converted_model(cases, tmp_path, case):
    training, reference = checkpoint_of(cases, case), load_file(cases / case / "logits.safetensors")
    dtype = json.loads((cases / case / "case.json").read_text())["dtype"]
    to_hf(training, tmp_path / "out", HfOptions(dtype=dtype))
    trainer = reference.get("trainer_logits_without_pools", reference["trainer_logits"])
    ids, cut = reference["input_ids"], reference["hf_logits"].shape[-1]
    with torch.inference_mode(), open_checkpoint(tmp_path / "out") as checkpoint:
        ours = training_logits(read_experiment(training), TrainingTensors(training / "model_and_optim"), ids)
        theirs = released_logits(checkpoint, ids)
    assert ours.shape == theirs.shape == trainer.shape  # padded rows are kept
    atol = 5e-6 if dtype == "float32" else 3e-2
    torch.testing.assert_close(ours, trainer, rtol=0, atol=5e-6)
    torch.testing.assert_close(theirs, trainer, rtol=0, atol=atol)
    torch.testing.assert_close(theirs[..., :cut], reference["hf_logits"], rtol=0, atol=atol)


@pytest.mark.parametrize("case", WITH_CHECKPOINT)
def test_there_and_back_gives_every_weight_again(cases, tmp_path, case):
    training = checkpoint_of(cases, case)
    to_hf(training, tmp_path / "hf", HfOptions(max_length=64))
    report = to_olmo_core(str(tmp_path / "hf"), tmp_path / "step0", CoreOptions())
    before, after = (TrainingTensors(folder / "model_and_optim") for folder in (training, tmp_path / "step0"))
    assert set(after.tensors) == {name for name in before.tensors if name.startswith("model.")}
    assert [name for name in after.tensors if not torch.equal(before.read(name), after.read(name))] == []
    assert report["added_rows"] == 0
    first, second = read_experiment(training), read_experiment(tmp_path / "step0")
    assert (first.layers, first.heads, first.norm_eps) == (second.layers, second.heads, second.norm_eps)
    assert compare(tmp_path / "step0", tmp_path / "hf").difference < 5e-6


def test_a_cut_vocabulary_is_padded_with_zeros_again(cases, tmp_path):
    released = cases / "std" / "hf"
    report = to_olmo_core(str(released), tmp_path / "step0")
    back, original = (TrainingTensors(folder / "model_and_optim") for folder in (
        tmp_path / "step0", cases / "std" / "checkpoint"))
    table = back.read("model.embeddings.weight")
    assert report["added_rows"] == 38 and not table[90:].any()
    assert torch.equal(table[:90], original.read("model.embeddings.weight")[:90])
    assert compare(tmp_path / "step0", released).difference < 5e-6


def test_the_trained_balance_weight_is_written_unless_the_published_one_is_asked_for(cases, tmp_path):
    training = checkpoint_of(cases, "emo")
    to_hf(training, tmp_path / "ours", HfOptions())
    to_hf(training, tmp_path / "theirs", HfOptions(published_config=True))
    coefficients = [json.loads((tmp_path / name / "config.json").read_text())["router_aux_loss_coef"]
                    for name in ("ours", "theirs")]
    assert coefficients == [0.1, 0.01]


def test_comparing_notices_one_wrong_expert(cases, tmp_path):
    """The check itself must be able to fail."""
    from safetensors.torch import save_file

    to_hf(checkpoint_of(cases, "emo"), tmp_path / "out")
    weights = load_file(tmp_path / "out" / "model.safetensors")
    name = "model.layers.1.mlp.experts.15.down_proj.weight"  # the shared one, which every token uses
    save_file({**weights, name: weights[name].flip(0).contiguous()}, tmp_path / "out" / "model.safetensors")
    assert not compare(checkpoint_of(cases, "emo"), tmp_path / "out").holds
