"""Quantised checkpoints: read as transformers dequantises them, pruned by their bytes, loaded by stock transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import quantising
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from emo_select.checkpoint import Checkpoint, open_checkpoint
from emo_select.errors import CheckpointError, ModelError
from emo_select.experts import StreamOptions, select_layerwise
from emo_select.experts.keepset import KeepSet
from emo_select.experts.prune import prune_checkpoint
from emo_select.finetune.merge import merge_back
from emo_select.models import load_model
from emo_select.models.families import experts_per_layer, layer_parameters, read_parameter

SMALL: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 32, "moe_intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "num_experts_per_tok": 2, "max_position_embeddings": 64,
    "head_dim": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "dtype": "bfloat16",
}
MODELS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 8},
    "mixtral": {"num_local_experts": 8},
    "deepseek_v3": {"n_routed_experts": 8, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 2,
                    "topk_group": 2, "kv_lora_rank": 32, "q_lora_rank": 32, "qk_rope_head_dim": 16,
                    "qk_nope_head_dim": 16, "v_head_dim": 32, "head_dim": 16},
    "gpt_oss": {"num_local_experts": 8, "layer_types": ["sliding_attention", "full_attention"]},
}
KEPT = (1, 3, 4, 6)
INT = {"type": "int", "symmetric": True, "dynamic": False}
FLOAT = {"type": "float", "symmetric": True, "dynamic": False}


def ct(layout: str, weights: dict[str, Any], **group: Any) -> Callable[[], tuple[dict[str, Any], Any]]:
    return lambda: quantising.compressed(layout, weights, **group)


def plainly(settings: dict[str, Any], convert: Any, chosen: Any = quantising.is_linear) -> Callable[[], Any]:
    return lambda: (settings, convert, chosen)


def fused(name: str) -> bool:
    return name.endswith((".gate_up_proj", ".down_proj"))


FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "modules_to_not_convert": ["lm_head"]}
ACTIVATIONS = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": True, "strategy": "token"}
# case → (family, how it is quantised)
CASES: dict[str, tuple[str, Callable[[], Any]]] = {
    "fp8-block": ("deepseek_v3", plainly({**FP8, "weight_block_size": [16, 16]}, quantising.blockwise(16))),
    "fp8-qwen": ("qwen3_moe", plainly({**FP8, "weight_block_size": [32, 32]}, quantising.blockwise(32))),
    "fp8-scale": ("qwen3_moe", plainly({**FP8, "weight_block_size": [32, 32]},
                                       quantising.blockwise(32, scale="scale"))),
    "fp4-int8": ("qwen3_moe", plainly({**FP8, "weight_block_size": [32, 32]}, quantising.packed_fp4)),
    "mxfp8": ("qwen3_moe", plainly({"quant_method": "mxfp8", "activation_scheme": "dynamic", "scale_fmt": "ue8m0",
                                    "weight_block_size": [1, 32]}, quantising.mxfp8)),
    "mxfp4": ("gpt_oss", plainly({"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
                                 quantising.gpt_oss_blocks, fused)),
    "ct-fp8-channel": ("mixtral", ct("float-quantized", {**FLOAT, "num_bits": 8, "strategy": "channel"},
                                     input_activations=ACTIVATIONS)),
    "ct-fp8-tensor": ("qwen3_moe", ct("float-quantized", {**FLOAT, "num_bits": 8, "strategy": "tensor"})),
    "ct-fp8-block": ("qwen3_moe", ct("float-quantized", {**FLOAT, "num_bits": 8, "strategy": "block",
                                                         "block_structure": [16, 32]})),
    "ct-int8": ("qwen3_moe", ct("int-quantized", {**INT, "num_bits": 8, "strategy": "channel"})),
    "ct-int4-group": ("qwen3_moe", ct("pack-quantized", {**INT, "num_bits": 4, "strategy": "group",
                                                         "group_size": 16})),
    "ct-int4-asymmetric": ("mixtral", ct("pack-quantized", {**INT, "symmetric": False, "num_bits": 4,
                                                            "strategy": "group", "group_size": 32})),
    "ct-int8-packed": ("qwen3_moe", ct("pack-quantized", {**INT, "num_bits": 8, "strategy": "channel"})),
    "ct-int3-packed": ("qwen3_moe", ct("pack-quantized", {**INT, "num_bits": 3, "strategy": "group",
                                                          "group_size": 32})),
    "ct-nvfp4": ("qwen3_moe", ct("nvfp4-pack-quantized", {**FLOAT, "num_bits": 4, "strategy": "tensor_group",
                                                          "group_size": 16})),
    "ct-mxfp4": ("qwen3_moe", ct("mxfp4-pack-quantized", {**FLOAT, "num_bits": 4, "strategy": "group",
                                                          "group_size": 32, "scale_dtype": "torch.uint8"})),
}
# transformers 5.23 folds one row of scales into experts, leaves out their zero points and global scales, and takes only
# packed integers: it cannot load these, or loads other numbers (NVFP4).
BEYOND_TRANSFORMERS = {"ct-fp8-block", "ct-int8", "ct-int4-asymmetric", "ct-nvfp4"}


@pytest.fixture(scope="session")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Unquantised tiny models by family, each built once."""
    made: dict[str, Path] = {}

    def of(family: str) -> Path:
        if family not in made:
            torch.manual_seed(0)
            config = AutoConfig.for_model(family, **{**SMALL, **MODELS[family]})
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
            made[family] = tmp_path_factory.mktemp("originals") / family
            model.save_pretrained(made[family])
        return made[family]
    return of


@pytest.fixture
def case(request: pytest.FixtureRequest, originals: Callable[[str], Path], tmp_path: Path) -> Path:
    """The quantised checkpoint of a case."""
    if request.param.startswith("ct-"):
        pytest.importorskip("compressed_tensors")
    family, how = CASES[request.param]
    return quantising.quantised(originals(family), tmp_path / "quantised", *how())


def stock(folder: Path, dtype: torch.dtype) -> Any:
    """The model as transformers alone loads it, dequantised, with nothing missing or left over."""
    from transformers import CompressedTensorsConfig

    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    options = {"quantization_config": CompressedTensorsConfig(dequantize=True)} \
        if settings["quant_method"] == "compressed-tensors" else {}
    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True, **options)
    assert not any(report.values()), report
    return model.eval()


def assert_reads_as(checkpoint: Checkpoint, model: Any, dtype: torch.dtype) -> None:
    """Every parameter of every layer has the loaded model's bytes."""
    view = checkpoint.plain({torch.float32: "F32", torch.bfloat16: "BF16"}[dtype])
    for layer in range(len(experts_per_layer(checkpoint.config))):
        for source in layer_parameters(view, layer):
            ours, theirs = read_parameter(view, source).to(dtype), model.get_parameter_or_buffer(source.parameter)
            assert torch.equal(ours, theirs.to(dtype)), source.parameter


@pytest.mark.parametrize("case", sorted(CASES.keys() - BEYOND_TRANSFORMERS), indirect=True)
def test_numbers_are_those_of_transformers_and_bytes_those_of_the_file(case: Path, tmp_path: Path) -> None:
    with open_checkpoint(case) as checkpoint:
        assert checkpoint.formats.weights
        for dtype in (torch.float32, torch.bfloat16):
            full = stock(case, dtype)
            assert_reads_as(checkpoint, full, dtype)
    pruned = stock(prune(case, tmp_path / "pruned"), torch.bfloat16)
    assert_kept_bytes(case, tmp_path / "pruned")
    with open_checkpoint(tmp_path / "pruned") as checkpoint:
        assert_reads_as(checkpoint, pruned, torch.bfloat16)
    for name, value in full.state_dict().items():
        kept = pruned.state_dict()[name]
        assert torch.equal(kept, value if kept.shape == value.shape else value[list(KEPT)]), name


@pytest.mark.parametrize("case", sorted(BEYOND_TRANSFORMERS), indirect=True)
def test_numbers_are_those_of_the_package_where_transformers_cannot_load_the_experts(case: Path, tmp_path: Path
                                                                                     ) -> None:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    settings = json.loads((case / "config.json").read_text())["quantization_config"]
    scheme = QuantizationScheme.model_validate(settings["config_groups"]["group_0"])
    compressor = BaseCompressor.get_value_from_registry(settings["format"])
    with open_checkpoint(case) as checkpoint:
        view = checkpoint.plain("F32")
        for weight in checkpoint.formats.weights.values():
            stem = weight.name.removesuffix("weight")
            stored = {part.removeprefix(stem): checkpoint.read(part) for part in weight.parts}
            theirs = compressor.decompress(stored, scheme)["weight"]
            exact = theirs.float() if weight.work is None or weight.through else None
            ours = view.read(weight.name)
            assert torch.equal(ours, exact if exact is not None else ours)
            assert torch.equal(ours.bfloat16(), theirs.bfloat16()), weight.name
    prune(case, tmp_path / "pruned")
    assert_kept_bytes(case, tmp_path / "pruned")
    with open_checkpoint(tmp_path / "pruned") as checkpoint:
        again = checkpoint.plain("F32")
        for new, old in enumerate(KEPT):
            name = next(name for name in view.tensors if ".1." in name and f".experts.{old}." in name)
            moved = name.replace(f".experts.{old}.", f".experts.{new}.")
            assert torch.equal(again.read(moved), view.read(name))


def prune(source: Path, target: Path, kept: tuple[int, ...] = KEPT, **options: Any) -> Path:
    """Keep these experts of every layer that has any."""
    with open_checkpoint(source) as checkpoint:
        experts = tuple(kept if count else None for count in experts_per_layer(checkpoint.config))
    prune_checkpoint(source, KeepSet(experts=experts, method="given", keep_k=len(kept)), target, **options)
    return target


def assert_kept_bytes(source: Path, pruned: Path) -> None:
    """Everything in the pruned file is in the original one, byte for byte, and has the same type."""
    before, after = load_file(source / "model.safetensors"), load_file(pruned / "model.safetensors")
    assert {value.dtype for value in after.values()} == {value.dtype for value in before.values()}
    for name, value in after.items():
        old = name
        for new, expert in enumerate(KEPT):
            if f".experts.{new}." in name:
                old = name.replace(f".experts.{new}.", f".experts.{expert}.")
                break
        original = before[old]
        if original.shape != value.shape:
            original = original[list(KEPT)]
        assert value.dtype == original.dtype
        assert torch.equal(value.contiguous().view(-1).view(torch.uint8),
                           original.contiguous().view(-1).view(torch.uint8)), name
    assert len(after) < len(before) or "blocks" in str(list(after))


PROMPTS = [[3 + (7 * row + 5 * at) % 61 for at in range(6 + row)] for row in range(6)]


@pytest.mark.parametrize("case", ["fp8-block", "mxfp4", "ct-nvfp4", "fp4-int8"], indirect=True)
def test_selection_and_loading_see_the_same_numbers_as_a_dequantised_copy(case: Path, tmp_path: Path) -> None:
    copy = prune(case, tmp_path / "plain", kept=tuple(range(8)), dequantize=True, dtype="float32")
    config = json.loads((copy / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "float32"
    with open_checkpoint(case) as checkpoint, open_checkpoint(copy) as plain:
        assert checkpoint.parameters == plain.parameters and checkpoint.total_bytes < plain.total_bytes / 2
        assert checkpoint.largest_layer_bytes * 1.9 < plain.largest_layer_bytes  # in bfloat16, as its config says
        ours = select_layerwise(checkpoint, PROMPTS, [4], options=StreamOptions(dtype="float32"))[4]
        theirs = select_layerwise(plain, PROMPTS, [4], options=StreamOptions(dtype="float32"))[4]
    assert ours.experts == theirs.experts and ours.scores == theirs.scores
    ids = torch.tensor([PROMPTS[0]])
    with torch.no_grad():
        assert torch.equal(load_model(str(case))(ids).logits, load_model(str(copy))(ids).logits)


@pytest.mark.parametrize("case", ["fp8-qwen"], indirect=True)
def test_a_pruned_quantised_model_is_trained_and_put_back_in_plain_numbers(case: Path, tmp_path: Path) -> None:
    from emo_select.finetune.examples import from_lists
    from emo_select.finetune.run import finetune_tokens
    from emo_select.spec import Execution, Training

    pruned, tokens = prune(case, tmp_path / "pruned"), from_lists([{"input_ids": ids, "labels": ids}
                                                                  for ids in PROMPTS])
    training = Training(epochs=4, batch_size=6, checkpoints=1, learning_rate="1e-2")
    cpu = Execution(device="cpu", micro_batch_size=6, gradient_checkpointing=False)
    report = finetune_tokens(pruned, tokens, tmp_path / "tuned", training, cpu, pad_token=0)
    last = tmp_path / "tuned" / f"checkpoint-{report.checkpoints[-1]}"
    assert "quantization_config" not in json.loads((last / "config.json").read_text())
    with open_checkpoint(last) as tuned, open_checkpoint(pruned) as start:
        assert {info.dtype for info in tuned.tensors.values()} == {"BF16"}
        assert tuned.tensors.keys() == start.plain().tensors.keys()
        name = "model.layers.1.mlp.experts.2.up_proj.weight"
        trained = tuned.read(name)
        assert not torch.equal(trained, start.plain("BF16").read(name))
    AutoModelForCausalLM.from_pretrained(last)
    merge_back(last, str(case), tmp_path / "merged")
    with open_checkpoint(tmp_path / "merged") as merged, open_checkpoint(case) as full:
        view = full.plain("BF16")
        assert merged.tensors.keys() == view.tensors.keys() and not merged.formats.weights
        assert torch.equal(merged.read(name.replace(".2.", f".{KEPT[2]}.")), trained)
        dropped = name.replace(".2.", ".0.")
        assert torch.equal(merged.read(dropped), view.read(dropped))


def test_modelopt_multiplies_by_the_scale_of_the_scales(originals: Callable[[str], Path], tmp_path: Path) -> None:
    folder = quantising.quantised(originals("qwen3_moe"), tmp_path / "modelopt", {
        "quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16}, quantising.modelopt_nvfp4)
    name = "model.layers.1.mlp.experts.3.down_proj.weight"
    with open_checkpoint(folder) as checkpoint, open_checkpoint(originals("qwen3_moe")) as original:
        codes, scale = checkpoint.read(name), checkpoint.read(f"{name}_scale").float()
        signed = torch.cat([quantising.FP4, -quantising.FP4])
        numbers = torch.stack([signed[(codes & 15).long()], signed[(codes >> 4).long()]], dim=-1).flatten(-2)
        expected = numbers.unflatten(-1, (-1, 16)) * (scale * checkpoint.read(f"{name}_scale_2"))[..., None]
        found = checkpoint.plain("F32").read(name)
        assert torch.equal(found, expected.flatten(-2))
        assert (found - original.read(name)).abs().max() < original.read(name).abs().max() / 4
    pruned = prune(folder, tmp_path / "pruned")
    assert_kept_bytes(folder, pruned)
    assert "model.layers.1.mlp.experts.3.down_proj.input_scale" in load_file(pruned / "model.safetensors")


def test_blocks_that_do_not_divide_a_weight_are_cut(originals: Callable[[str], Path], tmp_path: Path) -> None:
    """As in DeepSeek-V3, whose kv_a_proj_with_mqa has 576 rows for blocks of 128."""
    folder = quantising.quantised(originals("qwen3_moe"), tmp_path / "cut", {**FP8, "weight_block_size": [24, 24]},
                                  quantising.blockwise(24))
    name = "model.layers.0.mlp.experts.0.up_proj.weight"
    with open_checkpoint(folder) as checkpoint:
        scale = checkpoint.read(f"{name}_scale_inv")
        whole = scale.repeat_interleave(24, 0)[:32].repeat_interleave(24, 1)[:, :64]
        assert torch.equal(checkpoint.plain("F32").read(name), checkpoint.read(name).float() * whole)


@pytest.mark.parametrize("blocks", [True, False], ids=["blocks", "one scale per expert"])
def test_experts_that_are_fused_and_quantised_on_disk(blocks: bool, tmp_path: Path) -> None:
    """As transformers saves FP8 in its own layout: `gate_up_proj` and `gate_up_proj_scale_inv`."""
    def convert(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        if blocks:
            parts = [quantising.blockwise(16)("weight", one) for one in weight]
            return {name: torch.stack([part["weight"] for part in parts]),
                    f"{name}_scale_inv": torch.stack([part["weight_scale_inv"] for part in parts])}
        scales = weight.float().abs().amax(dim=(1, 2)) / 448
        return {name: (weight.float() / scales[:, None, None]).to(torch.float8_e4m3fn), f"{name}_scale_inv": scales}
    torch.manual_seed(0)
    config = AutoConfig.for_model("qwen3_moe", **{**SMALL, **MODELS["qwen3_moe"]})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "fused", save_original_format=False)
    folder = quantising.quantised(tmp_path / "fused", tmp_path / "fp8", {**FP8, "weight_block_size": [16, 16]}, convert,
                                  fused)
    with open_checkpoint(folder) as checkpoint, open_checkpoint(prune(folder, tmp_path / "pruned")) as pruned:
        name = "model.layers.1.mlp.experts.gate_up_proj"
        found, scale = checkpoint.plain("F32").read(name), checkpoint.read(f"{name}_scale_inv")
        whole = scale.repeat_interleave(16, 1).repeat_interleave(16, 2) if blocks else scale[:, None, None]
        assert torch.equal(found, checkpoint.read(name).float() * whole)
        assert (found - model.state_dict()[name].float()).abs().max() < 0.01
        assert torch.equal(pruned.plain("F32").read(name), found[list(KEPT)])
        assert pruned.info(f"{name}_scale_inv").shape == (len(KEPT), *scale.shape[1:])
        assert select_layerwise(checkpoint, PROMPTS, [4])[4].experts


def test_deepseek_v4_has_experts_in_4_and_the_rest_in_8_bits(tmp_path: Path) -> None:
    from tiny_models import tiny_model

    def convert(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        experts = ".experts." in name
        return quantising.packed_fp4(name, weight) if experts else quantising.blockwise(16, scale="scale")(name, weight)
    model = tiny_model("deepseek_v4", hidden_size=64, moe_intermediate_size=32)
    model.bfloat16().save_pretrained(tmp_path / "plain")
    folder = quantising.quantised(tmp_path / "plain", tmp_path / "v4", {**FP8, "weight_block_size": [16, 16]}, convert,
                                  lambda name: name.endswith(("w1.weight", "w2.weight", "w3.weight", "wo_b.weight")))
    full = stock(folder, torch.float32)
    with open_checkpoint(folder) as checkpoint:
        assert_reads_as(checkpoint, full, torch.float32)
    pruned = stock(prune(folder, tmp_path / "pruned"), torch.float32)
    assert_kept_bytes(folder, tmp_path / "pruned")
    for name, value in full.state_dict().items():
        kept = pruned.state_dict()[name]
        assert torch.equal(kept, value if kept.shape == value.shape else value[list(KEPT)]), name


def test_packed_rows_that_do_not_fill_their_last_word(originals: Callable[[str], Path], tmp_path: Path) -> None:
    settings, convert = quantising.compressed("pack-quantized", {**INT, "num_bits": 4, "strategy": "channel"})
    folder = quantising.quantised(originals("qwen3_moe"), tmp_path / "cut", settings,
                                  lambda name, weight: convert(name, weight[:, :60].contiguous()))
    name = "model.layers.0.self_attn.o_proj.weight"
    with open_checkpoint(folder) as checkpoint, open_checkpoint(originals("qwen3_moe")) as original:
        found, exact = checkpoint.plain("F32").read(name), original.read(name)[:, :60].float()
        assert found.shape == exact.shape and (found - exact).abs().max() < exact.abs().max() / 7


def test_gptq_is_not_read_but_pruned_with_the_selection_of_its_original(originals: Callable[[str], Path],
                                                                       tmp_path: Path) -> None:
    def gptq(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        stem = name.removesuffix("weight")
        rows, columns = weight.shape
        draw = torch.Generator().manual_seed(len(name))
        return {f"{stem}qweight": torch.randint(0, 2**31, (columns // 8, rows), dtype=torch.int32, generator=draw),
                f"{stem}qzeros": torch.zeros(columns // 32, rows // 8, dtype=torch.int32),
                f"{stem}scales": torch.rand(columns // 32, rows, generator=draw).half(),
                f"{stem}g_idx": (torch.arange(columns) // 32).int()}
    folder = quantising.quantised(originals("qwen3_moe"), tmp_path / "gptq", {
        "quant_method": "gptq", "bits": 4, "group_size": 32,
        "modules_in_block_to_quantize": ["model.layers.0.mlp.experts.3.up_proj", "model.layers.0.mlp.experts.0.up_proj",
                                         "lm_head"]}, gptq)
    with open_checkpoint(folder) as checkpoint, pytest.raises(ModelError, match=r"by gptq .*unquantised original"):
        select_layerwise(checkpoint, PROMPTS, [4])
    pruned = prune(folder, tmp_path / "pruned")
    assert_kept_bytes(folder, pruned)
    settings = json.loads((pruned / "config.json").read_text())["quantization_config"]
    assert settings["modules_in_block_to_quantize"] == ["model.layers.0.mlp.experts.1.up_proj", "lm_head"]


def test_a_configuration_that_speaks_of_a_quantisation_that_no_weight_has(originals: Callable[[str], Path],
                                                                         tmp_path: Path) -> None:
    folder = quantising.quantised(originals("qwen3_moe"), tmp_path / "stale", FP8, lambda name, weight: {name: weight})
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.formats.stale and checkpoint.plain() is checkpoint
    assert "quantization_config" not in json.loads((prune(folder, tmp_path / "pruned") / "config.json").read_text())
    assert load_model(str(folder)).dtype == torch.float32


def test_scales_that_several_experts_share_are_refused(originals: Callable[[str], Path], tmp_path: Path) -> None:
    def convert(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        return quantising.blockwise(4)(name, weight)
    folder = quantising.quantised(originals("qwen3_moe"), tmp_path / "router", {**FP8, "weight_block_size": [4, 4]},
                                  convert, lambda name: name.endswith("mlp.gate.weight"))
    with pytest.raises(ModelError, match=r"mlp\.gate\.weight_scale_inv has shape \[2, 16\].*--dequantize"):
        prune(folder, tmp_path / "pruned")
    assert prune(folder, tmp_path / "plain", dequantize=True).exists()


def test_payloads_without_scale_are_refused_by_name(originals: Callable[[str], Path], tmp_path: Path) -> None:
    folder = quantising.quantised(originals("qwen3_moe"), tmp_path / "lost", FP8,
                                  lambda name, weight: {name: weight.to(torch.float8_e4m3fn)})
    with pytest.raises(CheckpointError, match=r"proj\.weight is stored as F8_E4M3, but has no scale"):
        prune(folder, tmp_path / "pruned")
