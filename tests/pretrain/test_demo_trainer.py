"""Training: the same after a kill, the same twice, published whole, and described by a strict configuration."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from emo_select import storage
from emo_select.demo import DEMO_MODELS, demo_config
from emo_select.demo.domains import ANSWERS, DOMAINS, answer
from emo_select.demo.tokenizer import build_tokenizer
from emo_select.errors import NumericError, SpecError
from emo_select.models import load_model, load_tokenizer
from emo_select.pretrain import PretrainConfig, pretrain, read_config
from emo_select.pretrain.demo.documents import Documents, step_generator
from emo_select.pretrain.demo.trainer import Trainer, learning_rate

TINY = {
    "name": "tiny", "seed": 3, "dtype": "bfloat16", "save_every": 2,
    "model": {"hidden_size": 8, "intermediate_size": 4, "num_hidden_layers": 1, "num_attention_heads": 2,
              "num_experts": 5, "num_shared_experts": 1, "num_experts_per_tok": 3, "initializer_range": 0.1},
    "objective": {"pool": {"smallest": 2, "largest": 4}, "balance_weight": 0.1, "z_weight": 0.001},
    "data": {"per_step": 4, "facts": 2},
    "optimizer": {"steps": 6, "learning_rate": 0.01, "warmup_steps": 2, "final_fraction": 0.1, "beta2": 0.95,
                  "weight_decay": 0.0, "clip": 1.0},
}


def tiny(**changes) -> PretrainConfig:
    return PretrainConfig.model_validate(TINY | changes)


def changed(path: str, value: object) -> dict:
    """A copy of TINY with the entry at a dotted path replaced."""
    copy = json.loads(json.dumps(TINY))
    *parents, last = path.split(".")
    inner = copy
    for parent in parents:
        inner = inner[parent]
    inner[last] = value
    return copy


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "model"
    pretrain(tiny(), folder)
    return folder


# ---- what comes out


def test_the_checkpoint_loads_strictly_with_its_tokenizer(undisturbed):
    model, tokenizer = load_model(str(undisturbed)), load_tokenizer(str(undisturbed))
    assert model.config.model_type == "emo" and model.config.eos_token_id == tokenizer.eos_token_id
    assert {tensor.dtype for tensor in load_file(undisturbed / "model.safetensors").values()} == {torch.bfloat16}
    assert "model.layers.0.mlp.experts.4.down_proj.weight" in load_file(undisturbed / "model.safetensors")


def test_the_record_has_config_curve_and_no_state_is_left(undisturbed):
    record = storage.read_json(undisturbed / "pretraining.json")
    assert PretrainConfig.model_validate(record["config"]) == tiny()
    assert record["steps"] == 6
    assert sorted(path.name for path in undisturbed.parent.iterdir() if ".lock" not in path.name) == ["model"]
    assert not (undisturbed / "state.safetensors").exists()


def test_twice_is_the_same_and_another_seed_is_not(undisturbed, tmp_path):
    for seed in (3, 4):
        pretrain(tiny(seed=seed), tmp_path / str(seed))
    assert (tmp_path / "3/model.safetensors").read_bytes() == (undisturbed / "model.safetensors").read_bytes()
    assert (tmp_path / "4/model.safetensors").read_bytes() != (undisturbed / "model.safetensors").read_bytes()


@pytest.mark.parametrize("step", [1, 2, 3, 5])
def test_going_on_after_an_interruption_gives_the_same_bits(undisturbed, tmp_path, monkeypatch, step):
    advance = Trainer.advance

    def until_step(self):
        if self.step == step:
            raise KeyboardInterrupt
        return advance(self)

    monkeypatch.setattr(Trainer, "advance", until_step)
    with pytest.raises(KeyboardInterrupt):
        pretrain(tiny(), tmp_path / "model")
    assert not (tmp_path / "model").exists()
    monkeypatch.undo()
    pretrain(tiny(), tmp_path / "model")
    assert (tmp_path / "model/model.safetensors").read_bytes() == (undisturbed / "model.safetensors").read_bytes()


KILLED = """
import json, os, signal, sys, torch
from pathlib import Path
from emo_select.pretrain import PretrainConfig, pretrain
from emo_select.pretrain.demo.trainer import Trainer
torch.set_num_threads(1)
advance = Trainer.advance
def dying(self):
    if self.step == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return advance(self)
Trainer.advance = dying
pretrain(PretrainConfig.model_validate(json.loads(sys.argv[1])), Path(sys.argv[2]))
"""


def test_kill_minus_nine_costs_only_the_steps_since_the_last_state(undisturbed, tmp_path):
    command = [sys.executable, "-c", KILLED, json.dumps(TINY), str(tmp_path / "model")]
    died = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False, capture_output=True)
    assert died.returncode == -signal.SIGKILL, died.stderr
    assert not (tmp_path / "model").exists()
    trainer = Trainer(tiny())
    trainer.restore(storage.partial_directory(tmp_path / "model") / "state.safetensors")
    assert trainer.step == 4
    pretrain(tiny(), tmp_path / "model")
    assert (tmp_path / "model/model.safetensors").read_bytes() == (undisturbed / "model.safetensors").read_bytes()


def test_another_configuration_starts_anew(undisturbed, tmp_path, monkeypatch):
    advance = Trainer.advance
    monkeypatch.setattr(Trainer, "advance", lambda self: advance(self) if self.step < 4 else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pretrain(tiny(seed=9), tmp_path / "model")
    monkeypatch.undo()
    pretrain(tiny(), tmp_path / "model")
    assert (tmp_path / "model/model.safetensors").read_bytes() == (undisturbed / "model.safetensors").read_bytes()


def test_a_finished_run_is_not_repeated(undisturbed, monkeypatch):
    monkeypatch.setattr(Trainer, "advance", lambda self: 1 / 0)
    assert pretrain(tiny(), undisturbed) == storage.read_json(undisturbed / "pretraining.json")


def test_a_folder_with_other_content_is_left_alone(undisturbed, tmp_path):
    (tmp_path / "thesis.tex").touch()
    for folder in (tmp_path, undisturbed, tmp_path / "thesis.tex"):
        with pytest.raises(SpecError, match="another --output-dir"):
            pretrain(tiny(seed=9), folder)
    assert (tmp_path / "thesis.tex").exists() and (undisturbed / "model.safetensors").exists()


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    trainer = Trainer(tiny())
    with torch.no_grad():
        trainer.model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(NumericError, match="step 1"):
        trainer.advance()


def test_training_learns():
    trainer = Trainer(tiny(optimizer=TINY["optimizer"] | {"steps": 60, "learning_rate": 0.03}))
    first = float(trainer.advance().cross_entropy)
    for _ in range(59):
        last = float(trainer.advance().cross_entropy)
    assert last < 0.8 * first


# ---- rates and documents


def test_the_rate_rises_and_falls():
    optimizer = tiny().optimizer
    rates = [learning_rate(step, optimizer) for step in range(1, 7)]
    assert rates[:2] == pytest.approx([0.005, 0.01])
    assert rates == [rates[0], *sorted(rates[1:], reverse=True)]
    assert rates[-1] == pytest.approx(0.001)


def test_documents_state_true_facts_of_one_domain():
    tokenizer = build_tokenizer()
    batch = Documents(tokenizer, seed=0, per_step=8, facts=3).batch(5)
    for row in batch.input_ids.tolist():
        facts = tokenizer.decode(row[:-1], skip_special_tokens=False).split("\n\n")
        parsed = [fact.replace(" =", "").replace(":", "").split() for fact in facts]
        assert len(parsed) == 3 and len({domain for domain, *_ in parsed}) == 1 and parsed[0][0] in DOMAINS
        assert all(answer(domain, colour, thing) == said for domain, colour, thing, said in parsed)
        assert row[-1] == tokenizer.token_to_id("<|endoftext|>")


def test_labels_are_the_answers_and_the_end():
    tokenizer = build_tokenizer()
    batch = Documents(tokenizer, seed=0, per_step=2, facts=3).batch(1)
    trained = batch.labels[0][batch.labels[0] != -100].tolist()
    words = [tokenizer.decode([token], skip_special_tokens=False).strip() for token in trained]
    assert len(words) == 4 and set(words[:3]) <= set(ANSWERS) and words[3] == "<|endoftext|>"


def test_a_batch_depends_on_seed_and_step_alone():
    first, second = (Documents(build_tokenizer(), seed=0, per_step=4, facts=2) for _ in range(2))
    first.batch(1)
    assert torch.equal(first.batch(2).input_ids, second.batch(2).input_ids)
    assert not torch.equal(first.batch(2).input_ids, first.batch(3).input_ids)


def test_streams_of_a_step_are_independent():
    draws = [torch.rand(4, generator=step_generator(0, 7, stream)) for stream in range(2)]
    assert not torch.equal(*draws)


# ---- configuration


@pytest.mark.parametrize("name", DEMO_MODELS)
def test_shipped_configurations_are_valid(name):
    assert read_config(demo_config(name)).name == name


def test_the_shipped_pair_differs_in_the_pool_alone():
    emo, standard = (read_config(demo_config(name)).model_dump() for name in DEMO_MODELS)
    assert emo["objective"].pop("pool") and standard["objective"].pop("pool") is None
    assert {**emo, "name": ""} == {**standard, "name": ""}


@pytest.mark.parametrize(("path", "value", "told"), [
    ("learnig_rate", 1, "learnig_rate"),
    ("optimizer.steps", "many", "optimizer.steps"),
    ("optimizer.steps", 0, "optimizer.steps"),
    ("model.num_experts_per_tok", 1, "num_shared_experts"),
    ("model.num_attention_heads", 3, "attention heads"),
    ("objective.pool", {"smallest": 1, "largest": 4}, "pool sizes"),
    ("objective.pool", {"smallest": 2, "largest": 5}, "pool sizes"),
    ("name", "a/b", "name"),
])
def test_a_wrong_entry_is_named(tmp_path, path, value, told):
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(changed(path, value)))
    with pytest.raises(SpecError, match=told):
        read_config(tmp_path / "c.yaml")


@pytest.mark.parametrize("text", ["a: [", "- 1"])
def test_files_that_are_no_configuration_are_refused(tmp_path, text):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(SpecError, match=r"c\.yaml"):
        read_config(tmp_path / "c.yaml")
    with pytest.raises(SpecError, match="does not exist"):
        read_config(tmp_path / "none.yaml")
