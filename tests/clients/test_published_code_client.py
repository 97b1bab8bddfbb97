"""The published remote code on transformers 4.57 reads what we write: no tensor missing, the same numbers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from made_checkpoints import expected, prompts, prune, put_back, save_emo, train

from emo_select.spec import Lora

pytestmark = pytest.mark.client
NEW_TOKENS = 8
ROOT = Path(__file__).resolve().parents[2]
BESIDE = ROOT.parent / "EMO" / "src" / "hf_trust_remote_code" / "emo"


@pytest.fixture(scope="module")
def remote_code() -> Path:
    """The folder of modeling_emo.py, from the published repository beside the checkout."""
    folder = Path(os.environ.get("EMO_REMOTE_CODE") or BESIDE)
    if not (folder / "modeling_emo.py").is_file():
        pytest.skip(f"the published remote code is neither in EMO_REMOTE_CODE nor in {BESIDE}")
    return folder


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pruned in several ways, finetuned, with an adapter merged, merged back; other layouts of experts."""
    root = tmp_path_factory.mktemp("checkpoints")
    emo, plain = save_emo(root / "emo"), save_emo(root / "plain", num_experts=16, num_shared_experts=0)
    active = save_emo(root / "active", num_experts=16, num_shared_experts=0, always_active_experts=[2, 5])
    dense = save_emo(root / "dense", num_experts_per_layer=[0, 16], num_shared_experts_per_layer=[0, 1],
                     dense_intermediate_size=48)
    pruned = prune(emo, root / "pruned", 16)
    tuned = train(pruned, root / "tuned")
    return {
        "pruned": pruned, "below_top_k": prune(emo, root / "below", 3), "everything": prune(emo, root / "all", 32),
        "shards": prune(emo, root / "shards", 16, max_shard_size="300KB"), "twice": prune(pruned, root / "twice", 8),
        "no_shared": prune(plain, root / "no_shared", 6), "always_active": prune(active, root / "always", 6),
        "dense_first": prune(dense, root / "dense_first", 6), "finetuned": tuned,
        "adapter": train(pruned, root / "lora", lora=Lora(rank=2, merge=True)),
        "merged_back": put_back(tuned, emo, root / "merged_back"),
    }


def test_published_code_gives_the_same_numbers(checkpoints: dict[str, Path], remote_code: Path, ask: Any) -> None:
    rows = prompts(2)
    found = ask("published", {"models": {name: str(path) for name, path in checkpoints.items()},
                              "code": str(remote_code), "rows": rows, "new_tokens": NEW_TOKENS})
    for name, path in checkpoints.items():
        assert found[name]["missing_keys"] == found[name]["unexpected_keys"] == [], name
        for seen, wanted in zip(found[name]["answers"], expected(path, rows, NEW_TOKENS), strict=True):
            assert seen["log_probabilities"] == pytest.approx(wanted["log_probabilities"], abs=1e-4), name
            assert seen["tokens"] == wanted["tokens"], name
