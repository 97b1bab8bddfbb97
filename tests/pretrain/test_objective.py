"""The formulas against the published router's numbers, case by case, and property by property."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from emo_select.errors import SpecError
from emo_select.pretrain import objective
from emo_select.pretrain.objective import IGNORED, PoolSizes

CASES = sorted(path.name for path in (Path(__file__).parents[1] / "golden/pretraining/router").iterdir())
SEVERAL_RANKS = [name for name in CASES if "two_ranks" in name]
TOLERANCE = {"atol": 1e-6, "rtol": 1e-6}


class Case:
    """One golden router call on one rank, computed by our formulas."""

    def __init__(self, folder: Path, rank: int | None = None) -> None:
        self.told = json.loads((folder / "case.json").read_text())
        prefix = "" if rank is None else f"rank{rank}."
        tensors = load_file(folder / "tensors.safetensors")
        self.want = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        self.weight = self.want["router_weight"].clone().requires_grad_()
        self.hidden = self.want["hidden"].clone().requires_grad_()
        self.documents = objective.document_numbers(self.want["input_ids"], self.told["eos_token_id"])
        self.logits = self.hidden.flatten(0, 1) @ self.weight.T
        self.routed = self.told["E"] - self.told["shared"]
        self.allowed = self._allowed()
        self.routing = objective.route(self.logits, self.told["top_k"], self.told["shared"], self.allowed)

    def _allowed(self) -> Tensor | None:
        if self.told["kind"] != "emo":
            return None
        return objective.pool_of_tokens(self.logits[:, :self.routed], self.documents.flatten(), self.want["pool_sizes"])

    def losses(self, counts: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Balance, z, and both weighted, for counts and labels of the balance group."""
        per_token = self.told["top_k"] - self.told["shared"]
        balance = objective.balance_loss(
            self.routing.probability.mean(0), counts[:self.routed], per_token, labels)
        z = objective.router_z_loss(self.routing.logits, self.want["loss_div_factor"])
        return balance, z, self.told["lb_weight"] * balance + self.told["z_weight"] * z

    def check_losses(self, balance: Tensor, z: Tensor, total: Tensor) -> None:
        """Losses and all gradients of the published router."""
        torch.testing.assert_close(balance, self.want["lb_loss"], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(z, self.want["z_loss"], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(total, self.want["aux_loss"], rtol=1e-6, atol=1e-6)
        self._check_gradients(total, "_aux")
        self._check_gradients((self.shaped(self.routing.weights) * self.want["cotangent"]).sum() + total, "")

    def _check_gradients(self, loss: Tensor, name: str) -> None:
        weight, hidden = torch.autograd.grad(loss, (self.weight, self.hidden), retain_graph=True)
        torch.testing.assert_close(weight, self.want[f"grad_router_weight{name}"], **TOLERANCE)
        torch.testing.assert_close(hidden, self.want[f"grad_hidden{name}"], **TOLERANCE)

    def shaped(self, tensor: Tensor) -> Tensor:
        return tensor.view(self.told["B"], self.told["S"], -1)


@pytest.fixture(scope="module")
def folder(golden) -> Path:
    return golden / "pretraining/router"


def ranks_of(name: str) -> list[int | None]:
    return [0, 1] if name in SEVERAL_RANKS else [None]


@pytest.mark.parametrize("name", CASES)
def test_routing_is_the_published_one(folder, name):
    for rank in ranks_of(name):
        case = Case(folder / name, rank)
        want, routing = case.want, case.routing
        torch.testing.assert_close(case.shaped(case.logits), want["logits"], **TOLERANCE)
        torch.testing.assert_close(case.shaped(routing.probability), want["probabilities"], **TOLERANCE)
        torch.testing.assert_close(case.shaped(routing.weights), want["expert_weights"], **TOLERANCE)
        assert torch.equal(case.shaped(routing.experts), want["expert_indices"])
        assert torch.equal(routing.counts, want["tokens_per_expert"])


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("emo")])
def test_documents_and_pools_are_the_published_ones(folder, name):
    for rank in ranks_of(name):
        case = Case(folder / name, rank)
        want = case.want
        assert torch.equal(case.documents, want["document"])
        probability = torch.softmax(case.logits[:, :case.routed].detach(), -1)
        sums = objective.document_sums(probability, case.documents.flatten(), len(want["pool_sizes"]))
        torch.testing.assert_close(sums, want["document_probability_sums"], **TOLERANCE)
        assert torch.equal(objective.document_pools(sums, want["pool_sizes"]), want["pool_mask"])


@pytest.mark.parametrize("name", [name for name in CASES if name not in SEVERAL_RANKS and "eval" not in name])
def test_losses_and_gradients_are_the_published_ones(folder, name):
    case = Case(folder / name)
    case.check_losses(*case.losses(case.routing.counts, case.want["loss_div_factor"]))


@pytest.mark.parametrize("name", [name for name in CASES if "eval" in name])
def test_gradients_in_evaluation_are_the_published_ones(folder, name):
    case = Case(folder / name)
    case._check_gradients((case.shaped(case.routing.weights) * case.want["cotangent"]).sum(), "")


@pytest.mark.parametrize("name", SEVERAL_RANKS)
def test_global_balance_is_the_published_one(folder, name):
    cases = [Case(folder / name, rank) for rank in (0, 1)]
    counts = cases[0].routing.counts + cases[1].routing.counts
    labels = cases[0].want["loss_div_factor"] + cases[1].want["loss_div_factor"]
    for case in cases:
        case.check_losses(*case.losses(counts, labels))


@pytest.mark.parametrize("name", SEVERAL_RANKS)
def test_local_balance_is_the_published_one(folder, name):
    tensors = load_file(folder / name / "tensors.safetensors")
    for rank in (0, 1):
        case = Case(folder / name, rank)
        balance, _, total = case.losses(case.routing.counts, case.want["loss_div_factor"])
        torch.testing.assert_close(balance, tensors[f"local.rank{rank}.lb_loss"], **TOLERANCE)
        torch.testing.assert_close(total, tensors[f"local.rank{rank}.aux_loss"], **TOLERANCE)
        gradient, = torch.autograd.grad(total, case.weight)
        torch.testing.assert_close(gradient, tensors[f"local.rank{rank}.grad_router_weight_aux"], **TOLERANCE)


def test_rows_of_shared_experts_learn_nothing(folder):
    case = Case(folder / "emo_shared2")
    gradient, = torch.autograd.grad(case.losses(case.routing.counts, case.want["loss_div_factor"])[2], case.weight)
    assert (gradient[case.routed:] == 0).all() and (gradient[:case.routed] != 0).any()


# ---- documents


def test_an_eos_starts_the_next_document_unless_told_otherwise():
    ids = torch.tensor([[0, 7, 0, 8, 9, 0], [5, 0, 0, 6, 6, 6]])
    assert objective.document_numbers(ids, 0).tolist() == [[0, 0, 1, 1, 1, 2], [3, 4, 5, 5, 5, 5]]
    assert objective.document_numbers(ids, 0, after_eos=True).tolist() == [[0, 1, 1, 2, 2, 2], [3, 3, 4, 5, 5, 5]]
    assert objective.documents_per_row(objective.document_numbers(ids, 0)) == [3, 3]


def test_sums_are_per_document_and_leave_padding_out():
    probabilities = torch.rand(7, 4)
    documents = torch.tensor([1, 1, 0, -1, 0, 0, -1])
    sums = objective.document_sums(probabilities, documents, 2)
    assert torch.allclose(sums[1], probabilities[:2].sum(0))
    assert torch.allclose(sums[0], probabilities[[2, 4, 5]].sum(0))


# ---- pools


def test_pools_hold_the_likeliest_experts_and_grow_by_inclusion():
    sums = torch.rand(5, 9)
    smaller = torch.zeros(5, 9, dtype=torch.bool)
    for size in range(1, 10):
        pools = objective.document_pools(sums, torch.full((5,), size))
        assert (pools.sum(1) == size).all()
        assert (smaller <= pools).all()
        smaller = pools


def test_a_size_of_all_experts_or_more_masks_nothing():
    sums = torch.rand(3, 9)
    assert objective.document_pools(sums, torch.tensor([9, 10, 128])).all()


def test_equal_sums_take_the_lower_expert():
    assert objective.document_pools(torch.full((1, 6), 0.5), torch.tensor([2])).tolist() == [[True, True] + [False] * 4]


def test_pools_by_probability_hold_as_many_experts_as_it_takes():
    probability = torch.tensor([[0.5, 0.3, 0.1, 0.1], [0.9, 0.04, 0.03, 0.03]])
    documents = torch.tensor([0, 1])
    for top_p, wanted in ((0.6, [2, 1]), (0.85, [3, 1]), (0.97, [4, 3])):
        assert objective.sizes_by_probability(probability.log(), documents, top_p, 1, 4).tolist() == wanted
    assert objective.sizes_by_probability(probability.log(), documents, 0.97, 1, 2).tolist() == [2, 2]
    assert objective.sizes_by_probability(probability.log(), documents, 0.1, 2, 4).tolist() == [2, 2]


@pytest.mark.parametrize("sizes", [(2, 9), (5, 4)])
def test_pools_below_the_top_k_are_refused(sizes):
    with pytest.raises(SpecError, match="at least the 3 routed experts"):
        objective.check_pool(*sizes, 3)


# ---- draws of d


def sizes_of(draws: PoolSizes, rows=(3, 2), **place) -> Tensor:
    return draws.draw(rows, 4, **({"step": 5, "micro_batch": 0, "rank": 0} | place))


def test_sizes_are_uniform_over_the_closed_interval():
    sizes = PoolSizes(3, 7).draw([20_000], 1, step=1, micro_batch=0, rank=0)
    assert sizes.min() == 3 and sizes.max() == 7
    shares = torch.bincount(sizes.flatten(), minlength=8)[3:].float() / sizes.numel()
    assert torch.allclose(shares, torch.full((5,), 0.2), atol=0.02)


def test_sizes_depend_on_their_place_alone():
    draws = PoolSizes(8, 128, seed=3)
    torch.manual_seed(0)
    first = sizes_of(draws)
    torch.manual_seed(1)
    assert torch.equal(sizes_of(draws), first)
    for change in ({"step": 6}, {"micro_batch": 1}, {"rank": 1}):
        assert not torch.equal(sizes_of(draws, **change), first)
    assert not torch.equal(sizes_of(PoolSizes(8, 128, seed=4)), first)


def test_the_documents_of_another_row_do_not_matter():
    draws = PoolSizes(8, 128)
    assert torch.equal(sizes_of(draws, rows=(3, 2))[:, 3:], sizes_of(draws, rows=(7, 2))[:, 7:])


def test_layers_draw_their_own_sizes_unless_told_otherwise():
    apart, same = sizes_of(PoolSizes(8, 128)), sizes_of(PoolSizes(8, 128, same_for_all_layers=True))
    assert apart.shape == same.shape == (4, 5)
    assert not torch.equal(apart[0], apart[1])
    assert (same == same[0]).all()


def test_published_draws_come_from_the_default_generator_in_order():
    torch.manual_seed(7)
    one_by_one = [torch.randint(8, 129, (1,)).item() for _ in range(20)]
    torch.manual_seed(7)
    assert sizes_of(PoolSizes(8, 128, published=True)).flatten().tolist() == one_by_one


def test_the_middle_is_the_size_of_evaluation():
    assert objective.evaluation_size(8, 128) == 68
    assert objective.evaluation_size(8, 128, 32) == 32


# ---- language modelling


def test_only_labels_that_count_enter_the_token_losses():
    logits, labels = torch.randn(4, 6), torch.tensor([1, IGNORED, 3, IGNORED])
    kept = logits[[0, 2]]
    log_sums = kept.logsumexp(-1)
    assert torch.allclose(objective.lm_z_loss(logits, labels, 4), log_sums.square().sum() / 4)
    nll = (log_sums - kept[[0, 1], [1, 3]]).sum()
    assert torch.allclose(objective.cross_entropy(logits, labels, 4), nll / 4)
