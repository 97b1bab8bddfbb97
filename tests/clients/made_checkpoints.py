"""Checkpoints as the program writes them, of models small enough to ask every client about."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

import emo_select
from emo_select.experts.keepset import KeepSet

DEMO = Path(emo_select.__file__).parent / "demo" / "models" / "emo"
SIZES: dict[str, Any] = {  # heads of 32: vLLM has no smaller ones on a CPU
    "vocab_size": 316, "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "num_experts_per_tok": 4, "max_position_embeddings": 512, "pad_token_id": 1,
    "bos_token_id": None, "eos_token_id": 0, "initializer_range": 0.15,
}


def save_emo(folder: Path, tokenizer: Path = DEMO, **changes: Any) -> Path:
    """A random EMO with the tokenizer that lies in `tokenizer`."""
    from emo_select.models import EmoConfig, EmoForCausalLM

    config = EmoConfig(**SIZES | {"num_experts": 32, "num_shared_experts": 1} | changes)
    return _save(EmoForCausalLM(config), folder, tokenizer)


def save_stock(name: str, folder: Path, tokenizer: Path = DEMO, **changes: Any) -> Path:
    """A random model of one of transformers' own architectures with the tokenizer that lies in `tokenizer`."""
    import transformers

    config = getattr(transformers, f"{name}Config")(**SIZES | changes)
    return _save(getattr(transformers, f"{name}ForCausalLM")(config), folder, tokenizer)


def _save(model: Any, folder: Path, tokenizer: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=SIZES["initializer_range"], generator=generator)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / name, folder)
    return folder


def prune(source: Path, out: Path, keep: int, **options: Any) -> Path:
    """`source` with every third expert first, `keep` per layer, the shared one among them."""
    from emo_select.checkpoint import open_checkpoint
    from emo_select.experts.rules import layer_rules

    layers: list[tuple[int, ...] | None] = []
    with open_checkpoint(str(source)) as checkpoint:
        all_rules = layer_rules(checkpoint.config)
        for rules in all_rules:
            if rules is None:  # a dense layer
                layers.append(None)
                continue
            order = sorted(range(rules.routed), key=lambda expert: (expert % 3, expert))
            fixed = sorted({*rules.fixed(), *range(rules.routed, rules.experts)})
            free = [expert for expert in order if expert not in fixed]
            layers.append(tuple(sorted([*free[: keep - len(fixed)], *fixed])))
    keep_set = KeepSet(experts=tuple(layers), method="random", keep_k=keep,
                       num_shared=max(rules.shared for rules in all_rules if rules))
    emo_select.prune_checkpoint(source, keep_set, out, **options)
    return out


@torch.no_grad()
def with_wider_heads(source: Path, out: Path, size: int) -> Path:
    """The same function with attention heads of `size`, a multiple of the source's.

    The rotary pair i of a head of d turns by theta^(-2i/d), which is what pair i · size/d of the wider head does; the
    other dimensions are zero. Queries are scaled by what the wider head's softmax divides by in addition.
    """
    from emo_select.models import load_model

    model: Any = load_model(str(source), dtype="float32", device="cpu")
    narrow = model.config.hidden_size // model.config.num_attention_heads
    pairs = torch.arange(narrow // 2) * (size // narrow)
    places = torch.cat((pairs, pairs + size // 2))
    for layer in model.model.layers:
        attention = layer.self_attn
        for name in ("q_proj", "k_proj", "v_proj"):
            heads = getattr(attention, name).weight.unflatten(0, (-1, narrow))
            wide = heads.new_zeros(heads.shape[0], size, heads.shape[2])
            wide[:, places] = heads * ((size / narrow) ** 0.5 if name == "q_proj" else 1)
            getattr(attention, name).weight = torch.nn.Parameter(wide.flatten(0, 1))
        columns = attention.o_proj.weight.unflatten(1, (-1, narrow))
        wide = columns.new_zeros(columns.shape[0], columns.shape[1], size)
        wide[:, :, places] = columns
        attention.o_proj.weight = torch.nn.Parameter(wide.flatten(1))
    model.config.head_dim = size
    model.save_pretrained(out)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(source / name, out)
    return out


def train(start: Path, out: Path, **options: Any) -> Path:
    """`start` after four steps on random tokens."""
    from emo_select.finetune.examples import from_lists
    from emo_select.finetune.run import finetune_tokens
    from emo_select.spec import Execution, Training

    tokens = from_lists([{"input_ids": row, "labels": [-100] * 30 + row[30:]} for row in prompts(16)])
    training = Training(epochs=1, batch_size=4, learning_rate="1e-3", **options)
    machine = Execution(device="cpu", micro_batch_size=4, gradient_checkpointing=False)
    report = finetune_tokens(start, tokens, out, training, machine, pad_token=1)
    return out / f"checkpoint-{report.checkpoints[-1]}"


def put_back(child: Path, into: Path, out: Path) -> Path:
    """`into` with the experts of `child`."""
    from emo_select.finetune.merge import MergeOptions, merge_back

    merge_back(child, str(into), out, MergeOptions(router=True, shared=True, rest=True))
    return out


def prompts(count: int = 3, length: int = 40) -> list[list[int]]:
    """Token ids below the vocabulary, the same every time."""
    generator = torch.Generator().manual_seed(1)
    rows: list[list[int]] = torch.randint(3, SIZES["vocab_size"], (count, length), generator=generator).tolist()
    return rows


@torch.no_grad()
def expected(folder: Path, rows: list[list[int]], new_tokens: int) -> list[dict[str, Any]]:
    """Log-probability of each prompt token given those before it, and the greedy continuation, by our own class."""
    from emo_select.models import load_model

    model: Any = load_model(str(folder), dtype="float32", device="cpu")
    answers = []
    for row in rows:
        ids = torch.tensor([row])
        chosen = model(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
        text = model.generate(ids, max_new_tokens=new_tokens, do_sample=False, eos_token_id=None, pad_token_id=1)
        answers.append({"log_probabilities": chosen.tolist(), "tokens": text[0, len(row):].tolist()})
    return answers
