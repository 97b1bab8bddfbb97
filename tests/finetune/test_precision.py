"""bfloat16 products from float32 master weights, and bfloat16 weights alone, against the float32 run."""

import pytest
import torch
from finetune_cases import CPU, GOLDEN, golden_tokens, golden_training

from emo_select.finetune.autocast import cast_experts
from emo_select.finetune.run import finetune_tokens
from emo_select.models import load_model

CASE = "moe_shared1_k8"


def train(out, **changes):
    execution = CPU.model_copy(update=changes)
    training = golden_training(CASE, epochs=0.5)
    return finetune_tokens(GOLDEN / CASE / "model", golden_tokens(CASE), out, training, execution, pad_token=1)


def test_bfloat16_stays_close_to_float32(tmp_path):
    exact = train(tmp_path / "exact")
    for masters in (True, False):
        rounded = train(tmp_path / str(masters), dtype="bfloat16", master_weights=masters)
        for ours, wanted in zip(rounded.history, exact.history, strict=True):
            assert ours["loss"] == pytest.approx(wanted["loss"], rel=0.02)
            assert ours["loss"] != wanted["loss"]


def test_experts_compute_in_the_autocast_dtype_and_their_weights_learn_in_float32():
    model = load_model(str(GOLDEN / CASE / "model"))
    experts = model.model.layers[0].mlp.experts
    cast_experts(model, "mlp.experts")
    seen = []
    experts.act_fn.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.tensor([golden_tokens(CASE)[0]["input_ids"]])).logits.float().sum().backward()
    assert set(seen) == {torch.bfloat16}
    assert experts.gate_up_proj.grad.dtype == experts.gate_up_proj.dtype == torch.float32
    assert experts.gate_up_proj.grad.abs().sum() > 0
