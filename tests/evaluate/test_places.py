"""An evaluation replaces no other one's results, and takes away no other one's answers."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from emo_select.checkpoint import resolve
from emo_select.cli.app import app
from emo_select.evaluate import EvalOptions, engine, evaluate_checkpoint
from emo_select.tasks import get_tasks

TASK = "demo_harbor"


def invoke(*words: object) -> str:
    result = CliRunner().invoke(app, ["eval", *map(str, words), "-t", TASK, "--device", "cpu"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def found(folder: Path) -> dict[str, int]:
    """Documents of each metrics file below a folder, by its place."""
    return {str(path.parent.relative_to(folder)): json.loads(path.read_text())["num_instances"]
            for path in folder.rglob("*-metrics.json")}


@pytest.mark.parametrize("where", ["--out", "-o"])
def test_other_settings_lie_apart(tmp_path: Path, where: str) -> None:
    base = tmp_path if where == "--out" else tmp_path / "demoemo" / "evaluations"
    invoke("-m", "demo/emo", where, tmp_path, "--limit", 4)
    told = invoke("-m", "demo/emo", where, tmp_path, "--limit", 3)
    assert "goes to limit-3/" in " ".join(told.split())
    for _ in range(2):
        told = invoke("-m", "demo/emo", where, tmp_path, "--limit", 3, "--num-shots", 1)
    assert "done before" in told
    assert found(base) == {".": 4, "limit-3": 3, "shots-1_limit-3": 3}
    invoke("-m", "demo/emo", where, tmp_path, "--limit", 4, "--force")
    assert found(base) == {".": 4, "limit-3": 3, "shots-1_limit-3": 3}


def test_other_models_lie_apart_and_new_weights_of_one_do_not(tmp_path: Path) -> None:
    shutil.copytree(resolve("demo/emo"), tmp_path / "m")
    out = tmp_path / "out"
    for model in (tmp_path / "m", "demo/stdmoe"):
        invoke("-m", model, "--out", out, "--limit", 3)
    assert len(found(out)) == 2
    (tmp_path / "m" / "generation_config.json").write_text("{ }")
    assert "done before" not in invoke("-m", tmp_path / "m", "--out", out, "--limit", 3)
    assert len(found(out)) == 2


def test_kept_answers_belong_to_one_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [task, other] = get_tasks([TASK, "demo_railway"])
    scored, asked = engine.SharedPrefixLM._packed_scores, []

    def stopping(self: Any, encoded: Any) -> Any:
        asked.append(len(encoded))
        for count, result in enumerate(scored(self, encoded)):
            if count == 5 and len(asked) == 1:
                raise KeyboardInterrupt
            yield result

    monkeypatch.setattr(engine.SharedPrefixLM, "_packed_scores", stopping)
    options = EvalOptions(limit=4, device="cpu")
    with pytest.raises(KeyboardInterrupt):
        evaluate_checkpoint("demo/emo", [task], tmp_path, options)
    [kept] = tmp_path.glob(".responses-*")
    evaluate_checkpoint("demo/stdmoe", [task], tmp_path / "b", options)
    evaluate_checkpoint("demo/emo", [other], tmp_path, options)
    assert list(tmp_path.glob(".responses-*")) == [kept]
    evaluate_checkpoint("demo/emo", [task], tmp_path, options)
    assert asked[-1] == asked[0] - 5
    assert not list(tmp_path.glob(".responses-*"))
