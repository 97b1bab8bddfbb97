"""Packed micro-batches: the same losses and gradients as padded ones, and nothing seen across examples."""

import pytest
import torch
from finetune_cases import CPU, GOLDEN, golden_tokens, golden_training

from emo_select.finetune.batches import Packed, Padded
from emo_select.finetune.examples import IGNORED
from emo_select.finetune.run import finetune_tokens
from emo_select.models import load_model

CASES = ("dense", "moe_densefirst_k8", "moe_shared1_k8")


@pytest.mark.parametrize("case", CASES)
def test_training_is_the_same(case, tmp_path):
    """Some examples train every token: their first is a label to load balancing, but no other example predicts it."""
    reports = [
        finetune_tokens(
            GOLDEN / case / "model", golden_tokens(case), tmp_path / str(packing),
            golden_training(case, packing=packing, epochs=0.5), CPU, pad_token=1,
        )
        for packing in (False, True)
    ]  # fmt: skip
    for padded, packed in zip(*(report.history for report in reports), strict=True):
        assert packed["loss"] == pytest.approx(padded["loss"], abs=1e-4)
        assert packed["grad_norm"] == pytest.approx(padded["grad_norm"], rel=1e-3)
        assert packed.get("lb_loss") == pytest.approx(padded.get("lb_loss"), abs=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_examples_do_not_see_each_other(attention):
    tokens = golden_tokens("moe_shared1_k8")
    model = load_model(str(GOLDEN / "moe_shared1_k8" / "model"), attn_implementation=attention)
    rows = [tokens[index] for index in range(3)]
    batch = {key: value for key, value in Packed()(rows).items() if key in ("input_ids", "position_ids")}
    together = model(**batch, use_cache=False).logits[0]
    alone = [model(torch.tensor([row["input_ids"]]), use_cache=False).logits[0] for row in rows]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-4, rtol=0)


def test_shapes_and_labels():
    rows = [{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}, {"input_ids": [8, 9], "labels": [IGNORED, 9]}]
    padded, packed = Padded(pad_token=1)(rows), Packed()(rows)
    assert padded["input_ids"].tolist() == [[5, 6, 7, 1, 1, 1, 1, 1], [8, 9, 1, 1, 1, 1, 1, 1]]
    assert padded["attention_mask"].sum(dim=1).tolist() == [3, 2]
    assert (padded["labels"] != IGNORED).sum() == (packed["labels"] != IGNORED).sum() == 4
    assert packed["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert packed["logits_to_keep"].tolist() == [0, 1, 3] and packed["shift_labels"].tolist() == [[6, 7, 9]]
    assert padded["logits_to_keep"].tolist() == [0, 1] and padded["shift_labels"].tolist() == [[6, 7], [9, IGNORED]]
