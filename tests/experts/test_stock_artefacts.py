"""Pruned checkpoints in the hands of stock transformers and stock lm-eval, batched and with attention masks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from test_families import KEPT, build, keep_set
from transformers import AutoModelForCausalLM, AutoTokenizer
from word_tokenizer import add_tokenizer

from emo_select.experts.keepset import KeepSet
from emo_select.experts.prune import prune_checkpoint
from emo_select.models import register

GOLDEN = Path(__file__).parents[1] / "golden"
FAMILIES = ("olmoe", "flex_olmo", "mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss")


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The pruned checkpoint of a family, with a tokenizer that pads on the left."""
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            source, made[family] = folder / "source", folder / "pruned"
            if family == "emo":
                register()
                shutil.copytree(GOLDEN / "models" / "emo_shared1", source)
                kept = KeepSet(experts=((0, 5, 9, 20, 31),) * 4, method="random", keep_k=5, num_shared=1)
            else:
                build(family).save_pretrained(source)
                kept = keep_set(json.loads((source / "config.json").read_text()), KEPT)
            add_tokenizer(source, 60)
            prune_checkpoint(source, kept, made[family])
        return made[family]

    return get


@pytest.mark.parametrize("family", [*FAMILIES, "emo"])
def test_batched_generation_with_a_mask_equals_one_by_one(family: str, pruned: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(pruned(family), dtype=torch.float32).eval()
    rows = [[5, 9, 7, 30, 12, 8], [17, 6, 11]]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    together = model.generate(ids, attention_mask=mask, **options)[:, width:]
    for row, found in zip(rows, together, strict=True):
        alone = model.generate(torch.tensor([row]), attention_mask=torch.ones(1, len(row)).long(), **options)
        assert found.tolist() == alone[0, len(row):].tolist()


@pytest.mark.parametrize("family", [*FAMILIES, "emo"])
def test_stock_lm_eval_in_batches_of_two_gives_the_same_as_one_by_one(family: str, pruned: Any) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    folder = str(pruned(family))
    scored = [("w5 w9 w7", " w8 w3"), ("w4", " w9"), ("w1 w2 w3 w4 w6", " w7 w7 w5")]
    found: list[list[Any]] = []
    for size in (2, 1):
        lm = HFLM(pretrained=folder, tokenizer=AutoTokenizer.from_pretrained(folder, eos_token="w59"), device="cpu",
                  batch_size=size, dtype="float32", max_length=48)
        requests = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(scored)]
        asked = [Instance("generate_until", {}, (context, {"until": ["w59"], "max_gen_toks": 4}), number)
                 for number, (context, _) in enumerate(scored)]
        found.append([*(total for total, _ in lm.loglikelihood(requests, disable_tqdm=True)),
                      *lm.generate_until(asked, disable_tqdm=True)])
    assert found[0][:3] == pytest.approx(found[1][:3], abs=1e-4) and found[0][3:] == found[1][3:]


@pytest.mark.parametrize("asks", [False, True])
def test_what_a_model_returns_stays_its_sources_choice(asks: bool, tmp_path: Path) -> None:
    build("olmoe", output_router_logits=asks).save_pretrained(tmp_path / "source")
    config = json.loads((tmp_path / "source" / "config.json").read_text())
    prune_checkpoint(tmp_path / "source", keep_set(config, KEPT), tmp_path / "pruned")
    kept = json.loads((tmp_path / "pruned" / "config.json").read_text())
    assert kept.get("output_router_logits", "absent") == config.get("output_router_logits", "absent")
