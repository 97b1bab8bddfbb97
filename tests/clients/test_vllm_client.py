"""vLLM's real engine on checkpoints as we write them, and `eval --backend vllm` beside the default backend."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from made_checkpoints import expected, prompts, prune, save_emo, save_stock

pytestmark = pytest.mark.client
NEW_TOKENS = 8


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """EMO pruned to 16 and below top-k, in shards, without a shared expert; three stock families."""
    root = tmp_path_factory.mktemp("checkpoints")
    emo = save_emo(root / "emo")
    plain = save_emo(root / "plain", num_experts=16, num_shared_experts=0)
    qwen = save_stock("Qwen3Moe", root / "qwen", num_experts=16, moe_intermediate_size=32, head_dim=32)
    olmoe = save_stock("Olmoe", root / "olmoe", num_experts=16)
    return {
        "emo_16": prune(emo, root / "emo_16", 16), "emo_3": prune(emo, root / "emo_3", 3),
        "emo_shards": prune(emo, root / "emo_shards", 16, max_shard_size="300KB"),
        "emo_no_shared": prune(plain, root / "emo_no_shared", 6),
        "qwen3_moe": prune(qwen, root / "qwen3_moe", 6), "olmoe": prune(olmoe, root / "olmoe", 6),
    }


def test_vllm_gives_the_same_numbers(checkpoints: dict[str, Path], ask: Any) -> None:
    job = {"models": {name: str(path) for name, path in checkpoints.items()}, "rows": prompts(),
           "new_tokens": NEW_TOKENS}
    answers = ask("vllm", job)
    for name, path in checkpoints.items():
        for seen, wanted in zip(answers[name], expected(path, job["rows"], NEW_TOKENS), strict=True):
            assert seen["log_probabilities"] == pytest.approx(wanted["log_probabilities"], abs=1e-4), name
            assert seen["tokens"] == wanted["tokens"], name
