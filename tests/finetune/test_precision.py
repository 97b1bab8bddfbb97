"""bfloat16 products from float32 master weights, and bfloat16 weights alone, against the float32 run."""

import pytest
import torch
from finetune_cases import CPU, GOLDEN, golden_tokens, golden_training

from emo_select.finetune.autocast import cast_experts
from emo_select.finetune.run import finetune_tokens
from emo_select.models import load_model

CASE = "moe_shared1_k8"


@pytest.mark.parametrize("masters", [True, False])
def test_bfloat16_stays_close_to_float32(masters, tmp_path):
    reports = [
        finetune_tokens(
            GOLDEN / CASE / "model", golden_tokens(CASE), tmp_path / dtype, golden_training(CASE, epochs=1),
            CPU.model_copy(update={"dtype": dtype, "master_weights": masters}), pad_token=1,
        )
        for dtype in ("float32", "bfloat16")
    ]  # fmt: skip
    for exact, rounded in zip(*(report.history for report in reports), strict=True):
        assert rounded["loss"] == pytest.approx(exact["loss"], rel=0.02)
        assert rounded["loss"] != exact["loss"]


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
