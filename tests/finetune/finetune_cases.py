"""Golden trainings, tiny models, and what they start from."""

import json
import os
import socket
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from emo_select.finetune.examples import TokenSet, from_lists
from emo_select.spec import Execution, Training

GOLDEN = Path(__file__).parents[1] / "golden" / "finetune"
CASES = ("dense", "moe_densefirst_k8", "moe_shared1_k8")
WORDS = ["<eos>", "<pad>", "a", "b", "c", "d"]
SIZE = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "moe_intermediate_size": 8, "head_dim": 8,
    "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "num_experts_per_tok": 2,
    "max_position_embeddings": 64, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
CPU = Execution(device="cpu", micro_batch_size=4, gradient_checkpointing=False)


def golden_tokens(case: str, count: int | None = None) -> TokenSet:
    return from_lists(json.loads((GOLDEN / case / "examples.json").read_text())["examples"][:count])


def golden_training(case: str, **changes) -> Training:
    seed = json.loads((GOLDEN / case / "losses.json").read_text())["recipe"]["seed"]
    return Training(**{"epochs": 2, "batch_size": 8, "seed": seed} | changes)


def family_tokens() -> TokenSet:
    """Sixteen examples of 6 to 13 tokens below 64, the last four of each trained."""
    rows = [[3 + (7 * row + 5 * at) % 61 for at in range(6 + row % 8)] for row in range(16)]
    return from_lists([{"input_ids": ids, "labels": [-100] * (len(ids) - 4) + ids[-4:]} for ids in rows])


def save_family(family: str, folder: Path) -> None:
    """A random model of 8 experts per layer in the layout of the Hub, with the tokenizer of letters."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SIZE, num_experts=8, num_local_experts=8, output_router_logits=True)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    letters().save_pretrained(folder)


def letters() -> PreTrainedTokenizerFast:
    """A tokenizer of single letters."""
    inner = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", behavior="isolated")
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", pad_token="<pad>")


def letter_rows() -> str:
    """Eight own examples as JSONL."""
    rows = [{"prompt": "ab" * (1 + index % 3), "completion": "cd"} for index in range(8)]
    return "\n".join(map(json.dumps, rows))


def forked(work: Callable[[], object], processes: int = 1) -> list[int]:
    """Exit codes of processes that do `work` and start as copies of this one, which has everything imported.

    Several are joined as torchrun joins them.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    copies = [get_context("fork").Process(target=_enter, args=(work, rank, processes, port))
              for rank in range(processes)]
    for copy in copies:
        copy.start()
    for copy in copies:
        copy.join(300)
    return [copy.exitcode for copy in copies]


def _enter(work: Callable[[], object], rank: int, world: int, port: int) -> None:
    if world > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
                       "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    AcceleratorState._reset_state(reset_partial_state=True)
    work()
