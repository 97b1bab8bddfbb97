"""What the shipped pair is for: measured on held-out test rows, with the engine that users run."""

from __future__ import annotations

from pathlib import Path
from statistics import mean

import pytest

from emo_select.demo import DEMO_MODELS, demo_task_names
from emo_select.evaluate import EvalOptions, sweep_keep_k
from emo_select.evaluate.curve import choose
from emo_select.experts import StreamOptions
from emo_select.spec import Calibration
from emo_select.tasks import get_tasks

FULL, EIGHTH = 32, 4  # experts per layer; 12.5 % of them, the shared one included
ROWS = 40  # test rows per task, of 80


def accuracy(model: str, method: str, keep_ks: tuple[int, ...], folder: Path) -> dict[int, float]:
    """Mean primary score over all demo tasks, per keep-k."""
    tasks = get_tasks(demo_task_names())
    kept = {task.name: choose(f"demo/{model}", task, method, keep_ks, Calibration(), StreamOptions())
            for task in tasks}
    points = sweep_keep_k(f"demo/{model}", tasks, kept, folder, EvalOptions(limit=ROWS, device="cpu"))
    return {keep_k: mean(point.value for point in points if point.keep_k == keep_k) for keep_k in keep_ks}


@pytest.fixture(scope="module")
def layerwise(tmp_path_factory) -> dict[str, dict[int, float]]:
    folder = tmp_path_factory.mktemp("layerwise")
    return {model: accuracy(model, "layerwise", (EIGHTH, FULL), folder / model) for model in DEMO_MODELS}


def test_both_full_models_know_the_tasks(layerwise):
    assert min(scores[FULL] for scores in layerwise.values()) >= 0.95


def test_emo_keeps_its_accuracy_with_an_eighth_of_the_experts(layerwise):
    assert layerwise["emo"][EIGHTH] >= 0.95 * layerwise["emo"][FULL]


def test_the_standard_model_loses_more_than_half(layerwise):
    assert layerwise["stdmoe"][EIGHTH] < 0.5 * layerwise["stdmoe"][FULL]


def test_easy_ep_finds_the_experts_of_emo_too(layerwise, tmp_path):
    assert accuracy("emo", "easy_ep", (EIGHTH,), tmp_path)[EIGHTH] >= 0.95 * layerwise["emo"][FULL]


def test_random_experts_are_far_worse(layerwise, tmp_path):
    assert accuracy("emo", "random", (EIGHTH,), tmp_path)[EIGHTH] < 0.5 * layerwise["emo"][EIGHTH]
