"""Stock Trainer, TRL's SFTTrainer and peft take pruned checkpoints and adapters of ours as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from made_checkpoints import prompts, prune, save_emo, save_stock, train

from emo_select.models import load_model
from emo_select.models.adapters import merge_adapter
from emo_select.spec import Lora

pytestmark = pytest.mark.client
TEXTS = [f"Question: Which harbour has {count} ships?\nAnswer: the one that has {count}." for count in range(12)]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three families with 8 experts. Those of transformers come first: they are trained without our package."""
    root = tmp_path_factory.mktemp("checkpoints")
    olmoe = save_stock("Olmoe", root / "olmoe_full", num_experts=16)
    qwen = save_stock("Qwen3Moe", root / "qwen_full", num_experts=16, moe_intermediate_size=32, head_dim=32)
    sources = {"olmoe": olmoe, "qwen": qwen, "emo": save_emo(root / "emo_full")}
    return {name: prune(source, root / name, 8) for name, source in sources.items()}


def test_stock_trainers_and_peft(checkpoints: dict[str, Path], ask: Any, tmp_path: Path) -> None:
    adapters = {name: train(path, tmp_path / name, lora=Lora(rank=2)) for name, path in checkpoints.items()}
    rows = prompts(8)
    found = ask("trl", {"models": {name: str(path) for name, path in checkpoints.items()}, "rows": rows, "texts": TEXTS,
                        "adapters": {name: [str(path.with_name("checkpoint-0")), str(path)]
                                     for name, path in adapters.items()}})
    for name, adapter in adapters.items():
        for kind in ("trainer", "sft"):
            assert found[name][kind][-1] < 0.9 * found[name][kind][0], (name, kind)
        model: Any = merge_adapter(load_model(str(checkpoints[name]), dtype="float32", device="cpu"), adapter)
        with torch.no_grad():
            ours = model(torch.tensor([rows[0]])).logits[0, -1].tolist()
        assert found[name]["adapted"] == pytest.approx(ours, abs=1e-4), name
