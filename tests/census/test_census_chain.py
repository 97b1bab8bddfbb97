"""What follows a first pruning, for every family: a second one, fewer experts than a token uses, training, merging.

`EMO_SELECT_CENSUS=1 make census` does it for all families; a few that differ most stand for them otherwise.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hooked import smaller
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from safetensors.torch import load_file
from test_census import FAMILIES, KEPT, load, logits
from tiny_models import EXPERTS, VOCABULARY, tiny_checkpoint
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from emo_select.checkpoint import open_checkpoint
from emo_select.errors import KeepKError
from emo_select.evaluate.engine import SharedPrefixLM
from emo_select.experts.keepset import KeepSet, num_groups, pruned_top_k
from emo_select.experts.prune import plan_prune, prune_checkpoint
from emo_select.finetune.examples import from_lists
from emo_select.finetune.merge import MergeOptions, merge_back
from emo_select.finetune.run import finetune_tokens
from emo_select.models import load_model
from emo_select.models.families import COUNT_KEYS, experts_per_layer, family_of, top_k
from emo_select.spec import Execution, Training

FEW = ["olmoe", "deepseek_v3", "nemotron_h", "gemma4", "longcat_flash", "dbrx", "ernie4_5_moe", "inkling2_text",
       "jamba"]
CHOSEN = FAMILIES if os.environ.get("EMO_SELECT_CENSUS") else FEW
NINE = (0, 1, 2, 4, 5, 6, 8, 9, 11)  # three of each group of four


@pytest.fixture(scope="session")
def chains(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the tiny checkpoints are."""
    return tmp_path_factory.mktemp("chains")


def keep_set(folder: Path, kept: tuple[int, ...]) -> KeepSet:
    counts = experts_per_layer(open_checkpoint(folder).config)
    return KeepSet(experts=tuple(kept if count else None for count in counts), method="random", keep_k=len(kept))


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("model_type", CHOSEN)
def test_pruning_twice_is_pruning_once(model_type: str, chains: Path, tmp_path: Path) -> None:
    _, folder = tiny_checkpoint(model_type, chains)
    prune_checkpoint(folder, keep_set(folder, NINE), tmp_path / "nine")
    again = tuple(NINE.index(expert) for expert in KEPT)
    prune_checkpoint(tmp_path / "nine", keep_set(tmp_path / "nine", again), tmp_path / "twice")
    prune_checkpoint(folder, keep_set(folder, KEPT), tmp_path / "once")
    twice, once = tensors(tmp_path / "twice"), tensors(tmp_path / "once")
    assert twice.keys() == once.keys() and all(torch.equal(twice[name], once[name]) for name in once)
    assert open_checkpoint(tmp_path / "twice").config == open_checkpoint(tmp_path / "once").config


@pytest.mark.parametrize("model_type", CHOSEN)
def test_fewer_experts_than_a_token_uses(model_type: str, chains: Path, tmp_path: Path) -> None:
    model, folder = tiny_checkpoint(model_type, chains)
    config, kept = open_checkpoint(folder).config, (3, 8)
    if num_groups(config) > 1 or top_k(config) < 3:
        if num_groups(config) > 1:
            with pytest.raises(KeepKError, match="groups"):
                prune_checkpoint(folder, keep_set(folder, kept), tmp_path / "two")
        return
    prune_checkpoint(folder, keep_set(folder, kept), tmp_path / "two")
    assert top_k(open_checkpoint(tmp_path / "two").config) == pruned_top_k(config, 2) == 2
    assert (logits(load(tmp_path / "two")) - logits(smaller(model, config, kept)[0])).abs().max() < 2e-5


@pytest.mark.parametrize("stale", COUNT_KEYS)
@pytest.mark.parametrize("model_type", CHOSEN)
def test_no_stale_twin_wins(model_type: str, stale: str, chains: Path, tmp_path: Path) -> None:
    _, folder = tiny_checkpoint(model_type, chains)
    checkpoint = open_checkpoint(folder)
    family = family_of(checkpoint.config)
    counted = checkpoint.config[family.section] if family.section else checkpoint.config
    counted.setdefault(stale, EXPERTS)
    plan = plan_prune(checkpoint, keep_set(folder, KEPT))
    (tmp_path / "config.json").write_text(json.dumps(plan.config))
    built = AutoConfig.from_pretrained(tmp_path)
    part = getattr(built, family.section) if family.section else built
    assert getattr(part, family.count_keys[0]) == len(KEPT)
    assert (plan.config[family.section] if family.section else plan.config)[stale] == len(KEPT)


@pytest.mark.parametrize("model_type", CHOSEN)
def test_trained_experts_go_back_to_their_places(model_type: str, chains: Path, tmp_path: Path) -> None:
    _, folder = tiny_checkpoint(model_type, chains)
    prune_checkpoint(folder, keep_set(folder, KEPT), tmp_path / "pruned")
    rows = [[3 + (7 * row + 5 * at) % 61 for at in range(8)] for row in range(4)]
    tokens = from_lists([{"input_ids": ids, "labels": [-100] * 4 + ids[-4:]} for ids in rows])
    training = Training(batch_size=4, learning_rate="1e-2", warmup=0, freeze="routed")
    execution = Execution(device="cpu", micro_batch_size=4, gradient_checkpointing=False)
    report = finetune_tokens(tmp_path / "pruned", tokens, tmp_path / "tuned", training, execution)
    assert len(report.history) == 1
    load(tmp_path / "tuned" / "checkpoint-1")  # every tensor is there, and no other
    before, after = tensors(tmp_path / "pruned"), tensors(tmp_path / "tuned" / "checkpoint-1")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    family = family_of(open_checkpoint(folder).config)
    assert changed and all(family.role(name).kind != "other" for name in changed)
    merge_back(tmp_path / "tuned" / "checkpoint-1", str(folder), tmp_path / "merged", MergeOptions(router=True))
    merged, full = tensors(tmp_path / "merged"), tensors(folder)
    assert merged.keys() == full.keys() and all(merged[name].shape == full[name].shape for name in full)
    prune_checkpoint(tmp_path / "merged", keep_set(folder, KEPT), tmp_path / "again")
    again = tensors(tmp_path / "again")
    assert [name for name in after if not torch.equal(again[name], after[name])] == []
    dropped = tuple(expert for expert in range(EXPERTS) if expert not in KEPT)
    prune_checkpoint(tmp_path / "merged", keep_set(folder, dropped), tmp_path / "others")
    prune_checkpoint(folder, keep_set(folder, dropped), tmp_path / "untouched")
    others, untouched = tensors(tmp_path / "others"), tensors(tmp_path / "untouched")
    tails = {name for name in others if family.role(name).rows.tail}  # what lies behind the experts is trained, too
    assert all(torch.equal(others[name], untouched[name]) for name in others.keys() - tails)


def words() -> PreTrainedTokenizerFast:
    """A tokenizer of numbered words."""
    vocabulary = {"<pad>": 0, "<bos>": 1, "<eos>": 2, **{f"w{index}": index for index in range(3, VOCABULARY)}}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", pad_token="<pad>")


@pytest.mark.parametrize("model_type", CHOSEN)
def test_evaluation_gives_the_numbers_of_the_harness(model_type: str, chains: Path, tmp_path: Path) -> None:
    _, folder = tiny_checkpoint(model_type, chains)
    prune_checkpoint(folder, keep_set(folder, KEPT), tmp_path / "pruned")
    words().save_pretrained(tmp_path / "pruned")
    texts = [("w3 w4 w5", f" w{10 + at} w7") for at in range(3)] + [("w9 w8", " w12"), ("w9 w8 w30 w31", " w12 w13")]
    requests = [Instance("loglikelihood", {}, text, at, ("made", at, 1)) for at, text in enumerate(texts)]
    options: dict[str, Any] = {"max_length": 40}
    ours = SharedPrefixLM(load_model(str(tmp_path / "pruned")), words(), token_budget=300, **options)
    stock = HFLM(pretrained=AutoModelForCausalLM.from_pretrained(tmp_path / "pruned", dtype=torch.float32),
                 tokenizer=words(), add_bos_token=False, batch_size=1, **options)
    found, expected = ours.loglikelihood(requests), stock.loglikelihood(requests)
    assert [score[0] for score in found] == pytest.approx([score[0] for score in expected], abs=5e-4)
