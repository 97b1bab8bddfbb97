"""Layouts that the reference data lacks, and both programs that read what is written: the command and the engine."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from emo_select.checkpoint import open_checkpoint
from emo_select.cli.app import app
from emo_select.convert import CoreOptions, HfOptions, to_hf, to_olmo_core
from emo_select.convert.check import compare, released_logits, training_logits
from emo_select.convert.dcp import TrainingTensors
from emo_select.convert.dcp_write import assign_parts, write_parts
from emo_select.convert.experiment import Pools, read_experiment
from emo_select.convert.layout import groups
from emo_select.models import EmoConfig, EmoForCausalLM

IDS = torch.tensor([[3, 17, 5, 29, 8, 11, 2, 36], [9, 4, 30, 7, 22, 13, 6, 15]])


def released(folder, **changes):
    """A random EMO with grouped-query attention, saved as a released checkpoint."""
    torch.manual_seed(0)
    config = EmoConfig(**{
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 3, "pad_token_id": 0,
        "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 8, "num_experts_per_tok": 3,
        "num_shared_experts": 1, "eos_token_id": 1, "initializer_range": 0.2, **changes})
    EmoForCausalLM(config).save_pretrained(folder)
    return folder


PER_LAYER = {"num_experts_per_layer": [0, 8, 6], "num_shared_experts_per_layer": [0, 1, 1],
             "dense_intermediate_size": 24, "dense_mlp_bias": True}


@pytest.mark.parametrize("changes", [{}, PER_LAYER, {"num_shared_experts": 0, "num_experts_per_tok": 2}],
                         ids=["uniform", "per layer", "none shared"])
def test_released_to_training_and_back_is_the_same_checkpoint(tmp_path, changes):
    source = released(tmp_path / "first", **changes)
    to_olmo_core(str(source), tmp_path / "step0", CoreOptions(multiple=1))
    to_hf(tmp_path / "step0", tmp_path / "second")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "second"))
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("first", "second")]
    for key in ("num_experts_per_layer", "num_shared_experts", "num_key_value_heads", "dense_intermediate_size",
                "dense_mlp_bias", "num_experts_per_tok", "vocab_size"):
        assert configs[0][key] == configs[1][key], key
    assert compare(tmp_path / "step0", source).holds


def test_the_class_that_stores_transposed_experts_is_converted(tmp_path):
    """The trainer's other MoE class has w1 and w3 as (experts · hidden, width)."""
    source = released(tmp_path / "hf")
    to_olmo_core(str(source), tmp_path / "step0")
    config = json.loads((tmp_path / "step0" / "config.json").read_text())
    config["model"]["block"]["feed_forward_moe"]["name"] = "default"
    (tmp_path / "step0" / "config.json").write_text(json.dumps(config))
    model, stored = read_experiment(tmp_path / "step0"), TrainingTensors(tmp_path / "step0" / "model_and_optim")
    values = {}
    for group in groups(model):
        value = stored.read(group.stored)
        if group.training.endswith(("w1", "w3")):
            value = value.view(8, 16, 32).transpose(1, 2).reshape(group.shape)
        values[group.stored] = value
    write_parts(tmp_path / "new", assign_parts(groups(model), "float32"), "float32",
                lambda group: values[group.stored], lambda group: None)
    (tmp_path / "step0" / "model_and_optim").rename(tmp_path / "old")
    (tmp_path / "new").rename(tmp_path / "step0" / "model_and_optim")
    to_hf(tmp_path / "step0", tmp_path / "back")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("hf", "back"))
    assert [name for name in before if not torch.equal(before[name], after[name][:len(before[name])])] == []
    assert compare(tmp_path / "step0", tmp_path / "back").holds


def test_an_always_active_expert_is_exported(cases, tmp_path):
    import shutil

    step = tmp_path / "step"
    shutil.copytree(cases / "std_no_shared" / "checkpoint", step)
    config = json.loads((step / "config.json").read_text())
    config["model"]["block"]["feed_forward_moe"]["router"]["always_active_experts"] = [5, 2]
    (step / "config.json").chmod(0o644)
    (step / "config.json").write_text(json.dumps(config))
    to_hf(step, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["always_active_experts"] == [5, 2]
    assert compare(step, tmp_path / "out").holds


def test_the_layerwise_logits_are_those_of_the_whole_model(tmp_path):
    source = released(tmp_path / "hf", **PER_LAYER)
    with torch.inference_mode(), open_checkpoint(source) as checkpoint:
        ours = released_logits(checkpoint, IDS)
        whole = EmoForCausalLM.from_pretrained(source, attn_implementation="eager")(IDS).logits
    torch.testing.assert_close(ours, whole, rtol=0, atol=2e-6)


@pytest.mark.parametrize("pools", [None, Pools(4, 7, 5)], ids=["standard", "emo"])
def test_the_engine_with_the_router_of_this_package_reads_it(tmp_path, pools):
    """The router with shared experts that config.json names is built, loads every weight, and computes the same."""
    pytest.importorskip("olmo_core")
    pytest.importorskip("emo_select.pretrain.engine.router")
    from olmo_core.distributed.checkpoint import load_model_and_optim_state
    from olmo_core.nn.transformer import TransformerConfig

    from emo_select.pretrain.engine.router import EmoRouterConfig

    source = released(tmp_path / "hf")
    to_olmo_core(str(source), tmp_path / "step0", CoreOptions(pools=pools))
    config = TransformerConfig.from_dict(json.loads((tmp_path / "step0" / "config.json").read_text())["model"])
    router = config.block.feed_forward_moe.router
    assert isinstance(router, EmoRouterConfig)
    model = config.build(init_device="cpu")
    load_model_and_optim_state(tmp_path / "step0" / "model_and_optim", model)
    stored = TrainingTensors(tmp_path / "step0" / "model_and_optim")
    assert [name for name, value in model.state_dict().items() if not torch.equal(value, stored.read(f"model.{name}"))
            ] == []
    if pools is None:
        from emo_select.pretrain.engine import cpu

        cpu.prepare(model)
        with torch.inference_mode():
            logits = model.eval()(IDS)
            expected = training_logits(read_experiment(tmp_path / "step0"), stored, IDS)
        torch.testing.assert_close(logits, expected, rtol=0, atol=5e-6)


def run(*words):
    return CliRunner().invoke(app, ["convert", *map(str, words)])


def test_the_command_converts_checks_and_reports(cases, tmp_path):
    step = cases / "emo" / "checkpoint"
    planned = run(step, "--to", "hf", "--out", tmp_path / "out", "--dry-run", "--json")
    assert planned.exit_code == 0 and json.loads(planned.stdout)["written"] is False
    assert not (tmp_path / "out").exists()
    made = run(step, "--to", "hf", "--out", tmp_path / "out", "--check", "--json", "--cut-vocabulary")
    report = json.loads(made.stdout)
    assert made.exit_code == 0 and report["check"]["holds"] and report["check"]["difference"] < 5e-6
    assert (report["vocabulary"], report["dropped_rows"], report["experts"], report["shared"]) == (90, 38, 16, 1)
    back = run(tmp_path / "out", "--to", "olmo-core", "--out", tmp_path / "step0", "--pool", "4-15", "--check",
               "--json")
    assert back.exit_code == 0 and json.loads(back.stdout)["check"]["holds"]
    assert read_experiment(tmp_path / "step0").pools == Pools(4, 15, 9)
    for words, pools in (((), Pools(4, 16, 8)), (("--pool", "none"), None)):  # as trained, by conversion.json
        again = run(tmp_path / "out", "--to", "olmo-core", "--out", tmp_path / f"step{len(words)}1", *words)
        assert again.exit_code == 0 and read_experiment(tmp_path / f"step{len(words)}1").pools == pools


@pytest.mark.parametrize("words, message", [
    (["--to", "hf", "--pool", "8-128"], "--pool belongs to --to olmo-core"),
    (["--to", "olmo-core", "--cut-vocabulary"], "--cut-vocabulary belongs to --to hf"),
    (["--to", "olmo-core", "--pool", "many"], "nor a range"),
    (["--to", "hf", "--dtype", "int4"], "int4"),
])
def test_options_that_do_not_go_together_are_refused(cases, tmp_path, words, message):
    source = "hf" if "olmo-core" in words else "checkpoint"
    result = run(cases / "emo" / source, *words, "--out", tmp_path / "out")
    assert result.exit_code != 0 and message in str(result.exception)
    assert not (tmp_path / "out").exists()


def test_bfloat16_and_its_check(cases, tmp_path):
    to_hf(cases / "std" / "checkpoint", tmp_path / "out", HfOptions(dtype="bfloat16"))
    agreement = compare(cases / "std" / "checkpoint", tmp_path / "out", dtype="bfloat16")
    assert agreement.holds and agreement.difference > 1e-4
