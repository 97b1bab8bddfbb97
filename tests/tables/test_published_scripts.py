"""The published table scripts read trees that we write, and give the tables that we make of them, byte for byte."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from table_trees import add_run

from emo_select.ownership import FILES
from emo_select.tables import load_layout, load_tree, make, write_tables

pytestmark = pytest.mark.client
BESIDE = Path(__file__).resolve().parents[3] / "EMO" / "scripts" / "plotting"
MODELS = ("allenai/Emo_1b14b_1T", "allenai/StdMoE_1b14b_1T")
TASKS = ("mmlu_merged_law", "mmlu_merged_history", "mmlu_pro_merged_law", "gsm8k_generation_8shot_merged",
         "arc_easy_merged", "squad_merged")
GENERATED = {"gsm8k_generation_8shot_merged": ("exact_match",), "squad_merged": ("f1", "exact_match", "recall")}


@pytest.fixture(scope="module")
def scripts() -> Path:
    folder = Path(os.environ.get("EMO_SCRIPTS") or BESIDE)
    if not (folder / "get_table_scores_selective_evals_final.py").is_file():
        pytest.skip(f"the published scripts are neither in EMO_SCRIPTS nor in {BESIDE}")
    return folder


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs under the published names: three methods, two keep-k, calibration sizes and repeated draws."""
    root = tmp_path_factory.mktemp("published") / "tree"
    for model in MODELS:
        for task in TASKS:
            for keep_k in (8, 16):
                for method in ("layerwise", "easy_ep", "random"):
                    add(root, model=model, task=task, keep_k=keep_k, method=method)
                for examples, seed in ((1, 0), (5, 0), (5, 1), (100, 2)):
                    add(root, model=model, task=task, keep_k=keep_k, method="layerwise",
                        calibration={"num_examples": examples, "seed": seed})
    return root


def add(root: Path, **spec: Any) -> None:
    """A run whose results have the metrics of its task."""
    for file in add_run(root, **spec).results.rglob("task-*-metrics.json"):
        content = json.loads(file.read_text())
        score = content["metrics"]["primary_score"]
        names = GENERATED.get(spec["task"], ("acc_raw", "acc_per_byte", "softloss_corr"))
        content["metrics"] = {**dict.fromkeys(names, score), "primary_score": score}
        file.write_text(json.dumps(content))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*")
            if path.is_file() and path.name not in (FILES, "problems.csv")}


@pytest.mark.parametrize(("script", "kind", "modes"), [
    ("get_table_scores_selective_evals_final.py", "main", ("last", "first")),
    ("get_table_scores_nselective_ablation.py", "calibration", ("last",)),
])
def test_the_same_tables(script: str, kind: str, modes: tuple[str, ...], scripts: Path, tree: Path, tmp_path: Path
                         ) -> None:
    subprocess.run([sys.executable, scripts / script, "--selective-evals-root", tree, "--output-dir",
                    tmp_path / "theirs"], check=True, capture_output=True)
    tables, _ = make(kind, load_tree(tree), load_layout(), checkpoints=modes)
    write_tables(tables, tmp_path / "ours", "csv")
    ours, theirs = contents(tmp_path / "ours"), contents(tmp_path / "theirs")
    assert theirs and ours.keys() == theirs.keys()
    assert [name for name in theirs if ours[name] != theirs[name]] == []
