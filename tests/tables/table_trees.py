"""Run trees for tests and benchmarks, written with the package's own records and keep sets."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from emo_select.experts.keepset import KeepSet
from emo_select.record import RunRecord, StageRecord
from emo_select.spec import RunSpec
from emo_select.storage import write_json
from emo_select.tree import RunPaths, Tree

EXPERTS, LAYERS = 16, 4


def add_run(root: Path, *, docs: int = 40, trained: bool = True, **fields: Any) -> RunPaths:
    """One finished run: record, keep set, results and predictions before and after finetuning.

    Which documents are right depends on the keep-k alone, so that a larger keep-k is right wherever a smaller one is.
    """
    spec = RunSpec.parse({"model": "demo/emo", "task": "demo_lookup", "keep_k": EXPERTS, **fields})
    paths = Tree(root).run(spec)
    paths.directory.mkdir(parents=True)
    draw = random.Random(spec.directory_name)
    if spec.selects:
        _keep_set(spec, draw).save(paths.selection)
    write_json(paths.record, _record(spec, draw, trained).model_dump(mode="json"))
    for step in (0, 20) if trained else (0,):
        _results(paths.result(step), spec, docs, bonus=step // 10)
    return paths


def _keep_set(spec: RunSpec, draw: random.Random) -> KeepSet:
    kept = tuple(tuple(sorted({*draw.sample(range(EXPERTS - 1), min(spec.keep_k, EXPERTS) - 1), EXPERTS - 1}))
                 for _ in range(LAYERS))
    scores = tuple(tuple(round(draw.random(), 6) for _ in range(EXPERTS)) for _ in range(LAYERS))
    return KeepSet(experts=kept, method=spec.method, keep_k=spec.keep_k, num_shared=1, scores=scores, task=spec.task)


def _record(spec: RunSpec, draw: random.Random, trained: bool) -> RunRecord:
    history = [{"step": step, "loss": 3 / (1 + step / 5) + draw.random() / 10} for step in range(1, 21)]
    stages = {
        "select": _stage(2.5), "prune": _stage(0.4, {"selected_model/model.safetensors": 250_000 * spec.keep_k}),
        "eval/checkpoint-0": _stage(4.0),
    }
    if trained:
        stages |= {"finetune": _stage(31.0, notes={"history": history}), "eval/checkpoint-20": _stage(4.2)}
    return RunRecord(spec=spec, stages=stages)


def _stage(seconds: float, outputs: dict[str, int] | None = None, notes: dict[str, Any] | None = None) -> StageRecord:
    return StageRecord(fingerprint="f" * 16, started="2026-01-02T03:04:05+00:00", seconds=seconds, host="node1",
                       peak_memory=640_000_000, commit="0123456789abcdef", outputs=outputs or {}, notes=notes or {})


def _results(folder: Path, spec: RunSpec, docs: int, bonus: int) -> None:
    """Document d is right if d % EXPERTS < keep-k + bonus - 1."""
    right = [int(doc % EXPERTS < spec.keep_k + bonus - 1) for doc in range(docs)]
    share = sum(right) / docs
    write_json(folder / f"task-{_file_name(spec.task)}_test-metrics.json", {
        "task_name": f"{spec.task}:test", "num_instances": docs, "task_config": {"primary_metric": "acc_raw"},
        "metrics": {"acc_raw": share, "primary_score": share, "extra_metrics": {"no_answer": 0}},
        "standard_errors": {"acc_raw": 0.05, "primary_score": 0.05},
    })
    lines = [json.dumps(_prediction(doc, score)) for doc, score in enumerate(right)]
    (folder / f"task-{_file_name(spec.task)}_test-predictions.jsonl").write_text("\n".join(lines) + "\n")


def _file_name(task: str) -> str:
    return task.replace("/", "_")


def _prediction(doc: int, score: int) -> dict[str, Any]:
    return {"doc_id": doc, "native_id": f"id-{doc}", "label": 1,
            "metrics": {"acc_raw": score, "predicted_index_raw": score}, "model_output": [{"sum_logits": -1.0}]}


def demo_tree(root: Path, *, models: Sequence[str] = ("demo/emo", "demo/stdmoe"), keep_ks: Sequence[int] = (16, 8, 4),
              methods: Sequence[str] = ("layerwise", "random"), tasks: Sequence[str] = ("demo_lookup", "demo_copy"),
              ) -> Path:
    """A small complete sweep; keeping every expert is run under the first method only, as `run` does."""
    for model in models:
        for task in tasks:
            for keep_k in keep_ks:
                for method in methods if keep_k < EXPERTS else methods[:1]:
                    add_run(root, model=model, task=task, keep_k=keep_k, method=method)
    return root
