"""Parts of the EMO model that other rooms build on: layers alone, router, experts, training, generation."""

from __future__ import annotations

import warnings

import pytest
import torch
from transformers import DynamicCache
from transformers.masking_utils import create_causal_mask

from emo_select.models import EmoConfig, EmoForCausalLM
from emo_select.models.balancing import load_balancing_loss
from emo_select.models.emo import EmoDecoderLayer, EmoRotaryEmbedding, EmoRouter

IDS = torch.tensor([[3, 17, 5, 29, 8, 11, 2, 36], [9, 4, 30, 7, 22, 13, 6, 15]])


def grads(model, **options):
    model.zero_grad()
    model(IDS, labels=IDS, output_router_logits=True, **options).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


# --- layers alone -----------------------------------------------------------------------------------------------


def test_decoder_layers_run_one_at_a_time_from_a_model_without_weights(tiny):
    """Build everything on the meta device, give storage to one layer, run it, and so on: equal to the whole model."""
    whole = tiny(num_hidden_layers=3, num_experts_per_layer=[0, 8, 6], num_shared_experts_per_layer=[0, 1, 2],
                 dense_intermediate_size=24)
    with torch.device("meta"):
        empty = EmoForCausalLM(whole.config)
    rotary = EmoRotaryEmbedding(whole.config)
    positions = torch.arange(IDS.shape[1])[None]
    with torch.no_grad():
        hidden = whole.model.embed_tokens(IDS)
        mask = create_causal_mask(config=whole.config, inputs_embeds=hidden, attention_mask=None, past_key_values=None,
                                  position_ids=positions)
        for index, layer in enumerate(empty.model.layers):
            layer.load_state_dict(whole.model.layers[index].state_dict(), assign=True)
            hidden = layer(hidden, attention_mask=mask, position_ids=positions,
                           position_embeddings=rotary(hidden, positions))
            layer.to("meta")
        wanted = whole.model(IDS, output_hidden_states=True)
        assert torch.equal(whole.model.norm(hidden), wanted.last_hidden_state)


def test_layer_kinds_follow_the_configuration(tiny):
    model = tiny(num_hidden_layers=3, num_experts_per_layer=[0, 8, 6], num_shared_experts_per_layer=[0, 1, 2],
                 dense_intermediate_size=24, dense_mlp_bias=True)
    dense, first, second = (layer.mlp for layer in model.model.layers)
    assert dense.gate_proj.weight.shape == (24, 16)
    assert dense.down_proj.bias is not None
    assert first.experts.gate_up_proj.shape == (8, 16, 16)
    assert (second.gate.num_experts, second.gate.num_shared, second.gate.num_routed) == (6, 2, 4)
    assert model(IDS, output_router_logits=True).router_logits[1].shape == (16, 6)


# --- router -----------------------------------------------------------------------------------------------------


def router(**changes) -> EmoRouter:
    values = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_experts": 8,
              "num_experts_per_tok": 3, "num_shared_experts": 1}
    made = EmoRouter(EmoConfig(**(values | changes)), layer_idx=0)
    torch.nn.init.normal_(made.weight)
    return made


def test_shared_experts_have_their_own_softmax_and_come_last():
    gate = router(num_shared_experts=2, num_experts_per_tok=5)
    logits, weights, index = gate(torch.randn(4, 7, 16))
    assert logits.shape == (28, 8)
    assert torch.equal(index[:, 3:], torch.tensor([6, 7]).expand(28, 2))
    assert torch.allclose(weights[:, 3:], logits[:, 6:].softmax(-1))
    assert torch.equal(weights[:, :3], logits[:, :6].softmax(-1).topk(3).values)
    assert (index[:, :3] < 6).all()


def test_one_shared_expert_has_weight_one():
    _, weights, index = router()(torch.randn(5, 16))
    assert torch.equal(weights[:, -1], torch.ones(5))
    assert torch.equal(index[:, -1], torch.full((5,), 7))


def test_always_active_experts_keep_their_probability():
    gate = router(num_shared_experts=0, always_active_experts=[6, 2], num_experts_per_tok=4)
    logits, weights, index = gate(torch.randn(9, 16))
    probabilities = logits.softmax(-1)
    assert torch.equal(index[:, :2], torch.tensor([6, 2]).expand(9, 2))
    assert torch.equal(weights, probabilities.gather(1, index))
    assert all(len(set(row)) == 4 for row in index.tolist())
    rest = probabilities.clone()
    rest[:, [2, 6]] = 0
    assert torch.equal(index[:, 2:], rest.topk(2).indices)


def test_normalised_weights_sum_to_one():
    _, weights, _ = router(num_shared_experts=0, norm_topk_prob=True)(torch.randn(5, 16))
    assert torch.allclose(weights.sum(-1), torch.ones(5))


def test_pool_restricts_the_routed_experts_and_renormalises_over_it():
    """The seam for the training objective: outside a token's pool the probability is 0; shared experts stay."""
    gate, hidden = router(), torch.randn(6, 16)
    allowed = torch.zeros(6, 7, dtype=torch.bool)
    allowed[:3, [0, 4]], allowed[3:, [1, 2, 6]] = True, True
    seen = []
    gate.pool = lambda logits: (seen.append(logits), allowed)[1]
    logits, weights, index = gate(hidden)
    assert torch.equal(seen[0], logits[:, :7])
    assert {frozenset(row[:2]) for row in index[:3].tolist()} == {frozenset({0, 4})}
    assert all(expert in (1, 2, 6) for row in index[3:].tolist() for expert in row[:2])
    assert torch.allclose(weights[:3, :2].sum(-1), torch.ones(3))
    assert torch.equal(weights[:, 2], torch.ones(6))


def test_a_layer_with_fewer_experts_than_top_k_uses_all_of_them(tiny):
    model = tiny(num_experts=2, num_experts_per_tok=4)
    _, weights, _ = model.model.layers[0].mlp.gate(torch.randn(5, 16))
    assert weights.shape == (5, 2)
    assert model(IDS).logits.isfinite().all()


# --- experts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
def test_expert_implementations_agree_in_outputs_and_gradients(tiny, implementation):
    model = tiny()
    model.set_experts_implementation("eager")
    logits, eager = model(IDS).logits, grads(model)
    model.set_experts_implementation(implementation)
    assert torch.allclose(model(IDS).logits, logits, atol=1e-5)
    other = grads(model)
    assert eager.keys() == other.keys()
    worst = max((eager[name] - other[name]).abs().max().item() for name in eager)
    print(f"largest gradient difference, {implementation} against eager: {worst:.1e}")
    assert worst < 1e-5


def test_dropping_experts_that_no_token_uses_changes_nothing(tiny):
    """Pruning is a selection of rows: fused experts and router rows, with the counts of the configuration."""
    model = tiny(num_experts=9, num_experts_per_tok=2)
    keep = [0, 2, 3, 5, 8]  # 8 is shared
    for layer in model.model.layers:  # experts outside `keep` can never be chosen
        layer.mlp.gate.pool = lambda logits: torch.isin(torch.arange(8), torch.tensor(keep)).expand_as(logits)
    small = EmoForCausalLM(EmoConfig(**(model.config.to_dict() | {"num_experts": 5}))).eval()
    state = {name: tensor[keep] if ".mlp." in name else tensor for name, tensor in model.state_dict().items()}
    small.load_state_dict(state)
    assert torch.allclose(small(IDS).logits, model(IDS).logits, atol=1e-6)


def test_experts_beyond_the_hidden_dtype(tiny):
    model = tiny().to(torch.bfloat16)
    output = model(IDS, output_router_logits=True)
    assert output.logits.dtype == torch.bfloat16
    assert all(logits.dtype == torch.bfloat16 for logits in output.router_logits)
    assert output.aux_loss.dtype == torch.float32


# --- training ---------------------------------------------------------------------------------------------------


def test_gradient_checkpointing_gives_the_same_gradients(tiny):
    model = tiny().train()
    plain = grads(model)
    model.gradient_checkpointing_enable()
    checkpointed = grads(model)
    assert plain.keys() == checkpointed.keys()
    assert all(torch.equal(plain[name], checkpointed[name]) for name in plain)


def test_loss_is_cross_entropy_plus_scaled_balancing(tiny):
    model = tiny(router_aux_loss_coef=0.3)
    output = model(IDS, labels=IDS, output_router_logits=True)
    assert torch.allclose(output.loss, output.ce_loss + 0.3 * output.aux_loss)
    without = model(IDS, labels=IDS)
    assert without.aux_loss is None
    assert torch.equal(without.loss, output.ce_loss)


def test_output_router_logits_in_the_configuration_switches_the_balancing_loss_on(tiny):
    assert tiny(output_router_logits=True)(IDS, labels=IDS).aux_loss is not None


def test_balancing_gradient_reaches_every_router(tiny):
    model = tiny()
    model(IDS, output_router_logits=True).aux_loss.backward()
    for layer in model.model.layers:
        routed, shared = layer.mlp.gate.weight.grad.split([7, 1])
        assert routed.abs().sum() > 0
        assert shared.abs().sum() == 0  # shared experts are not balanced


def test_balanced_routing_has_loss_one_per_item_scale(tiny):
    """Uniform probabilities and counts give exactly 1, whatever the numbers of experts and tokens."""
    config = tiny(num_hidden_layers=1, num_experts=5, num_experts_per_tok=2).config
    logits = torch.eye(4).mul(1e-4).repeat(3, 1)  # each of the 4 routed experts is first for 3 of 12 tokens
    loss = load_balancing_loss(config, [torch.cat((logits, torch.zeros(12, 1)), dim=1)], torch.ones(3, 4))
    assert torch.allclose(loss, torch.tensor(1.0), atol=1e-3)


def test_balancing_loss_ignores_masked_tokens(tiny):
    config = tiny(num_hidden_layers=1).config
    logits, mask = torch.randn(8, 8), torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    changed = logits + 5 * torch.randn(8, 8) * (1 - mask.reshape(-1, 1))
    assert torch.equal(load_balancing_loss(config, [logits], mask), load_balancing_loss(config, [changed], mask))
    assert not torch.equal(load_balancing_loss(config, [logits]), load_balancing_loss(config, [changed]))


def test_balancing_loss_scales_with_the_items_of_the_whole_batch(tiny):
    config = tiny(num_hidden_layers=1).config
    logits, mask = torch.randn(8, 8), torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    whole = load_balancing_loss(config, [logits], mask)
    assert torch.allclose(load_balancing_loss(config, [logits], mask, num_items=20), whole * 5 / 20)
    assert torch.allclose(load_balancing_loss(config, [logits], mask, torch.tensor(20)), whole * 5 / 20)


def test_a_layer_without_routed_choices_adds_nothing(tiny):
    model = tiny(num_experts=2, num_experts_per_tok=1)  # the one expert per token is the shared one
    output = model(IDS, labels=IDS, output_router_logits=True)
    assert output.aux_loss == 0
    assert output.loss.isfinite()


def test_padding_embedding_gets_no_gradient(tiny):
    model = tiny()
    ids = IDS.clone()
    ids[0, 3] = 0
    model(ids, labels=ids).loss.backward()
    assert model.model.embed_tokens.weight.grad[0].abs().sum() == 0
    assert model.model.embed_tokens.weight.grad[5].abs().sum() > 0


def test_one_step_of_training_lowers_the_loss(tiny):
    model = tiny(output_router_logits=True).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    before = model(IDS, labels=IDS).loss
    before.backward()
    optimizer.step()
    assert model(IDS, labels=IDS).loss < before


# --- inference --------------------------------------------------------------------------------------------------


def test_attention_backends_agree(tiny):
    model = tiny(num_attention_heads=2, num_key_value_heads=1, head_dim=16)
    mask = torch.ones_like(IDS)
    mask[0, :3] = 0
    with torch.no_grad():
        model.set_attn_implementation("sdpa")
        wanted = model(IDS, attention_mask=mask).logits
        model.set_attn_implementation("eager")
        found = model(IDS, attention_mask=mask).logits
    assert torch.allclose(found[mask.bool()], wanted[mask.bool()], atol=1e-5)


def test_logits_to_keep(tiny):
    model = tiny()
    full = model(IDS).logits
    assert torch.allclose(model(IDS, logits_to_keep=2).logits, full[:, -2:], atol=1e-6)
    assert torch.allclose(model(IDS, logits_to_keep=torch.tensor([1, 4])).logits, full[:, [1, 4]], atol=1e-6)
    each = torch.stack([full[0, [1, 4]], full[1, [2, 7]]])
    assert torch.allclose(model(IDS, logits_to_keep=torch.tensor([[1, 4], [2, 7]])).logits, each, atol=1e-6)
    mask = torch.arange(8) > torch.tensor([[5], [2]])
    assert torch.allclose(model(IDS, logits_to_keep=mask).logits, full[mask], atol=1e-6)


def test_cache_gives_the_logits_of_the_whole_sequence(tiny):
    model, cache = tiny(), DynamicCache()
    full = model(IDS).logits
    first = model(IDS[:, :5], past_key_values=cache, use_cache=True)
    rest = model(IDS[:, 5:], past_key_values=first.past_key_values, use_cache=True)
    assert cache.get_seq_length() == 8
    assert torch.allclose(torch.cat((first.logits, rest.logits), dim=1), full, atol=1e-5)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_equals_repeated_argmax(tiny, cache):
    model = tiny(eos_token_id=None)
    ids = IDS
    for _ in range(5):
        ids = torch.cat((ids, model(ids).logits[:, -1:].argmax(-1)), dim=1)
    made = model.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=5, do_sample=False,
                          cache_implementation=cache)
    assert torch.equal(made, ids)


def test_compiles_as_one_graph(tiny):
    """With grouped products there is no data-dependent control flow (generation with a static cache relies on it)."""
    model = tiny()
    with torch.no_grad():
        assert torch.allclose(torch.compile(model, fullgraph=True, backend="eager")(IDS).logits, model(IDS).logits)


def test_hidden_states_and_attentions_are_recorded(tiny):
    model = tiny()
    model.set_attn_implementation("eager")
    output = model(IDS, output_hidden_states=True, output_attentions=True)
    assert len(output.hidden_states) == 3
    assert output.attentions[0].shape == (2, 2, 8, 8)


def test_layers_are_whole_units_for_sharding():
    assert EmoForCausalLM._no_split_modules == [EmoDecoderLayer.__name__]


def test_a_cache_may_be_given_under_either_of_its_names(tiny):
    """transformers 5.24 calls it `cache` and warns of the old name, which goes away in 5.40."""
    model = tiny()
    whole = model(IDS).logits
    for name in ("past_key_values", "cache"):
        held = DynamicCache()
        model(IDS[:, :5], use_cache=True, **{name: held})
        rest = model(IDS[:, 5:], use_cache=True, **{name: held}).logits
        assert held.get_seq_length() == 8
        assert torch.allclose(rest, whole[:, 5:], atol=1e-5)


def test_a_forward_pass_and_generation_warn_of_nothing(tiny):
    model = tiny(eos_token_id=None)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        model(IDS, use_cache=True)
        model.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=2, do_sample=False)


def test_logits_of_chosen_positions_are_those_of_all():
    """By number, by index and by a mask, which evaluation packs by: without it no prefix is shared."""
    torch.manual_seed(0)
    model = EmoForCausalLM(EmoConfig(vocab_size=40, hidden_size=16, intermediate_size=8, num_hidden_layers=1,
                                     num_attention_heads=2, num_experts=4, num_experts_per_tok=2,
                                     pad_token_id=0)).eval()
    with torch.no_grad():
        every = model(IDS).logits
        mask = torch.zeros(IDS.shape, dtype=torch.bool)
        mask[0, 2:5] = mask[1, 7] = True
        found = [model(IDS, logits_to_keep=kept).logits for kept in (3, torch.tensor([1, 4]), mask)]
    for ours, theirs in zip(found, (every[:, -3:], every[:, [1, 4]], every[mask]), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_configurations_name_no_remote_code_and_say_so():
    """TRL looks at `auto_map` without asking whether it is there."""
    config = EmoConfig()
    assert config.auto_map == {} and "auto_map" not in config.to_dict()
