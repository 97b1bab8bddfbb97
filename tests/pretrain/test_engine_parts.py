"""The CPU stand-ins and the grouped product against what they stand for, written out."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("olmo_core", reason="needs the extra pretrain: pip install emo-select[pretrain]")

from torch.nn import functional as F

from emo_select.pretrain.engine import cpu
from emo_select.pretrain.engine.grouped import grouped_product

TOKENS, TOP_K, WIDTH, EXPERTS = 6, 2, 4, 3


@pytest.fixture
def choices():
    """(indices, bins): the T·K choices sorted by expert, as the engine sorts them."""
    torch.manual_seed(0)
    experts = torch.randint(0, EXPERTS, (TOKENS * TOP_K,))
    indices = experts.argsort(stable=True)
    return indices.int(), torch.bincount(experts, minlength=EXPERTS).cumsum(0).int()


def test_gather_brings_each_choice_its_token(choices):
    indices, bins = choices
    x = torch.randn(TOKENS, WIDTH)
    rows = cpu.gather(x, indices, indices, None, bins, TOP_K)
    for row, choice in zip(rows, indices.tolist(), strict=True):
        assert torch.equal(row, x[choice // TOP_K])


def test_scatter_undoes_gather_and_weighs(choices):
    indices, bins = choices
    x, weights = torch.randn(TOKENS, WIDTH), torch.rand(TOKENS * TOP_K)
    rows = cpu.gather(x, indices, indices, None, bins, TOP_K)
    out = cpu.scatter(rows, indices, indices, weights, bins, TOP_K)
    assert torch.allclose(out, x * weights.view(TOKENS, TOP_K).sum(1, keepdim=True))


def test_the_gradient_of_the_weights_is_autograds(choices):
    indices, bins = choices
    rows, weights = torch.randn(TOKENS * TOP_K, WIDTH), torch.rand(TOKENS * TOP_K, requires_grad=True)
    grad = torch.randn(TOKENS, WIDTH)
    cpu.scatter(rows, indices, indices, weights, bins, TOP_K).backward(grad)
    ours = cpu.scatter_wgrad(rows, grad, indices, indices, bins, TOP_K)
    assert torch.allclose(ours, weights.grad, atol=1e-6)


def test_attention_stays_inside_documents():
    attention = cpu.DocumentAttention(head_dim=4, n_heads=2)
    q, k, v = torch.randn(3, 2, 6, 2, 4)
    bounds = torch.tensor([0, 2, 6, 7, 12])  # two rows of 6: documents of 2 and 4, of 1 and 5
    out = attention((q, k, v), cu_doc_lens=bounds)
    for row, start, end in ((0, 0, 2), (0, 2, 6), (1, 0, 1), (1, 1, 6)):
        part = [tensor[row:row + 1, start:end].transpose(1, 2) for tensor in (q, k, v)]
        alone = F.scaled_dot_product_attention(*part, is_causal=True).transpose(1, 2)
        assert torch.allclose(out[row:row + 1, start:end], alone, atol=1e-6)


@pytest.mark.parametrize("transposed", [False, True])
def test_the_grouped_product_multiplies_each_row_by_its_experts_matrix(transposed):
    sizes = torch.tensor([8, 0, 16])
    x = torch.randn(24, 16, dtype=torch.bfloat16)
    w = torch.randn(3, *((8, 16) if transposed else (16, 8)), dtype=torch.bfloat16)
    expected = torch.cat([part @ (matrix.T if transposed else matrix)
                          for part, matrix in zip(x.split(sizes.tolist()), w, strict=True)])
    assert torch.allclose(grouped_product(x, w, sizes, trans_b=transposed), expected, atol=0.1, rtol=0.02)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_model_trains_on_a_gpu_as_on_the_cpu(tmp_path):
    """A few steps of the golden run on a GPU: bf16 and Triton kernels stay near the fp32 losses."""
    from golden_runs import Recorder
    from test_golden_training import golden_run

    from emo_select.pretrain.engine.build import Machine, build_trainer

    run, recorder = golden_run("emo"), Recorder()
    machine = Machine(device=torch.device("cuda"), compile=False, save_async=False)
    trainer = build_trainer(run.recipe(), run.data(), tmp_path, machine=machine, draws=run.draws(), stop_at=5,
                            callbacks={"recorder": recorder})
    trainer.fit()
    for step in range(1, 6):
        assert recorder.steps[step]["train/CE loss"] == pytest.approx(run.told["steps"][str(step)]["ce_loss"], abs=0.05)
