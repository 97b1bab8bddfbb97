"""A training step against the published modelling code's way, in the same run, as ratios.

    python benchmarks/finetuning.py [--layers 4] [--vocab 100352] [--labels 0.05] [--steps 5] [--threads 1]

The model has 32 experts kept of 128 at hidden size 256 (width 128, top-8); a batch is 8 x 256 tokens, of which a share
are labels, as in few-shot prompts. The other way is a Python loop over experts that are modules of their own, and
logits at every position. Both run the same weights; their losses are compared before anything is timed. Times are of
the process's CPU, so that other work on the machine counts little, and the best of the steps.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.common import table
from emo_select.finetune.batches import predicting
from emo_select.finetune.examples import IGNORED
from emo_select.models import EmoConfig, EmoForCausalLM

ROWS, LENGTH, EXPERTS, TOP_K, HIDDEN, WIDTH = 8, 256, 32, 8, 256, 128
Step = Callable[[], Tensor]


class Expert(nn.Module):
    """One SwiGLU expert with weights of its own."""

    def __init__(self, gate_up: Tensor, down: Tensor) -> None:
        super().__init__()
        gate, up = gate_up.detach().clone().chunk(2)
        self.gate, self.up = nn.Parameter(gate.clone()), nn.Parameter(up.clone())
        self.down = nn.Parameter(down.detach().clone())

    def forward(self, tokens: Tensor) -> Tensor:
        """(tokens, hidden) → (tokens, hidden)."""
        return F.linear(F.silu(F.linear(tokens, self.gate)) * F.linear(tokens, self.up), self.down)


class ExpertLoop(nn.Module):
    """Mask, gather, run, scatter: expert after expert."""

    def __init__(self, fused: nn.Module) -> None:
        super().__init__()
        self.experts = nn.ModuleList(Expert(gate_up, down) for gate_up, down in zip(
            fused.gate_up_proj, fused.down_proj, strict=True))

    def forward(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Weighted sum of the chosen experts."""
        output = torch.zeros_like(hidden)
        chosen = F.one_hot(index, len(self.experts)).permute(2, 1, 0)
        for number, expert in enumerate(self.experts):
            slot, token = torch.where(chosen[number])
            inner = expert(hidden[None, token].reshape(-1, hidden.shape[-1])) * weights[token, slot, None]
            output.index_add_(0, token, inner.to(hidden.dtype))
        return output


def make_models(layers: int, vocab: int, device: str) -> tuple[EmoForCausalLM, EmoForCausalLM]:
    """The model as this package trains it, and the same weights with experts in a loop."""
    config = EmoConfig(
        vocab_size=vocab, hidden_size=HIDDEN, intermediate_size=WIDTH, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=4, num_experts=EXPERTS, num_shared_experts=1, num_experts_per_tok=TOP_K, eos_token_id=0,
        output_router_logits=True, pad_token_id=1, use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    ours, loop = EmoForCausalLM(config), EmoForCausalLM(config)
    ours.set_experts_implementation("grouped_mm")
    loop.load_state_dict(ours.state_dict())
    for layer in loop.model.layers:
        layer.mlp.experts = ExpertLoop(layer.mlp.experts)
    return ours.to(device).train(), loop.to(device).train()


def make_batch(vocab: int, share: float, device: str) -> dict[str, Tensor]:
    """Random tokens; the last `share` of each row are labels."""
    ids = torch.randint(2, vocab, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, : round(LENGTH * (1 - share))] = IGNORED
    items = (labels != IGNORED).sum()
    return {"input_ids": ids.to(device), "labels": labels.to(device), "num_items_in_batch": items.to(device)}


def training_step(model: nn.Module, batch: dict[str, Tensor]) -> Step:
    """Forward, backward, clip and AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step() -> Tensor:
        loss: Tensor = model(**batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def seconds_of(steps: dict[str, Step], rounds: int, device: str) -> dict[str, float]:
    """Best time of each, taken in turn: of the process on a CPU, of the clock on a GPU."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    best = dict.fromkeys(steps, float("inf"))
    for _ in range(rounds):
        for name, step in steps.items():
            start = clock()
            step().item()
            best[name] = min(best[name], clock() - start)
    return best


def measure(layers: int, vocab: int, share: float, rounds: int, device: str) -> dict[str, Any]:
    """Tokens per CPU second of three steps, after their losses have been seen to be equal."""
    ours, loop = make_models(layers, vocab, device)
    batch = make_batch(vocab, share, device)
    kept = {**batch, **predicting(F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED))}
    with torch.no_grad():
        losses = [float(model(**given).loss) for model, given in ((loop, batch), (ours, batch), (ours, kept))]
    if max(losses) - min(losses) > 1e-4:
        raise SystemExit(f"the losses differ: {losses}")
    steps = {
        "loop over experts, all logits": training_step(loop, batch),
        "grouped products, all logits": training_step(ours, batch),
        "grouped products, logits of labels (ours)": training_step(ours, kept),
    }
    return {name: ROWS * LENGTH / seconds for name, seconds in seconds_of(steps, rounds, device).items()}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=100_352)
    parser.add_argument("--labels", type=float, default=0.05)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    speed = measure(given.layers, given.vocab, given.labels, given.steps, given.device)
    slowest = speed["loop over experts, all logits"]
    print(table([(name, f"{rate:,.0f}", f"{rate / slowest:.2f}x") for name, rate in speed.items()],
                ("step", "tokens/s", "ratio")))


if __name__ == "__main__":
    main()
