"""vLLM on a GPU, in the environment of the tests (pip install 'emo-select[vllm]'): bfloat16, graphs, several GPUs."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from client_calls import HERE
from made_checkpoints import expected, prompts, prune, save_emo

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM beside emo-select"),
]


@pytest.mark.parametrize("ranks", [1, 2])
def test_bfloat16_and_tensor_parallel_stay_near_float32(ranks: int, tmp_path: Path) -> None:
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} GPUs")
    emo = save_emo(tmp_path / "emo", num_attention_heads=4, num_key_value_heads=2, head_dim=64)
    uneven = save_emo(tmp_path / "uneven", num_experts_per_layer=[0, 16], num_shared_experts_per_layer=[0, 1],
                      dense_intermediate_size=64, attention_bias=True, head_dim=64)
    models = {"even": prune(emo, tmp_path / "even", 16), "uneven": prune(uneven, tmp_path / "pruned_uneven", 6)}
    rows = prompts()
    job = {"models": {name: str(path) for name, path in models.items()}, "rows": rows, "new_tokens": 4,
           "options": {"dtype": "bfloat16", "tensor_parallel_size": ranks, "gpu_memory_utilization": 0.3}}
    (tmp_path / "job.json").write_text(json.dumps(job))
    subprocess.run([sys.executable, HERE / "ask_vllm.py", tmp_path / "job.json", tmp_path / "answer.json"], check=True)
    answers = json.loads((tmp_path / "answer.json").read_text())
    for name, path in models.items():
        for seen, wanted in zip(answers[name], expected(path, rows, 4), strict=True):
            differences = [abs(a - b) for a, b in zip(seen["log_probabilities"], wanted["log_probabilities"],
                                                      strict=True)]
            assert sum(differences) / len(differences) < 0.1, name
