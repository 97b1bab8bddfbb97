"""Kept experts against the number of examples: published numbers, honest numbers, passes that share work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from emo_select.checkpoint import Checkpoint, open_checkpoint
from emo_select.cli.app import app
from emo_select.errors import SpecError
from emo_select.experts import KeepSet, collect_activations, select_from_scores, select_layerwise
from emo_select.experts import calibration_curve as curves
from emo_select.experts.calibration import CalibrationTexts, draw
from emo_select.experts.calibration_curve import Curve, CurveRequest, collect_task, curves_of, markdown

GOLDEN = Path(__file__).parents[1] / "golden"
KEEPSETS = GOLDEN / "keepsets"
SIZES = [1, 5, None]
PROBABILITIES = "avg_probs_per_layer"


@pytest.fixture(scope="module")
def case() -> dict[str, Any]:
    return dict(json.loads((KEEPSETS / "case.json").read_text()))


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return open_checkpoint(GOLDEN / "models" / "emo_shared1")


def golden_curve(case: dict[str, Any], task: str, keep_k: int) -> Curve:
    folder = KEEPSETS / case["folder"] / task / f"keepk-{keep_k}"
    found = {}
    for tag in case["n"]:
        stored = json.loads((folder / f"nprune-{tag}.json").read_text())
        found[tag] = KeepSet(experts=stored["experts_kept_per_layer"], method="layerwise", keep_k=keep_k,
                             num_shared=stored["num_shared_experts"])
    return Curve(case["model"], task, keep_k, found)


def golden_curves(case: dict[str, Any]) -> list[Curve]:
    return [golden_curve(case, task, keep_k) for task in case["tasks"] for keep_k in case["keep_k"]]


def texts_of(case: dict[str, Any], task: str) -> CalibrationTexts:
    ids = case["tasks"][task]
    return CalibrationTexts(ids, ["all"] * len(ids))


def test_published_summaries_from_the_published_kept_sets(case: dict[str, Any]) -> None:
    for curve in golden_curves(case):
        file = KEEPSETS / case["folder"] / curve.task / f"keepk-{curve.keep_k}" / "summary.json"
        assert curves.published_summary(curve) == json.loads(file.read_text())
    theirs = (KEEPSETS / case["folder"] / "summary.md").read_text()
    assert markdown(golden_curves(case), published=True) == theirs


def test_shared_experts_are_left_out_and_raise_the_published_number(case: dict[str, Any]) -> None:
    curve = golden_curve(case, "task_a", 4)
    # layer 0: 3 15 28 (31) against 16 26 28 (31)
    assert curve.overlap("1")[0] == 1 / 5 and curve.overlap("1", shared=True)[0] == 2 / 6
    text = markdown(golden_curves(case))
    keep_ks = [line.split("|")[2].strip() for line in text.splitlines() if line.startswith("| task_a")]
    assert keep_ks == ["4", "8", "16"] * 2 and f"{curve.mean('1'):.3f} (0.567)" in text


def as_tokenized(ids: list[int]) -> list[int]:
    """What the original run made of the prompts' ids.

    It wrote id 17 as the word t17 and read the words back with a tokenizer whose padding token is t1 (id 1). An added
    token is found inside of words, too, so each of t10 … t19 came back as t1 and an unknown rest, which is id 1 again.
    """
    return [token for one in ids for token in ([1, 1] if 10 <= one < 20 else [one])]


@pytest.mark.parametrize("task", ["task_a", "task_b"])
def test_selecting_equals_the_published_files(case: dict[str, Any], checkpoint: Checkpoint, tmp_path: Path, task: str
                                              ) -> None:
    texts = CalibrationTexts([as_tokenized(ids) for ids in case["tasks"][task]], ["all"] * len(case["tasks"][task]))
    made = collect_task(checkpoint, CurveRequest(case["model"], case["keep_k"], SIZES), task, texts, tmp_path)
    own, theirs = tmp_path / case["folder"], KEEPSETS / case["folder"]
    files = sorted(path.relative_to(theirs) for path in (theirs / task).rglob("*.json"))
    assert sorted(path.relative_to(own) for path in (own / task).rglob("*-*/[!.]*.json")) == files
    for file in files:
        ours, golden = (json.loads((root / file).read_text()) for root in (own, theirs))
        assert list(ours) == list(golden)
        assert [ours[key] for key in golden if key != PROBABILITIES] == [
            golden[key] for key in golden if key != PROBABILITIES]
        for layer, expected in enumerate(golden.get(PROBABILITIES, [])):
            assert ours[PROBABILITIES][layer] == pytest.approx(expected, abs=5e-6)
    assert [curve.examples for curve in made] == [{"1": 1, "5": 5, "all": 12}] * 3


@pytest.mark.parametrize("method", ["layerwise", "easy_ep"])
def test_every_size_equals_its_own_selection(case: dict[str, Any], checkpoint: Checkpoint, tmp_path: Path, method: str
                                             ) -> None:
    texts = texts_of(case, "task_a")
    [curve] = collect_task(checkpoint, CurveRequest("m", [6], [1, 5, 40, None], method), "task_a", texts, tmp_path)
    assert list(curve.keep_sets) == ["1", "5", "40", "all"] and curve.examples["40"] == 12
    for tag, size in zip(("1", "5", "40", "all"), (1, 5, 40, None), strict=True):
        chosen = [texts.token_ids[i] for i in draw(12, size, 0)]
        alone = (select_layerwise(checkpoint, chosen, [6])[6] if method == "layerwise" else
                 select_from_scores(collect_activations(checkpoint, chosen), method, 6, checkpoint.config))
        assert curve.keep_sets[tag].experts == alone.experts


def test_a_stopped_call_goes_on_and_other_texts_start_anew(
    case: dict[str, Any], checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[int] = []

    def counted(model: Checkpoint, token_ids: Any, *args: Any, **kwargs: Any) -> Any:
        passes.append(len(token_ids))
        if len(passes) == 3:
            raise KeyboardInterrupt
        return select_layerwise(model, token_ids, *args, **kwargs)

    monkeypatch.setattr("emo_select.experts.layerwise.select_layerwise", counted)
    request, texts = CurveRequest("m", [4], SIZES), texts_of(case, "task_a")
    with pytest.raises(KeyboardInterrupt):
        collect_task(checkpoint, request, "task_a", texts, tmp_path)
    collect_task(checkpoint, request, "task_a", texts, tmp_path)
    assert passes == [1, 5, 12, 12]
    collect_task(checkpoint, request, "task_a", texts_of(case, "task_b"), tmp_path)
    assert passes[4:] == [1, 5, 12]
    (tmp_path / "m" / "task_a" / "made_from.json").unlink()
    with pytest.raises(SpecError, match="did not write"):
        collect_task(checkpoint, request, "task_a", texts, tmp_path)


def test_existing_selections_are_grouped(case: dict[str, Any]) -> None:
    kept = golden_curve(case, "task_a", 8).keep_sets
    stored = [one.model_copy(update={"task": "t", "num_examples": n, "method": method})
              for method in ("layerwise", "easy_ep", "random") for n, one in zip(SIZES, kept.values(), strict=True)]
    found = curves_of([*stored, stored[0].model_copy(update={"seed": 1})])
    assert [(curve.note, list(curve.keep_sets)) for curve in found] == [("", ["1", "5", "all"]),
                                                                        ("easy_ep", ["1", "5", "all"])]
    assert found[0].mean("5") == golden_curve(case, "task_a", 8).mean("5")
    with pytest.raises(SpecError, match="No two"):
        curves_of(stored[:1])


def test_command(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install 'emo-select[plots]'")
    base = ["inspect", "--calibration-curve", "--model", "demo/emo", "--task", "demo_railway", "--keep-k", "8"]
    result = CliRunner().invoke(app, [*base, "--num-examples", "1,2", "--out", str(tmp_path), "--json"])
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert data["curves"][0]["reference"] == "2" and data["curves"][0]["mean"]["2"] == 1.0
    names = {Path(file).name for file in data["files"]}
    assert names == {"summary.md", "curve.json", "calibration_curve.png", "calibration_curve.pdf"}
    assert all(Path(file).stat().st_size > 100 for file in data["files"])
    for options, words in ((["--num-examples", "1"], "at least two"), (["--num-examples", "0,5"], "1 or more"),
                           (["--method", "random"], "sees examples")):
        with pytest.raises(SpecError, match=words):
            CliRunner().invoke(app, [*base, *options, "--out", str(tmp_path)], catch_exceptions=False)
