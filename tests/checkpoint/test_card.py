"""The card beside every model that we make: from the files, the same bytes each time, and never in the way."""

import json
from pathlib import Path

import pytest
import yaml

import emo_select
from emo_select.checkpoint import open_checkpoint
from emo_select.checkpoint.card import CARD, MARK, add_scores, front_matter, write_card
from emo_select.experts.keepset import KeepSet
from emo_select.experts.prune import prune_checkpoint
from emo_select.pipeline import Wanted, execute, expand, plan
from emo_select.spec import Execution, Training
from emo_select.tree import Tree

EMO = Path(emo_select.__file__).parent / "demo" / "models" / "emo"


@pytest.fixture
def pruned(tmp_path):
    experts = tuple((*range(7), 31) for _ in range(3))
    keep = KeepSet(experts=experts, method="layerwise", keep_k=8, num_shared=1, score="router_probability",
                   model="demo/emo", task="demo_railway | <b>", split="validation", num_examples=12, seed=3)
    prune_checkpoint("demo/emo", keep, tmp_path / "pruned")
    return tmp_path / "pruned"


def test_a_pruned_model_says_what_it_is(pruned):
    text = (pruned / CARD).read_text()
    head = front_matter(pruned / CARD)
    assert head["license"] == "apache-2.0" and head["tags"][-1] == "pruned"
    assert "base_model" not in head  # demo/emo is nowhere on the Hub
    assert "8 of 32, of them 1 shared" in text
    assert "greedy_layerwise" in text and "12 texts (seed 3) of its validation split" in text
    assert r"demo_railway \| &lt;b&gt;" in text and "<b>" not in text
    assert "import emo_select" in text and text.endswith("Not evaluated yet.\n")


def test_the_card_is_made_of_the_files_and_no_part_of_the_model(pruned):
    before, known = (pruned / CARD).read_bytes(), open_checkpoint(pruned).fingerprint
    write_card(pruned, EMO)
    assert (pruned / CARD).read_bytes() == before
    (pruned / CARD).unlink()
    assert open_checkpoint(pruned).fingerprint == known


def test_the_code_of_the_card_loads_the_model(pruned):
    code = (pruned / CARD).read_text().split("```python\n")[1].split("```")[0]
    found = {}
    exec(code.replace("path/to/this/folder", str(pruned)), found)
    assert found["model"].config.num_experts == 8
    assert found["tokenizer"].vocab_size > 0


def test_it_says_what_the_model_needs_without_us(pruned):
    assert "The folder brings no code" in (pruned / CARD).read_text()
    config = json.loads((pruned / "config.json").read_text())
    auto_map = {"AutoModelForCausalLM": "modeling_emo.EmoForCausalLM"}
    (pruned / "config.json").write_text(json.dumps(config | {"auto_map": auto_map}))
    (pruned / "modeling_emo.py").touch()
    write_card(pruned, EMO)
    assert "`trust_remote_code=True` runs" in (pruned / CARD).read_text()
    (pruned / "config.json").write_text(json.dumps({**config, "model_type": "olmoe"}))
    write_card(pruned, EMO)
    assert "Without emo-select" not in (pruned / CARD).read_text()


def test_licence_and_base_model_come_from_the_source(tmp_path, pruned):
    source = tmp_path / "models--allenai--Emo" / "snapshots" / "x"
    source.mkdir(parents=True)
    (source / CARD).write_text("---\nlicense: other\nlicense_name: odd\nlicense_link: x\n---\nHi")
    (pruned / "pruning_metadata.json").unlink()
    write_card(pruned, source, Training(epochs=2), 40)
    head = front_matter(pruned / CARD)
    assert (head["license_name"], head["base_model"], head["tags"][-1]) == ("odd", "allenai/Emo", "finetuned")
    assert "40 steps of 32 examples, 2 epochs in all, learning rate 5e-5" in (pruned / CARD).read_text()
    (source / CARD).write_text("---\n: [\n---\n")
    write_card(pruned, source)
    assert "names none" in (pruned / CARD).read_text()


def test_scores_are_added_and_what_a_person_wrote_stays(pruned, tmp_path):
    results = tmp_path / "results"
    results.mkdir()
    content = {"task_name": "demo", "metrics": {"primary_score": 0.5}, "standard_errors": {"primary_score": 0.05},
               "task_config": {"primary_metric": "acc_raw"}, "num_instances": 100}
    (results / "task-demo-metrics.json").write_text(json.dumps(content))
    card = pruned / CARD
    card.write_text(card.read_text().replace("## How to load", "My words.\n\n## How to load"))
    add_scores(pruned, results)
    text = card.read_text()
    assert "| demo | acc_raw | 0.5000 ± 0.0500 | 100 |" in text
    assert "My words." in text and "Not evaluated" not in text
    add_scores(pruned, results)
    assert card.read_text() == text
    card.write_text("another card\n\n## Scores\n\nmine\n")
    add_scores(pruned, results)
    assert card.read_text() == "another card\n\n## Scores\n\nmine\n"


def test_a_finished_run_has_cards_with_scores_and_stays_finished(tmp_path):
    settings = {"training": {"batch_size": 64}, "evaluation": {"limit": 5}}
    wanted = Wanted(["demo/emo"], ["demo_railway"], ["4"], ["random"], settings)
    [run] = expand(wanted, Tree(tmp_path), Execution(device="cpu"))
    execute(run, plan(run))
    last = run.paths.checkpoint_steps()[-1]
    tuned = run.paths.checkpoint(last)
    for folder, step in ((run.paths.selected_model, 0), (run.paths.checkpoint(0), 0), (tuned, last)):
        scored = json.loads(next(run.paths.result(step).glob("task-*-metrics.json")).read_text())
        assert f"{scored['metrics']['primary_score']:.4f} ± " in (folder / CARD).read_text()
    assert f"finetuned for {last} steps" in (run.paths.checkpoint(last) / CARD).read_text()
    head = yaml.safe_load((run.paths.checkpoint(last) / CARD).read_text().split("---")[1])
    assert head["license"] == "apache-2.0" and head["tags"][-1] == "finetuned"
    assert MARK in (run.paths.checkpoint(last) / CARD).read_text()
    assert {step.action for step in plan(run)} <= {"done", "skip"}
    assert MARK not in (EMO / CARD).read_text()
