"""`export gguf`: what the file holds, and what is refused. Whether llama.cpp agrees is asked in tests/clients."""

from __future__ import annotations

import json
import shutil
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from typer.testing import CliRunner

from emo_select.checkpoint import open_checkpoint
from emo_select.cli.app import app
from emo_select.errors import EmoSelectError, ModelError, OwnershipError, UsageError
from emo_select.export.gguf import export_gguf, plan_gguf
from emo_select.export.vocabulary import REST, WORDS, read_vocabulary
from emo_select.models import EmoConfig, EmoForCausalLM

SIZES: dict[str, Any] = {
    "vocab_size": 270, "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "num_experts_per_tok": 3, "max_position_embeddings": 128, "pad_token_id": 1,
    "eos_token_id": 0, "num_experts": 6, "num_shared_experts": 1,
}


def save(folder: Path, splitter: Any = None, **changes: Any) -> Path:
    """A small random EMO with a byte tokenizer."""
    EmoForCausalLM(EmoConfig(**SIZES | changes)).save_pretrained(folder)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = {letter: number for number, letter in enumerate(["<|endoftext|>", "<|pad|>", *letters, "he"])}
    made = Tokenizer(models.BPE(tokens, [("h", "e")]))
    made.pre_tokenizer = splitter or pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<|endoftext|>", "<|pad|>"])
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(
        {"eos_token": "<|endoftext|>", "pad_token": "<|pad|>", "chat_template": "{{ messages }}"}))
    return folder


@pytest.fixture(scope="module")
def emo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("export") / "emo")


def read(folder: Path) -> tuple[dict[str, Any], dict[str, numpy.ndarray]]:
    """Metadata and values of an exported file."""
    reader = GGUFReader(folder / "model.gguf")
    return ({name: field.contents() for name, field in reader.fields.items()},
            {tensor.name: dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors})


def test_the_file_holds_every_value(emo: Path, tmp_path: Path) -> None:
    export_gguf(emo, tmp_path / "out")
    _, found = read(tmp_path / "out")
    with open_checkpoint(emo) as source:
        layer = "model.layers.1."
        experts = [source.read(f"{layer}mlp.experts.{expert}.down_proj.weight") for expert in range(6)]
        same = {"token_embd.weight": "model.embed_tokens.weight", "output.weight": "lm_head.weight",
                "blk.1.attn_k.weight": f"{layer}self_attn.k_proj.weight",
                "blk.1.post_attention_norm.weight": f"{layer}pre_feedforward_layernorm.weight"}
        for theirs, ours in same.items():
            assert numpy.array_equal(found[theirs], source.read(ours).numpy()), theirs
        assert numpy.array_equal(found["blk.1.ffn_gate_inp.weight"], source.read(f"{layer}mlp.gate.weight")[:5].numpy())
    assert numpy.array_equal(found["blk.1.ffn_down_exps.weight"], torch.stack(experts[:5]).numpy())
    assert numpy.array_equal(found["blk.1.ffn_down_shexp.weight"], experts[5].numpy())
    assert not found["blk.1.exp_probs_b.bias"].any()
    values = sum(array.size for array in found.values())
    assert values == open_checkpoint(emo).parameters - 2 * SIZES["hidden_size"] + 2 * 5  # shared router rows; biases


def test_the_file_says_what_the_model_and_its_tokenizer_are(emo: Path, tmp_path: Path) -> None:
    export_gguf(emo, tmp_path / "out")
    said, _ = read(tmp_path / "out")
    assert said["general.architecture"] == "glm4moe"
    wanted = {"expert_count": 5, "expert_used_count": 2, "expert_shared_count": 1, "leading_dense_block_count": 0,
              "expert_gating_func": 1, "expert_weights_norm": False, "attention.head_count_kv": 1,
              "rope.dimension_count": 32, "rope.freq_base": 500000.0, "context_length": 128, "block_count": 2}
    assert {name: said[f"glm4moe.{name}"] for name in wanted} == wanted
    assert len(said["tokenizer.ggml.tokens"]) == SIZES["vocab_size"]
    assert said["tokenizer.ggml.tokens"][-1] == "[PAD269]"
    assert said["tokenizer.ggml.token_type"] == [3, 3] + [1] * 257 + [5] * 11
    assert said["tokenizer.ggml.merges"] == ["h e"]
    assert said["tokenizer.ggml.pre"] == "gpt-2"
    assert said["tokenizer.ggml.eos_token_id"] == 0
    assert said["tokenizer.ggml.add_bos_token"] is False
    assert said["tokenizer.chat_template"] == "{{ messages }}"


@pytest.mark.parametrize(("dtype", "largest"), [("f16", 2 ** -11), ("bf16", 2 ** -8), ("q8_0", 0.02)])
def test_smaller_types_round_as_they_should(emo: Path, tmp_path: Path, dtype: str, largest: float) -> None:
    plan = export_gguf(emo, tmp_path / "out", dtype=dtype)
    _, found = read(tmp_path / "out")
    _, exact = read_as(emo, tmp_path / "exact", "f32")
    for name, values in exact.items():
        assert numpy.abs(found[name] - values).max() <= largest * max(numpy.abs(values).max(), 1e-9), name
    assert numpy.array_equal(found["blk.0.ffn_gate_inp.weight"], exact["blk.0.ffn_gate_inp.weight"])
    assert plan.bytes == pytest.approx((tmp_path / "out" / "model.gguf").stat().st_size, rel=0.2)


def read_as(source: Path, out: Path, dtype: str) -> tuple[dict[str, Any], dict[str, numpy.ndarray]]:
    export_gguf(source, out, dtype=dtype)
    return read(out)


def test_other_kinds_of_experts(tmp_path: Path) -> None:
    """No shared expert: one of zeros. Always-active ones: a bias that no probability reaches."""
    plain = save(tmp_path / "plain", num_shared_experts=0, norm_topk_prob=True)
    said, found = read_as(plain, tmp_path / "plain_out", "auto")
    assert said["glm4moe.expert_count"] == 6
    assert said["glm4moe.expert_weights_norm"] is True
    assert not found["blk.0.ffn_up_shexp.weight"].any()
    active = save(tmp_path / "active", num_shared_experts=0, always_active_experts=[4, 1])
    _, found = read_as(active, tmp_path / "active_out", "auto")
    assert found["blk.0.exp_probs_b.bias"].tolist() == [0, 2, 0, 0, 2, 0]


@pytest.mark.parametrize(("changes", "words"), [
    ({"num_shared_experts": 2}, "2 shared experts"),
    ({"num_experts_per_layer": [4, 6]}, "different numbers of experts"),
    ({"num_experts_per_layer": [6, 0], "dense_intermediate_size": 32}, "follows one"),
    ({"num_experts_per_tok": 1}, "shared experts only"),
    ({"attention_bias": True}, "biases"),
    ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}}, "scaled"),
    ({"hidden_act": "gelu"}, "gelu"),
])
def test_what_llama_cpp_has_no_operation_for_is_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    source = save(tmp_path / "model", **changes)
    with pytest.raises(ModelError, match=f"llama.cpp cannot run this model: .*{words}") as caught:
        export_gguf(source, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_other_families_are_left_to_llama_cpp(emo: Path, tmp_path: Path) -> None:
    source = shutil.copytree(emo, tmp_path / "model")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"model_type": "olmoe"}))
    with pytest.raises(EmoSelectError, match="convert_hf_to_gguf"):
        export_gguf(source, tmp_path / "out")


LLAMA = WORDS + r"\p{N}{1,3}" + REST


@pytest.mark.parametrize(("pattern", "behavior", "invert", "pre"), [
    (LLAMA, "isolated", False, "dbrx"), (LLAMA, "removed", True, "dbrx"), (WORDS + r"\p{N}" + REST, "isolated", False,
                                                                         "qwen2")])
def test_how_texts_are_split_is_told_by_the_pattern(tmp_path: Path, pattern: str, behavior: str, invert: bool, pre: str
                                                    ) -> None:
    from tokenizers import Regex

    steps = [pre_tokenizers.Split(Regex(pattern), behavior, invert),
             pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    source = save(tmp_path / "model", pre_tokenizers.Sequence(steps))
    assert read_vocabulary(source, 270).pre == pre
    content = json.loads((source / "tokenizer.json").read_text())
    content["model"]["ignore_merges"] = True
    (source / "tokenizer.json").write_text(json.dumps(content))
    if pre == "dbrx":
        assert read_vocabulary(source, 270).pre == "llama-bpe"
    else:
        with pytest.raises(ModelError, match="--tokenizer-pre"):
            read_vocabulary(source, 270)


def test_a_tokenizer_that_llama_cpp_does_not_know_is_refused_and_can_be_named(tmp_path: Path) -> None:
    source = save(tmp_path / "model", pre_tokenizers.Whitespace())
    with pytest.raises(ModelError, match="--tokenizer-pre"):
        plan_gguf(source)
    assert plan_gguf(source, tokenizer_pre="gpt-2").vocabulary.pre == "gpt-2"
    with pytest.raises(ModelError, match="only 258"):
        read_vocabulary(source, 258, "gpt-2")
    content = json.loads((source / "tokenizer.json").read_text())
    for changes in ({"merges": []}, {"type": "WordLevel", "unk_token": "?"}):
        content["model"] |= changes
        (source / "tokenizer.json").write_text(json.dumps(content))
        with pytest.raises(ModelError, match="no byte-level BPE with merges"):
            plan_gguf(source, tokenizer_pre="gpt-2")
    (source / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"no tokenizer\.json"):
        plan_gguf(source)


def test_the_command(emo: Path, tmp_path: Path) -> None:
    def call(*arguments: str) -> Any:
        return CliRunner().invoke(app, ["export", "gguf", str(emo), "--out", str(tmp_path / "out"), *arguments])

    planned = json.loads(call("--dry-run", "--json").stdout)
    assert not (tmp_path / "out").exists()
    assert planned["written"] is False
    written = json.loads(call("--json").stdout)
    assert written == planned | {"written": True}
    assert isinstance(call().exception, UsageError)  # there already
    assert call("--force", "--dtype", "bf16").exit_code == 0
    assert isinstance(call("--force", "--dtype", "q3").exception, UsageError)


def test_a_folder_of_somebody_else_stays(emo: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "theirs.txt").write_text("x")
    with pytest.raises(OwnershipError):
        export_gguf(emo, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["theirs.txt"]


@pytest.mark.parametrize(("found", "words"), [(None, r"emo-select\[gguf\]"), ("0.10.0", "too old; 0.18 or later")])
def test_without_the_package_one_sentence_says_how_to_get_it(emo: Path, tmp_path: Path, found: str | None, words: str,
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if found is None:
            raise PackageNotFoundError(name)
        return found

    monkeypatch.setattr("emo_select.export.gguf.version", version)
    with pytest.raises(UsageError, match=words):
        export_gguf(emo, tmp_path / "out")
    assert not (tmp_path / "out").exists()
