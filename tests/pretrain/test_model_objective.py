"""The EMO objective, property by property, on a real tiny model."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn import functional as F

from emo_select.errors import ModelError, SpecError
from emo_select.models import EmoConfig, EmoForCausalLM
from emo_select.models.balancing import load_balancing_loss
from emo_select.pretrain import Batch, EmoObjective, Losses

VOCABULARY, ROUTED, TOP_K = 50, 9, 3


def tiny_model(**changes) -> EmoForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 2,
             "num_attention_heads": 2, "num_experts": ROUTED + 1, "num_shared_experts": 1,
             "num_experts_per_tok": TOP_K + 1, "initializer_range": 0.4, "pad_token_id": 0, "eos_token_id": 1,
             "max_position_embeddings": 64}
    return EmoForCausalLM(EmoConfig(**(sizes | changes)))


def tiny_batch(rows: int = 4, positions: int = 12, seed: int = 0) -> Batch:
    ids = torch.randint(2, VOCABULARY, (rows, positions), generator=torch.Generator().manual_seed(seed))
    return Batch(ids, ids.clone(), torch.arange(rows)[:, None].expand(rows, positions))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def per_token(model: EmoForCausalLM, sizes: tuple[int, int] | None, **changes) -> EmoObjective:
    """The variant that divides by tokens, in which every token of every rank weighs the same."""
    return EmoObjective(model, sizes, divisor="tokens", **changes)


def losses_of(objective: EmoObjective, batch: Batch, sizes: list[int] | None = None, seed: int = 0) -> Losses:
    """With the given sizes, else with drawn ones; the gradients of the total are computed too."""
    drawn = objective(batch, seeded(seed))
    with objective.with_sizes(batch, torch.tensor(sizes)) if sizes else drawn as losses:
        losses.total.backward()
    return losses


def routing_of(model: EmoForCausalLM, objective: EmoObjective, batch: Batch, sizes: list[int]):
    """Per layer (logits, weights, index) that the routers gave during one objective call."""
    seen = []
    hooks = [router.register_forward_hook(lambda _, __, output: seen.append(output)) for router in objective.routers]
    losses_of(objective, batch, sizes)
    for hook in hooks:
        hook.remove()
    return seen


# ---- routing inside the model


def test_tokens_only_use_experts_of_their_documents_pool():
    model, batch = tiny_model(), tiny_batch()
    sizes = [3, 4, 5, 9]
    for logits, _, index in routing_of(model, EmoObjective(model, (3, 9)), batch, sizes):
        probabilities = F.softmax(logits[:, :ROUTED], -1).view(4, -1, ROUTED)
        for document, size in enumerate(sizes):
            pool = set(probabilities[document].mean(0).topk(size).indices.tolist())
            used = set(index.view(4, -1, TOP_K + 1)[document, :, :TOP_K].flatten().tolist())
            assert used <= pool


def test_weights_are_the_softmax_over_the_pool_and_one_for_the_shared_expert():
    model, batch = tiny_model(), tiny_batch()
    for logits, weights, index in routing_of(model, EmoObjective(model, (3, 9)), batch, [3] * 4):
        pool = F.softmax(logits[:, :ROUTED], -1).view(4, -1, ROUTED).mean(1).topk(3).indices
        allowed = torch.zeros(4, ROUTED, dtype=torch.bool).scatter(1, pool, True).repeat_interleave(12, 0)
        expected = F.softmax(logits[:, :ROUTED].masked_fill(~allowed, float("-inf")), -1)
        assert torch.allclose(weights[:, :TOP_K], expected.gather(1, index[:, :TOP_K]), atol=1e-6)
        assert torch.allclose(weights[:, :TOP_K].sum(1), torch.ones(len(weights)))  # size 3 = top-3: all of the pool
        assert (weights[:, TOP_K] == 1).all() and (index[:, TOP_K] == ROUTED).all()


def test_pools_differ_between_documents_and_layers():
    model, batch = tiny_model(), tiny_batch()
    used = [index.view(4, -1, TOP_K + 1)[..., :TOP_K].flatten(1).sort(1).values.unique(dim=0)
            for _, _, index in routing_of(model, EmoObjective(model, (3, 9)), batch, [3] * 4)]
    assert all(len(pools) > 1 for pools in used)


def test_documents_packed_into_a_row_have_pools_of_their_own():
    model = tiny_model()
    batch = tiny_batch(1, 12)._replace(documents=torch.tensor([[0] * 5 + [1] * 7]))
    for logits, _, index in routing_of(model, EmoObjective(model, (3, 9)), batch, [3, 4]):
        for tokens, size in ((slice(0, 5), 3), (slice(5, 12), 4)):
            pool = F.softmax(logits[tokens, :ROUTED], -1).mean(0).topk(size).indices.tolist()
            assert set(index[tokens, :TOP_K].flatten().tolist()) <= set(pool)


def test_padding_changes_no_loss():
    model, batch = tiny_model(), tiny_batch()
    padded = Batch(F.pad(batch.input_ids, (0, 5)), F.pad(batch.labels, (0, 5), value=-100),
                   F.pad(batch.documents, (0, 5), value=-1))
    objective, sizes = EmoObjective(model, (3, 9)), [3, 5, 7, 9]
    plain, longer = losses_of(objective, batch, sizes), losses_of(objective, padded, sizes)
    for name in ("total", "cross_entropy", "balance", "z", "entropy", "peak_load"):
        assert torch.allclose(getattr(plain, name), getattr(longer, name), atol=1e-5), name


@pytest.mark.parametrize("global_balance", [True, False])
def test_a_rank_with_nothing_but_padding_has_finite_gradients(global_balance):
    model, batch = tiny_model(), tiny_batch()
    empty = Batch(batch.input_ids, torch.full_like(batch.labels, -100), torch.full_like(batch.documents, -1))
    losses = losses_of(EmoObjective(model, (3, 9), global_balance=global_balance), empty)
    assert losses.total == 0
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_a_pool_of_all_experts_is_the_standard_objective():
    model, batch = tiny_model(), tiny_batch()
    whole = losses_of(EmoObjective(model, (9, 9)), batch)
    standard = losses_of(EmoObjective(model, None), batch)
    assert torch.equal(whole.total, standard.total)


def test_the_seam_is_closed_afterwards_even_after_an_error():
    model, batch = tiny_model(), tiny_batch()
    objective = EmoObjective(model, (3, 9))
    losses_of(objective, batch)
    assert all(router.pool is None for router in objective.routers)
    with pytest.raises(IndexError):
        losses_of(objective, batch._replace(input_ids=batch.input_ids + VOCABULARY))
    assert all(router.pool is None for router in objective.routers)


# ---- losses


def test_cross_entropy_is_that_of_the_model():
    model, batch = tiny_model(), tiny_batch()
    batch.labels[:, :4] = -100
    ours = losses_of(EmoObjective(model, None), batch).cross_entropy
    assert torch.allclose(ours, model(input_ids=batch.input_ids, labels=batch.labels).loss, atol=1e-6)


def test_balance_is_the_models_own_load_balancing_loss():
    model, batch = tiny_model(), tiny_batch()
    logits = model(input_ids=batch.input_ids, output_router_logits=True).router_logits
    expected = load_balancing_loss(model.config, logits, torch.ones_like(batch.input_ids))
    assert torch.allclose(losses_of(per_token(model, None), batch).balance, expected, atol=1e-6)


def test_balance_is_one_and_entropy_maximal_for_a_router_without_opinion():
    model, batch = tiny_model(), tiny_batch()
    objective = per_token(model, None)
    for router in objective.routers:
        torch.nn.init.zeros_(router.weight)
    losses = losses_of(objective, batch)
    assert torch.allclose(losses.balance, torch.tensor(1.0), atol=1e-6)
    assert torch.allclose(losses.entropy, torch.log(torch.tensor(float(ROUTED))), atol=1e-5)
    assert torch.allclose(losses.z, torch.log(torch.tensor(float(ROUTED))) ** 2, atol=1e-5)


def test_as_published_the_router_losses_are_divided_by_the_labels():
    model, batch = tiny_model(), tiny_batch()
    batch.labels[:, 4:] = -100  # 3 of 12 tokens of a row have a label
    published, plain = (losses_of(kind(model, None), batch) for kind in (EmoObjective, per_token))
    assert torch.allclose(published.balance, plain.balance * 4, rtol=1e-5)
    assert torch.allclose(published.z, plain.z * 4, rtol=1e-5)
    assert torch.equal(published.cross_entropy, plain.cross_entropy)


def test_layers_draw_their_own_sizes_unless_told_otherwise():
    model, batch = tiny_model(), tiny_batch()
    apart, same = (losses_of(per_token(model, (3, 9), same_for_all_layers=together), batch).total
                   for together in (False, True))
    drawn = torch.randint(3, 10, (2, 4), generator=seeded())
    assert torch.equal(apart, losses_of(per_token(model, (3, 9)), batch, drawn.tolist()).total)
    assert torch.equal(same, losses_of(per_token(model, (3, 9)), batch, drawn[0].tolist()).total)


def test_z_counts_only_the_pool():
    model, batch = tiny_model(), tiny_batch()
    objective, sizes = per_token(model, (3, 9)), [3] * 4
    expected = []
    for logits, _, _ in routing_of(model, objective, batch, sizes):
        pool = F.softmax(logits[:, :ROUTED], -1).view(4, -1, ROUTED).mean(1).topk(3).indices.repeat_interleave(12, 0)
        expected.append(logits.gather(1, pool).logsumexp(-1).square().mean())
    assert torch.allclose(losses_of(objective, batch, sizes).z, torch.stack(expected).mean(), rtol=1e-5)


def test_the_total_weighs_its_parts():
    model, batch = tiny_model(), tiny_batch()
    losses = losses_of(EmoObjective(model, (3, 9), balance_weight=0.3, z_weight=0.07), batch)
    expected = losses.cross_entropy + 0.3 * losses.balance + 0.07 * losses.z
    assert torch.allclose(losses.total, expected, atol=1e-6)


def test_experts_outside_the_pool_learn_nothing():
    model, batch = tiny_model(num_hidden_layers=1), tiny_batch(1)
    objective = EmoObjective(model, (3, 9), balance_weight=0, z_weight=0)
    (_, _, index), = routing_of(model, objective, batch, [3])
    moved = model.model.layers[0].mlp.experts.down_proj.grad.abs().amax((1, 2)) > 0
    assert set(moved.nonzero().flatten().tolist()) == set(index.flatten().tolist())
    assert len(set(index.flatten().tolist())) == 4  # the pool and the shared expert
    rows = model.model.layers[0].mlp.gate.weight.grad.abs().amax(1) > 0
    assert set(rows.nonzero().flatten().tolist()) == set(index[:, :TOP_K].flatten().tolist())


def test_gradients_are_finite_and_survive_gradient_checkpointing():
    grads = []
    for checkpointing in (False, True):
        model, batch = tiny_model().train(), tiny_batch()
        if checkpointing:
            model.activation_checkpointing_enable()
        losses_of(EmoObjective(model, (3, 9)), batch)
        grads.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    assert torch.isfinite(grads[0]).all()
    assert torch.allclose(*grads, atol=1e-6)


def test_layers_without_experts_are_passed_over():
    model = tiny_model(num_experts_per_layer=[0, 10], dense_intermediate_size=8)
    objective = EmoObjective(model, (3, 9))
    assert len(objective.routers) == 1
    assert torch.isfinite(losses_of(objective, tiny_batch()).total)


# ---- several ranks


def _rank(rank: int, ranks: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks)
    for global_balance in (True, False):
        gradients = _averaged_gradients(rank, ranks, global_balance)
        if not rank:
            torch.save(gradients, f"{folder}/{global_balance}.pt")
    dist.destroy_process_group()


def _averaged_gradients(rank: int, ranks: int, global_balance: bool) -> list[torch.Tensor]:
    model, (batch, sizes) = tiny_model(), _uneven()
    mine = [[0, 1, 2], [3]][rank]  # ranks of unequal size: means must be over all tokens
    part = Batch(batch.input_ids[mine], batch.labels[mine], torch.arange(len(mine))[:, None].expand(len(mine), 12))
    losses_of(per_token(model, (3, 9), global_balance=global_balance), part, [sizes[row] for row in mine])
    for parameter in model.parameters():
        dist.all_reduce(parameter.grad)
        parameter.grad /= ranks
    return [parameter.grad for parameter in model.parameters()]


def _uneven() -> tuple[Batch, list[int]]:
    batch = tiny_batch()
    batch.labels[0, 3:9] = -100
    return batch, [3, 9, 4, 6]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> dict[bool, list[torch.Tensor]]:
    """Gradients averaged over two gloo ranks, with global and with local balance."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(_rank, (2, str(folder)), nprocs=2)
    return {balance: torch.load(folder / f"{balance}.pt", weights_only=True) for balance in (True, False)}


def _gradients_of_one_rank() -> list[torch.Tensor]:
    model, (batch, sizes) = tiny_model(), _uneven()
    losses_of(per_token(model, (3, 9)), batch, sizes)
    return [parameter.grad for parameter in model.parameters()]


def test_two_ranks_with_global_balance_give_the_gradients_of_one(two_ranks):
    for ours, expected in zip(two_ranks[True], _gradients_of_one_rank(), strict=True):
        assert torch.allclose(ours, expected, atol=1e-6)


def test_local_balance_is_another_objective(two_ranks):
    pairs = zip(two_ranks[False], _gradients_of_one_rank(), strict=True)
    assert max(float((ours - expected).abs().max()) for ours, expected in pairs) > 1e-4


# ---- refusals


def test_always_active_experts_are_refused():
    model = tiny_model(num_shared_experts=0, always_active_experts=[0])
    with pytest.raises(ModelError, match="shared experts"):
        EmoObjective(model, (3, 9))


@pytest.mark.parametrize("sizes", [(2, 9), (5, 4)])
def test_pool_sizes_that_cannot_work_are_refused(sizes):
    with pytest.raises(SpecError, match="at least the 3 routed experts"):
        EmoObjective(tiny_model(), sizes)
