"""llama.cpp on pruned checkpoints, by its own converter and by `export gguf`, with a real tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import environments
import pytest
import torch
from client_calls import in_environment
from made_checkpoints import prune, save_emo, save_stock

from emo_select.export.gguf import export_gguf

pytestmark = pytest.mark.client
NEW_TOKENS, LIKELIEST, CLOSE = 6, 10, 2e-4
ROUNDED = 0.3  # logits of this random model spread over 10
TEXTS = ["The bridge isn't 1234 metres long, they've said:\n\n  \tnaïve – 橋 🌉", "def f(x):\n    return x**2  # no"]
GPT2 = {"vocab_size": 50257, "eos_token_id": 50256, "pad_token_id": 50256}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GPT-2's tokenizer, out of the vocabulary that llama.cpp tests with."""
    gguf = pytest.importorskip("gguf")
    if environments.python_of("llama") is None:
        pytest.skip("the environment of llama is not there; `make clients` makes it")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    fields = gguf.GGUFReader(environments.source_of("llama", "models/ggml-vocab-gpt-2.gguf")).fields
    tokens, merges = (fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "merges"))
    made = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)},
                                [tuple(merge.split(" ")) for merge in merges]))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.add_special_tokens(["<|endoftext|>"])
    folder = tmp_path_factory.mktemp("tokenizer")
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>"}))
    return folder


@pytest.fixture(scope="module")
def pruned(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three families with 6 of 16 experts."""
    root = tmp_path_factory.mktemp("checkpoints")
    made = {}
    for name, sizes in {"Qwen3Moe": {"num_experts": 16, "moe_intermediate_size": 32, "head_dim": 32,
                                     "norm_topk_prob": True},  # as llama.cpp does without asking
                        "Mixtral": {"num_local_experts": 16}, "Olmoe": {"num_experts": 16}}.items():
        source = save_stock(name, root / f"{name}-full", tokenizer, **GPT2, **sizes)
        made[name] = prune(source, root / name, 6)
    return made


def test_the_stock_converter_and_llama_cpp_give_the_same_numbers(pruned: dict[str, Path], ask: Any, tmp_path: Path
                                                                 ) -> None:
    converter = environments.source_of("llama", "convert_hf_to_gguf.py")
    for name, folder in pruned.items():
        in_environment("llama", converter, folder, "--outfile", tmp_path / f"{name}.gguf", "--outtype", "f32")
    compare(ask, pruned, tmp_path)


@pytest.fixture(scope="module")
def emos(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """EMO pruned to 16 of 32 and below top-k; without shared experts; always-active ones; a dense first layer."""
    root = tmp_path_factory.mktemp("emos")
    full, plain = save_emo(root / "full", tokenizer, **GPT2), {**GPT2, "num_shared_experts": 0, "num_experts": 16}
    renormalised = save_emo(root / "renormalised", tokenizer, **plain, norm_topk_prob=True)
    active = save_emo(root / "active", tokenizer, **plain, always_active_experts=[2, 5])
    dense = save_emo(root / "dense", tokenizer, **GPT2, num_experts_per_layer=[0, 16],
                     num_shared_experts_per_layer=[0, 1], dense_intermediate_size=48)
    return {"emo": prune(full, root / "emo", 16), "below": prune(full, root / "below", 3),
            "no_shared": prune(renormalised, root / "no_shared", 6), "always": prune(active, root / "always", 6),
            "dense_first": prune(dense, root / "dense_first", 6)}


def test_exported_emo_gives_the_same_numbers(emos: dict[str, Path], ask: Any, tmp_path: Path) -> None:
    for name, folder in emos.items():
        export_gguf(folder, tmp_path / name)
        (tmp_path / name / "model.gguf").rename(tmp_path / f"{name}.gguf")
    compare(ask, emos, tmp_path)


def test_llama_cpp_reads_every_type(emos: dict[str, Path], ask: Any, tmp_path: Path) -> None:
    for dtype in ("f16", "bf16", "q8_0"):
        export_gguf(emos["emo"], tmp_path / dtype, dtype=dtype)
        (tmp_path / dtype / "model.gguf").rename(tmp_path / f"{dtype}.gguf")
    compare(ask, dict.fromkeys(("f16", "bf16", "q8_0"), emos["emo"]), tmp_path, ROUNDED)


def compare(ask: Any, checkpoints: dict[str, Path], files: Path, close: float = CLOSE) -> None:
    """llama.cpp continues ids and texts with the tokens and log-probabilities that transformers gives."""
    from emo_select.models import load_tokenizer

    tokenizer = load_tokenizer(str(next(iter(checkpoints.values()))))
    ids = [tokenizer(text)["input_ids"] for text in TEXTS]
    found = ask("llama", {"models": {name: str(files / f"{name}.gguf") for name in checkpoints}, "likeliest": LIKELIEST,
                          "prompts": [*ids, *TEXTS], "new_tokens": NEW_TOKENS})
    for name, folder in checkpoints.items():
        for seen, row in zip(found[name], [*ids, *ids], strict=True):
            assert seen["prompt_tokens"] == len(row), name
            for token, likeliest, ours in zip(seen["tokens"], seen["log_probabilities"],
                                              continued(folder, row, seen["tokens"]), strict=True):
                assert float(ours[token]) >= float(ours.max()) - close, name  # the likeliest, or as likely
                expected = [float(ours[int(other)]) for other in likeliest]
                assert list(likeliest.values()) == pytest.approx(expected, abs=close), name


@torch.no_grad()
def continued(folder: Path, row: list[int], tokens: list[int]) -> torch.Tensor:
    """Log-probabilities (step, vocabulary) by transformers of what follows `row` and then each of `tokens`."""
    from emo_select.models import load_model

    model: Any = load_model(str(folder), dtype="float32", device="cpu")
    return model(torch.tensor([row + tokens])).logits.log_softmax(-1)[0, len(row) - 1:-1]
