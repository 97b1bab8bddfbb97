"""vLLM's real engine on checkpoints as we write them, and `eval --backend vllm` beside the default backend."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from client_calls import HERE, in_environment
from made_checkpoints import DEMO, expected, prompts, prune, put_back, save_emo, save_stock, train, with_wider_heads

from emo_select.evaluate import EvalOptions, evaluate_checkpoint
from emo_select.spec import Lora
from emo_select.tasks import get_tasks

pytestmark = [pytest.mark.client, pytest.mark.timeout(3600)]
NEW_TOKENS = 8
DEMO_TASKS = ("demo_harbor", "demo_kitchen", "demo_museum", "demo_orchard", "demo_railway", "demo_theater",
              "demo_village", "demo_workshop")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """EMO pruned in several ways, finetuned, with an adapter merged, merged back, in other layouts; stock families."""
    root = tmp_path_factory.mktemp("checkpoints")
    emo = save_emo(root / "emo")
    plain = save_emo(root / "plain", num_experts=16, num_shared_experts=0)
    qwen = save_stock("Qwen3Moe", root / "qwen", num_experts=16, moe_intermediate_size=32, head_dim=32)
    olmoe = save_stock("Olmoe", root / "olmoe_full", num_experts=16)
    uneven = save_emo(root / "uneven_full", num_experts_per_layer=[0, 16, 8], num_shared_experts_per_layer=[0, 1, 2],
                      num_hidden_layers=3, dense_intermediate_size=48, dense_mlp_bias=True)
    other = save_emo(root / "other_full", attention_bias=True, head_dim=64, tie_word_embeddings=True, num_experts=16,
                     num_key_value_heads=1)
    active = save_emo(root / "active_full", num_experts=16, num_shared_experts=0, always_active_experts=[2, 5])
    mixtral = save_stock("Mixtral", root / "mixtral_full", num_local_experts=8, num_experts_per_tok=2)
    pruned = prune(emo, root / "emo_16", 16)
    tuned = train(pruned, root / "tuned")
    return {
        "emo_16": pruned, "emo_finetuned": tuned, "emo_merged_back": put_back(tuned, emo, root / "merged_back"),
        "emo_adapter": train(pruned, root / "lora", lora=Lora(rank=2, merge=True)),
        "mixtral": prune(mixtral, root / "mixtral", 6),
        "emo_dense_first_uneven": prune(uneven, root / "uneven", 6),
        "emo_biases_head_size_tied": prune(other, root / "other", 6),
        "emo_always_active": prune(active, root / "active", 6),
        "emo_3": prune(emo, root / "emo_3", 3),
        "emo_shards": prune(emo, root / "emo_shards", 16, max_shard_size="300KB"),
        "emo_no_shared": prune(plain, root / "emo_no_shared", 6),
        "qwen3_moe": prune(qwen, root / "qwen3_moe", 6), "olmoe": prune(olmoe, root / "olmoe", 6),
    }


@pytest.mark.parametrize("release", ["vllm", "vllm_oldest"])
def test_vllm_gives_the_same_numbers(release: str, checkpoints: dict[str, Path], ask: Any) -> None:
    job = {"models": {name: str(path) for name, path in checkpoints.items()}, "rows": prompts(),
           "new_tokens": NEW_TOKENS}
    answers = ask(release, job)
    for name, path in checkpoints.items():
        for seen, wanted in zip(answers[name], expected(path, job["rows"], NEW_TOKENS), strict=True):
            assert seen["log_probabilities"] == pytest.approx(wanted["log_probabilities"], abs=1e-4), name
            assert seen["tokens"] == wanted["tokens"], name


def test_eval_with_vllm_equals_the_default_backend(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """By choice and by generation, on a context shorter than the default length, which is said."""
    tasks, model = ("demo_railway", "demo_theater"), checkpoints["emo_16"]
    done = in_environment("vllm", "-m", "emo_select", "eval", "--model", str(model), "--task", ",".join(tasks),
                          "--limit", "12", "--backend", "vllm", "--output-dir", str(tmp_path / "vllm"))
    assert "512 tokens" in done.stderr
    evaluate_checkpoint(model, get_tasks(list(tasks)), tmp_path / "hf", EvalOptions(limit=12, device="cpu"))
    for task in tasks:
        ours, theirs = (predictions(tmp_path / backend, task) for backend in ("hf", "vllm"))
        assert len(ours) == 12
        assert numbers(theirs) == pytest.approx(numbers(ours), abs=1e-3)
        assert [row.get("doc_id") for row in theirs] == [row.get("doc_id") for row in ours]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped demo with heads of 32 instead of 16, and the same logits."""
    wide = with_wider_heads(DEMO, tmp_path_factory.mktemp("demo") / "wide", 32)
    rows = prompts(2)
    for seen, wanted in zip(expected(wide, rows, NEW_TOKENS), expected(DEMO, rows, NEW_TOKENS), strict=True):
        assert seen["log_probabilities"] == pytest.approx(wanted["log_probabilities"], abs=1e-4)
        assert seen["tokens"] == wanted["tokens"]
    return wide


def test_every_demo_task_killed_and_resumed(demo: Path, tmp_path: Path) -> None:
    """Four by choice and four by generation; killed within the first, within a later one, and finished."""
    command = ["eval", "--model", str(demo), "--task", ",".join(DEMO_TASKS), "--limit", "24", "--backend", "vllm",
               "--dtype", "float32", "--output-dir", str(tmp_path / "vllm")]
    for after, finished in ((40, 0), (300, 2)):
        in_environment("vllm", HERE / "killed_eval.py", str(after), *command, code=-9)
        assert len(list(tmp_path.rglob("task-*-metrics.json"))) >= finished
        assert list(tmp_path.rglob(".responses-*.jsonl"))
    done = in_environment("vllm", "-m", "emo_select", *command)
    assert "done before" in done.stderr and not list(tmp_path.rglob(".responses-*.jsonl"))
    evaluate_checkpoint(demo, get_tasks(list(DEMO_TASKS)), tmp_path / "hf", EvalOptions(limit=24, device="cpu"))
    for task in DEMO_TASKS:
        ours, theirs = (predictions(tmp_path / backend, task) for backend in ("hf", "vllm"))
        assert len(ours) == 24
        assert numbers(theirs) == pytest.approx(numbers(ours), abs=1e-3), task


def test_what_vllm_cannot_run_is_one_sentence(tmp_path: Path) -> None:
    done = in_environment("vllm", "-m", "emo_select", "eval", "--model", "demo/emo", "--task", "demo_railway",
                          "--limit", "1", "--backend", "vllm", "--output-dir", str(tmp_path / "out"), code=2)
    assert "Traceback" not in done.stderr and "attention heads of 32" in done.stderr and "--backend hf" in done.stderr


def predictions(folder: Path, task: str) -> list[dict[str, Any]]:
    file = next(folder.rglob(f"task-{task}-predictions.jsonl"))
    return [json.loads(line) for line in file.read_text().splitlines()]


def numbers(rows: list[dict[str, Any]]) -> list[float]:
    """Every number of the metrics, row by row."""
    return [value for row in rows for _, value in sorted(row["metrics"].items()) if isinstance(value, int | float)]
