"""`emo-select clusters` and `coverage` as a person types them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from emo_select.analysis.layout import model_folders
from emo_select.cli.app import app
from emo_select.errors import EmoSelectError

Call = Callable[..., Any]
FEW = ["--texts", "demo", "--per-label", "3"]


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Call:
    """`call(*arguments)` in a folder of its own; an error of ours becomes `error`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")

    def run(*arguments: str) -> Any:
        return CliRunner().invoke(app, list(arguments))

    return run


def test_all_of_it_for_two_models(call: Call, tmp_path: Path) -> None:
    planned = call("clusters", "run", "-m", "demo/emo,demo/stdmoe", *FEW, "--k", "4", "--dry-run")
    assert planned.exit_code == 0 and "24 documents" in planned.stdout
    assert not (tmp_path / "cluster_eval_final").exists()
    done = call("clusters", "run", "-m", "demo/emo,demo/stdmoe", *FEW, "--k", "4", "--restarts", "2",
                "--published-layout", "published")
    assert done.exit_code == 0, done.output
    assert all(len(line) <= 80 for line in done.stdout.splitlines() if not line.startswith(("/", "demo/")))
    assert "share of a document in its top cluster" in done.stdout
    folders = model_folders(tmp_path / "cluster_eval_final" / "demo")
    assert [folder.info.model for folder in folders] == ["demo/emo", "demo/stdmoe"]
    assert folders[0].fits()[0].clusters and folders[0].experts and folders[0].measures
    assert (tmp_path / "published" / folders[0].path.name / "embeddings_logits.npy").exists()
    told = call("clusters", "label", "cluster_eval_final/demo", "--json")
    assert [model["model"] for model in json.loads(told.stdout)["models"]] == ["demo/emo", "demo/stdmoe"]
    fits = call("clusters", "fit", "cluster_eval_final/demo", "--k", "3,5", "--restarts", "2", "--json")
    assert [one["k"] for one in json.loads(fits.stdout)] == [3, 5, 3, 5]


def test_coverage(call: Call, tmp_path: Path) -> None:
    done = call("coverage", "-m", "demo/emo", *FEW, "--no-plot", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert len(found["topic_order"]) == 8 and set(found["models"][0]["heatmaps"]) == {"topk_freq", "probs"}


@pytest.mark.parametrize(("arguments", "said"), [
    (["clusters", "run", "-m", "demo/emo", "--texts", "gone.jsonl"], "There are no texts at gone.jsonl"),
    (["clusters", "run", "-m", "demo/emo", *FEW, "--k", "many"], "--k is whole numbers"),
    (["clusters", "run", "-m", "demo/emo", "--texts", "demo", "--per-label", "1", "--doc-tokens", "1", "--k", "9"],
     "9 clusters need at least 9 tokens, but there are 8"),
    (["clusters", "run", "-m", "demo/emo", *FEW, "--method", "dbscan"], "Unknown method 'dbscan'"),
    (["clusters", "fit", "nothing"], "has no extracted model"),
    (["coverage", "-m", "demo/emo", *FEW, "--label", "mood"], "No document has the label 'mood'"),
])
def test_mistakes_are_one_sentence(arguments: list[str], said: str, call: Call) -> None:
    done = call(*arguments)
    assert isinstance(done.exception, EmoSelectError) and done.exception.exit_code == 2
    assert said in str(done.exception) and "\n" not in str(done.exception)


def test_models_with_other_tokenizers(call: Call, tmp_path: Path) -> None:
    import shutil

    from emo_select.checkpoint.sources import resolve

    shutil.copytree(resolve("demo/stdmoe"), tmp_path / "other")
    tokenizer = tmp_path / "other" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace("harbor", "harbour"))
    done = call("clusters", "run", "-m", "demo/emo", "-m", "./other", *FEW)
    assert isinstance(done.exception, EmoSelectError) and "have different tokenizers" in str(done.exception)
