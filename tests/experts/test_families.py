"""Every row of the family table against a tiny real model of that family, in stock transformers."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM

from emo_select.checkpoint import open_checkpoint
from emo_select.errors import CheckpointError, KeepKError, ModelError
from emo_select.experts.keepset import KeepSet, check_keep_k
from emo_select.experts.prune import plan_prune, prune_checkpoint
from emo_select.finetune.merge import MergeOptions, merge_back
from emo_select.models.families import (
    SCORING,
    experts_per_layer,
    family_of,
    layer_parameters,
    num_groups,
    read_parameter,
    shared_per_layer,
)

SMALL: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_key_value_heads": 2, "num_experts_per_tok": 3, "max_position_embeddings": 64, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}
LATENT = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
DEEPSEEK = {"n_routed_experts": 12, "moe_intermediate_size": 8, "n_shared_experts": 2, "first_k_dense_replace": 1,
            "n_group": 3, "topk_group": 2, "routed_scaling_factor": 1.5}

# family → (what its config adds, one name as the Hub has it)
MODELS: dict[str, tuple[dict[str, Any], str]] = {
    "olmoe": ({"num_experts": 12}, "model.layers.1.mlp.experts.11.gate_proj.weight"),
    "flex_olmo": ({"num_experts": 12}, "model.layers.1.mlp.experts.11.down_proj.weight"),
    "mixtral": ({"num_local_experts": 12}, "model.layers.1.block_sparse_moe.experts.11.w3.weight"),
    "qwen2_moe": ({"num_experts": 12, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8,
                   "mlp_only_layers": [0]}, "model.layers.1.mlp.shared_expert_gate.weight"),
    "qwen3_moe": ({"num_experts": 12, "moe_intermediate_size": 8, "decoder_sparse_step": 2, "head_dim": 8,
                   "norm_topk_prob": True}, "model.layers.1.mlp.experts.11.up_proj.weight"),
    "deepseek_v2": ({**DEEPSEEK, **LATENT, "topk_method": "group_limited_greedy"},
                    "model.layers.1.mlp.shared_experts.up_proj.weight"),
    "deepseek_v3": ({**DEEPSEEK, **LATENT}, "model.layers.1.mlp.gate.e_score_correction_bias"),
    "glm4_moe": ({**DEEPSEEK, "head_dim": 8}, "model.layers.1.mlp.experts.11.down_proj.weight"),
    "gpt_oss": ({"num_local_experts": 12, "head_dim": 8}, "model.layers.1.mlp.experts.gate_up_proj_bias"),
}
KEPT = (0, 2, 4, 6, 9, 11)  # two of each group of four


class MaskedRouter(TorchFunctionMode):
    """While active, linear layers give minus infinity for the dropped experts."""

    def __init__(self, kept: tuple[int, ...], count: int) -> None:
        super().__init__()
        self.dropped = torch.tensor([e for e in range(count) if e not in kept], dtype=torch.long)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return result.index_fill(-1, self.dropped, -torch.inf) if func is torch.nn.functional.linear else result


def build(family: str, **changes: Any) -> Any:
    """A random model of the family with routers peaked enough that choices matter."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**SMALL, **MODELS[family][0], **changes})
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "norm" not in name and "inv_freq" not in name:
                tensor.normal_(std=0.5 if "correction_bias" in name or "bias" in name else 0.3)
    return model


def mask(model: Any, family: str, kept: tuple[int, ...], top_k: int) -> Any:
    """The same model in memory, which can no longer route to the other experts."""
    row = family_of(json.loads(model.config.to_json_string(use_diff=False)))
    masked = copy.deepcopy(model)
    for layer in masked.model.layers:
        try:
            router = layer.get_submodule(row.router_module)
        except AttributeError:
            continue  # a dense layer
        count, plain = router.weight.shape[0], router.forward
        router.top_k = top_k
        if hasattr(router, "e_score_correction_bias"):  # a dropped expert must not be chosen for its bias
            router.e_score_correction_bias[[e for e in range(count) if e not in kept]] = -torch.inf

        def forward(hidden: torch.Tensor, plain: Any = plain, count: int = count) -> Any:
            with MaskedRouter(kept, count):
                return plain(hidden)

        router.forward = forward
    return masked


def keep_set(config: dict[str, Any], kept: tuple[int, ...]) -> KeepSet:
    return KeepSet(experts=tuple(kept if count else None for count in experts_per_layer(config)), method="random",
                   keep_k=len(kept))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(model, folder) of a family, built once."""
    built: dict[str, tuple[Any, Path]] = {}

    def get(family: str) -> tuple[Any, Path]:
        if family not in built:
            folder = tmp_path_factory.mktemp(family)
            model = build(family)
            model.save_pretrained(folder)
            built[family] = model, folder
        return built[family]

    return get


def test_every_row_is_tested() -> None:
    assert SCORING.keys() - {"emo"} == MODELS.keys()


@pytest.mark.parametrize("family", MODELS)
def test_disk_layout_is_the_hub_s(saved: Any, family: str) -> None:
    _, folder = saved(family)
    assert MODELS[family][1] in open_checkpoint(folder).tensors


@pytest.mark.parametrize("kept", [KEPT, (1, 3, 5, 7, 8, 10), tuple(range(12))], ids=str)
@pytest.mark.parametrize("family", MODELS)
def test_pruned_checkpoint_equals_masked_model(saved: Any, family: str, kept: tuple[int, ...], tmp_path: Path) -> None:
    model, folder = saved(family)
    config = open_checkpoint(folder).config
    prune_checkpoint(folder, keep_set(config, kept), tmp_path / "pruned")
    pruned, info = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned", dtype=torch.float32,
                                                        output_loading_info=True)
    assert not any(info.values()), info
    assert getattr(pruned.eval().config, family_of(config).count_keys[0]) == len(kept)
    ids = torch.randint(3, 64, (2, 11), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = mask(model, family, kept, 3)(ids).logits
        found, unpruned = pruned(ids).logits, model(ids).logits
    assert (found - expected).abs().max() < 2e-5
    assert (len(kept) == 12) == bool((expected - unpruned).abs().max() < 2e-5)  # the mask itself must matter


@pytest.mark.parametrize("family", ["olmoe", "mixtral", "gpt_oss"])
def test_top_k_shrinks_with_keep_k(saved: Any, family: str, tmp_path: Path) -> None:
    model, folder = saved(family)
    config = open_checkpoint(folder).config
    prune_checkpoint(folder, keep_set(config, (3, 8)), tmp_path / "pruned")
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned", dtype=torch.float32).eval()
    assert pruned.config.num_experts_per_tok == 2
    ids = torch.arange(3, 13)[None]
    with torch.no_grad():
        assert (pruned(ids).logits - mask(model, family, (3, 8), 2)(ids).logits).abs().max() < 2e-5


@pytest.mark.parametrize("family", MODELS)
def test_layer_parameters_are_the_loaded_model_s(saved: Any, family: str) -> None:
    model, folder = saved(family)
    checkpoint = open_checkpoint(folder)
    loaded = model.state_dict()
    for layer in range(3):
        read = {p.parameter: read_parameter(checkpoint, p) for p in layer_parameters(checkpoint, layer)}
        expected = {name: tensor for name, tensor in loaded.items() if name.startswith(f"model.layers.{layer}.")}
        assert read.keys() == expected.keys()
        assert all(torch.equal(read[name], expected[name]) for name in read)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_layer_parameters_of_some_experts(saved: Any, family: str) -> None:
    model, folder = saved(family)
    checkpoint = open_checkpoint(folder)
    experts = [p for p in layer_parameters(checkpoint, 1, [5, 2]) if p.is_experts]
    assert experts and not any(p.is_experts for p in layer_parameters(checkpoint, 1, []))
    for source in experts:
        assert torch.equal(read_parameter(checkpoint, source), model.state_dict()[source.parameter][[5, 2]])


@pytest.mark.parametrize("family", MODELS)
def test_rows_name_real_modules(saved: Any, family: str) -> None:
    model, folder = saved(family)
    row = family_of(open_checkpoint(folder).config)
    layer = model.model.layers[1]
    assert row.layer_classes == (type(layer).__name__,)
    for module in (row.moe_module, row.router_module, row.experts_module, *row.separate_shared):
        layer.get_submodule(module)
    for fused in row.experts:
        assert layer.get_parameter(fused.parameter).shape[0] == 12


@pytest.mark.parametrize("stale", ["num_experts", "num_local_experts", "n_routed_experts"])
@pytest.mark.parametrize("family", MODELS)
def test_no_count_key_stays_behind(saved: Any, family: str, stale: str) -> None:
    _, folder = saved(family)
    checkpoint = open_checkpoint(folder)
    checkpoint.config.setdefault(stale, 12)
    config = plan_prune(checkpoint, keep_set(checkpoint.config, KEPT)).config
    assert config[stale] == len(KEPT)
    assert getattr(AutoConfig.for_model(**config), family_of(config).count_keys[0]) == len(KEPT)
    if family == "qwen3_moe":
        assert config["num_experts"] == config["num_local_experts"] == len(KEPT)


def test_correction_bias_stays_float32(saved: Any, tmp_path: Path) -> None:
    _, folder = saved("deepseek_v3")
    prune_checkpoint(folder, keep_set(open_checkpoint(folder).config, KEPT), tmp_path / "pruned", dtype="bfloat16")
    pruned = open_checkpoint(tmp_path / "pruned")
    assert {name.rsplit(".", 1)[1]: info.dtype for name, info in pruned.tensors.items()} == {
        "weight": "BF16", "e_score_correction_bias": "F32"}


def test_prediction_layers_are_left_out(saved: Any, tmp_path: Path) -> None:
    model, _ = saved("deepseek_v3")
    model.save_pretrained(tmp_path / "mtp")
    from safetensors.torch import load_file, save_file

    state = load_file(tmp_path / "mtp/model.safetensors")
    state |= {name.replace("layers.2.", "layers.3."): t.clone() for name, t in state.items() if "layers.2." in name}
    save_file(state, tmp_path / "mtp/model.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "mtp/config.json").read_text()) | {"num_nextn_predict_layers": 1}
    (tmp_path / "mtp/config.json").write_text(json.dumps(config))
    prune_checkpoint(tmp_path / "mtp", keep_set(config, KEPT), tmp_path / "pruned")
    pruned = open_checkpoint(tmp_path / "pruned")
    assert sorted(pruned.layers) == [0, 1, 2] and pruned.config["num_nextn_predict_layers"] == 0
    merge_back(tmp_path / "pruned", str(tmp_path / "mtp"), tmp_path / "merged", MergeOptions(True, True, True))
    merged = load_file(tmp_path / "merged/model.safetensors")
    assert merged.keys() == state.keys() and all(torch.equal(merged[name], state[name]) for name in state)


def test_layers_that_route_by_hash_are_refused() -> None:
    with pytest.raises(ModelError, match="hash"):
        family_of({"model_type": "deepseek_v3", "num_hash_layers": 3})


@pytest.mark.parametrize(("changes", "says"), [
    ({"num_experts": "many"}, "num_experts in config.json must be a whole number, not 'many'"),
    ({"num_hidden_layers": -1}, "whole number"), ({"num_hidden_layers": 2.5}, "whole number"),
    ({"num_experts_per_layer": [8]}, "each of the 3 layers"), ({"num_experts_per_layer": [8, 8, None]}, "whole number"),
    ({"num_experts_per_layer": 8}, "each of the 3 layers"),
    ({"num_experts_per_layer": [8, 8, 8], "num_shared_experts_per_layer": [1]}, "each of the 3 layers"),
])
def test_a_config_of_nonsense(changes: dict[str, Any], says: str) -> None:
    config = {"model_type": "emo", "num_hidden_layers": 3, "num_experts": 8, **changes}
    with pytest.raises(CheckpointError, match=says):
        experts_per_layer(config) and shared_per_layer(config)


def test_early_copies_of_emo_are_emo() -> None:
    assert family_of({"model_type": "flex_olmo_noqknorm_prenorm"}) == family_of({"model_type": "emo"})


def test_dense_and_unknown_models_are_refused() -> None:
    with pytest.raises(ModelError, match="skips selection"):
        family_of({"model_type": "olmo2_noqknorm_prenorm"})
    with pytest.raises(ModelError, match="has no experts"):
        family_of({"model_type": "somethingelse"})
    with pytest.raises(ModelError, match="transformers does not know model_type 'somethingelse'"):
        family_of({"model_type": "somethingelse", "num_experts": 8})


def test_fp8_tensors_are_refused_even_if_the_config_is_silent(saved: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    _, folder = saved("olmoe")
    state = load_file(folder / "model.safetensors")
    for name in state:
        if ".experts." in name:
            state[name] = state[name].to(torch.float8_e4m3fn)
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    checkpoint = open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=r"is quantised .* has no quantization_config"):
        plan_prune(checkpoint, keep_set(checkpoint.config, KEPT))


def test_groups_must_stay_equal(saved: Any) -> None:
    checkpoint = open_checkpoint(saved("deepseek_v3")[1])
    assert num_groups(checkpoint.config) == 3
    with pytest.raises(KeepKError, match="multiple of 3"):
        check_keep_k(checkpoint.config, 7)
    with pytest.raises(KeepKError, match="at least 6"):
        check_keep_k(checkpoint.config, 3)
    with pytest.raises(KeepKError, match="groups"):
        plan_prune(checkpoint, keep_set(checkpoint.config, (0, 1, 2, 6, 9, 11)))
    notice = check_keep_k({**checkpoint.config, "num_experts_per_tok": 6}, 6)
    assert notice and "4 experts per token instead of 6" in notice


def test_layers_of_different_size_need_a_family_that_can_say_so(saved: Any) -> None:
    checkpoint = open_checkpoint(saved("olmoe")[1])
    uneven = KeepSet(experts=((0, 1, 2, 3), (0, 1, 2), (0, 1, 2, 3)), method="variable", keep_k=3)
    with pytest.raises(KeepKError, match="olmoe config cannot"):
        plan_prune(checkpoint, uneven, allow_nonuniform=True)


def test_config_that_does_not_fit(saved: Any) -> None:
    checkpoint = open_checkpoint(saved("olmoe")[1])
    for changes, says in (({"num_experts": 10}, "10"), ({"num_experts": 14, "num_local_experts": 14}, "14"),
                          ({"num_hidden_layers": 2}, "2 layers"), ({"num_hidden_layers": 4}, "no tensor"),
                          ({"hidden_size": 17}, r"config.json makes it \[64, 17\]")):
        checkpoint.config = {**open_checkpoint(checkpoint.directory).config, **changes}
        with pytest.raises(CheckpointError, match=says):
            plan_prune(checkpoint, keep_set(checkpoint.config, KEPT))
