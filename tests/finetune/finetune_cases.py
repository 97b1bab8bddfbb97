"""Golden trainings and the tiny checkpoints they start from."""

import json
from pathlib import Path

from emo_select.finetune.examples import TokenSet, from_lists
from emo_select.spec import Execution, Training

GOLDEN = Path(__file__).parents[1] / "golden" / "finetune"
CASES = ("dense", "moe_densefirst_k8", "moe_shared1_k8")
CPU = Execution(device="cpu", micro_batch_size=4, gradient_checkpointing=False)


def golden_tokens(case: str, count: int | None = None) -> TokenSet:
    return from_lists(json.loads((GOLDEN / case / "examples.json").read_text())["examples"][:count])


def golden_training(case: str, **changes) -> Training:
    seed = json.loads((GOLDEN / case / "losses.json").read_text())["recipe"]["seed"]
    return Training(**{"epochs": 2, "batch_size": 8, "seed": seed} | changes)
