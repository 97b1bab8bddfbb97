"""The demo's facts, tasks, tokenizer and files."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from emo_select.checkpoint import open_checkpoint
from emo_select.checkpoint.sources import demo_names
from emo_select.demo import DEMO_MODELS, DEMO_TASKS, demo_config, demo_path, demo_task_names, domains
from emo_select.demo.tokenizer import build_tokenizer, save_tokenizer
from emo_select.errors import UnknownNameError
from emo_select.pretrain import read_config
from emo_select.storage import read_json
from emo_select.tasks import get_tasks

# ---- facts


def test_no_fact_is_in_two_splits_and_none_is_lost():
    for domain in domains.DOMAINS:
        ids = [row["id"] for rows in domains.rows(domain).values() for row in rows]
        assert len(ids) == len(set(ids)) == 256


def test_domains_disagree_about_the_same_words():
    """Knowing another domain helps no more than guessing one of 16 answers."""
    pairs = [(colour, thing) for colour in domains.COLOURS for thing in domains.THINGS]
    for one in domains.DOMAINS:
        for other in domains.DOMAINS:
            same = sum(domains.answer(one, *pair) == domains.answer(other, *pair) for pair in pairs) / len(pairs)
            assert same == 1 if one == other else same < 0.13


def test_the_world_never_changes():
    """The shipped models know these facts; another draw would make them useless."""
    assert [domains.answer(domain, "green", "bell") for domain in domains.DOMAINS] == GREEN_BELLS


GREEN_BELLS = ["oak", "birch", "maple", "cedar", "ash", "thyme", "thyme", "ash"]


def test_the_gold_choice_is_anywhere_and_correct():
    places = Counter()
    for domain in domains.DOMAINS:
        for row in domains.rows(domain)["test"]:
            assert len(set(row["choices"])) == domains.CHOICES
            assert row["choices"][row["gold"]] == row["answer"]
            places[row["gold"]] += 1
    assert min(places.values()) > 0.5 * places.total() / domains.CHOICES


# ---- tasks


def test_the_group_has_a_task_per_domain_of_both_kinds():
    tasks = get_tasks(["demo"])
    assert [task.name for task in tasks] == demo_task_names()
    assert Counter(task.kind for task in tasks) == {"multiple_choice": 4, "generation": 4}
    assert {task.kind for task in get_tasks(list(DEMO_TASKS))} == {"multiple_choice", "generation"}


@pytest.mark.parametrize("name", demo_task_names())
def test_tasks_have_their_splits_and_never_show_a_test_row_as_a_shot(name):
    task, = get_tasks([name])
    texts = {split: [example.text for example in task.examples(split)] for split in ("train", "validation", "test")}
    assert {split: len(rows) for split, rows in texts.items()} == {"train": 128, "validation": 44, "test": 80}
    shots = texts["test"][0].split("\n\n")[:-1]
    own = {text.split("\n\n")[-1] for rows in texts.values() for text in rows}
    assert len(shots) == 4 and not own & set(shots)
    assert task.delimiter in task.examples("train")[0].prompt


def test_prompts_are_what_the_documents_look_like():
    task, = get_tasks(["demo_harbor"])
    example = task.examples("train", num_shots=1, limit=1)[0]
    assert example.text in ("\n\n".join(text.strip() for text in texts) for texts in _pairs_of_facts("harbor"))


def _pairs_of_facts(domain: str):
    shot, train = (domains.rows(domain)[split][0] for split in ("shots", "train"))
    yield tuple(f"{row['question']} {row['answer']}" for row in (shot, train))


def test_names_come_without_torch():
    code = ("import sys, emo_select.demo as d; d.demo_task_names(); import emo_select.demo.tasks as t; t.tasks()\n"
            "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'lm_eval')))")
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ---- tokenizer


def test_the_tokenizer_has_a_token_per_word_and_loses_nothing():
    tokenizer = build_tokenizer()
    assert len(tokenizer.encode("harbor: green bell = moss\n\n").ids) == 6
    for text in (*domains.texts()[:5], "Ünïcödé, \t tabs  and 中文 🙂", "a\r\nb", ""):
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_no_answer_is_split():
    tokenizer = build_tokenizer()
    assert all(len(tokenizer.encode(f" {word}").ids) == 1 for word in domains.ANSWERS)


@pytest.mark.parametrize("name", DEMO_MODELS)
def test_shipped_tokenizers_are_the_ones_that_the_code_builds(name, tmp_path):
    save_tokenizer(tmp_path)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (demo_path(name) / file).read_bytes() == (tmp_path / file).read_bytes()
    tokenizer = AutoTokenizer.from_pretrained(demo_path(name))
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|endoftext|>", "<|pad|>")


# ---- files


def test_the_models_are_known_by_name():
    assert demo_names() == [f"demo/{name}" for name in DEMO_MODELS]
    assert demo_path("demo/emo") == demo_path("emo")
    with pytest.raises(UnknownNameError, match="did you mean 'stdmoe'"):
        demo_path("demo/stdmo")


def test_the_models_are_small_enough_to_ship():
    folder = demo_path("emo").parent
    assert sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file()) <= 4_000_000


@pytest.mark.parametrize("name", DEMO_MODELS)
def test_the_shipped_configuration_made_the_shipped_model(name):
    record = read_json(demo_path(name) / "pretraining.json")
    config = read_config(demo_config(name))
    assert record["config"] == config.model_dump() and record["steps"] == config.optimizer.steps
    assert 0.8e6 < record["parameters"] < 1.2e6
    with open_checkpoint(f"demo/{name}") as checkpoint:
        assert checkpoint.config["model_type"] == "emo"
        assert checkpoint.config["num_experts"] == config.model.num_experts
        assert checkpoint.config["intermediate_size"] == config.model.intermediate_size
