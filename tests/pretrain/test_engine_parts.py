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


@pytest.fixture
def router():
    """A router of 5 experts, the last shared, and what it is given for 2 rows of 6 tokens in 3 documents."""
    from emo_select.pretrain.engine.router import EmoRouterConfig

    def build(**changes):
        torch.manual_seed(0)
        made = EmoRouterConfig(top_k=3, num_shared_experts=1, min_document_expert_pool=2,
                               max_document_expert_pool=2, **changes).build(
            8, 5, lb_loss_weight=0.1, z_loss_weight=0.01)
        torch.nn.init.normal_(made.weight)
        made.documents, made.sizes = torch.tensor([0] * 6 + [1] * 2 + [2] * 4), torch.tensor([2, 2, 2])
        return made

    return build


def test_unmasked_losses_do_not_see_the_pool(router):
    x = torch.randn(2, 6, 8)
    losses = {}
    for name, changes in {"masked": {}, "balance": {"unmasked_balance": True}, "z": {"unmasked_z": True}}.items():
        made = router(**changes)
        made(x, loss_div_factor=torch.tensor(12.0))
        losses[name] = (float(made.load_balancing_loss), float(made.z_loss))
    logits = router().get_expert_logits(x).flatten(0, 1)[:, :4]
    assert losses["z"][1] == pytest.approx(float(logits.logsumexp(-1).square().mean()), rel=1e-5)
    assert losses["balance"][1] == losses["masked"][1] < losses["z"][1]
    assert losses["z"][0] == losses["masked"][0] != losses["balance"][0]


def test_documents_stay_in_their_pools_and_evaluation_adds_no_loss(router):
    made = router()
    made.eval()
    weights, experts, counts, losses = made(torch.randn(2, 6, 8))
    assert losses is None and counts.sum() == 36
    assert (experts[..., 2] == 4).all() and (weights[..., 2] == 1).all()
    for document in range(3):
        assert len(experts.view(12, 3)[made.documents == document, :2].unique()) == 2


def test_pools_below_the_top_k_are_refused(router):
    from emo_select.errors import SpecError
    from emo_select.pretrain.engine.router import EmoRouterConfig

    with pytest.raises(SpecError, match="at least the 3 routed experts"):
        EmoRouterConfig(top_k=4, num_shared_experts=1, min_document_expert_pool=2,
                        max_document_expert_pool=4).build(8, 5)


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
