"""`activations`, `select` and `inspect` as a user types them, and what they show."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from emo_select.cli.select import register
from emo_select.errors import EmoSelectError, KeepKError, SpecError
from emo_select.experts import KeepSet
from emo_select.experts.inspect import find_selections, jaccard, layer_views, mean_coverage, overlaps
from emo_select.ownership import FILES

PNG = b"\x89PNG\r\n\x1a\n"
TEXTS = ["w5 w6 w7 w8", "w9 w10", "w30 w31 w32 w33 w34", "w40 w41 w5"]


@pytest.fixture(autouse=True)
def texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("own.txt").write_text("\n".join(TEXTS))


def call(*words: str) -> str:
    app = typer.Typer()
    register(app)
    done = CliRunner().invoke(app, list(words), catch_exceptions=True)
    if isinstance(done.exception, EmoSelectError):
        raise done.exception
    assert done.exit_code == 0, (done.output, done.exception)
    return done.stdout


def kept(path: Path) -> Any:
    return KeepSet.load(path).experts


def test_own_texts_for_several_keep_k_and_methods(tiny: Path) -> None:
    output = call("select", "-m", str(tiny), "--calibration", "own.txt", "-k", "4,25%,(full)".replace("(full)", "full"),
                  "--method", "layerwise,easy_ep,random", "--out", "out", "--plot", "--json")
    data = json.loads(output)
    names = {entry["name"]: entry for entry in data["selections"]}
    assert len(names) == 9
    four = next(entry for name, entry in names.items() if name.endswith("layerwise_keepk_4"))
    assert four["task"] == "own.txt" and four["keep_k"] == 4 and 0 < four["coverage"] < 1
    assert [len(layer) for layer in kept(Path(data["files"][0]))] == [4] * 4
    pictures = [Path(path) for path in data["files"] if path.endswith(".png")]
    assert len(pictures) == 2 + 3 + 1  # layerwise 4 and 8, easy_ep, the overlaps; random and full have no scores
    assert all(picture.read_bytes().startswith(PNG) for picture in pictures)
    assert not list(Path("out").rglob("*.partial"))


def test_run_tree_shares_statistics_and_skips_what_is_done(tiny: Path) -> None:
    words = ("select", "-m", str(tiny), "-t", "demo_harbor", "-n", "3", "-k", "4,8", "--method", "layerwise,reap,ean",
             "-o", "tree")
    first = call(*words).splitlines()
    files = [Path(line) for line in first if line.endswith("selection.json")]
    assert len(files) == 6
    (scores,) = Path("tree").rglob("scores.json")
    before = {path: path.stat().st_mtime_ns for path in (*files, scores)}
    call(*words)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert call("activations", "-m", str(tiny), "-t", "demo_harbor", "-n", "3", "-o", "tree").strip() == str(
        scores.parent)


def test_mixed_tasks(tiny: Path) -> None:
    base = ("select", "-m", str(tiny), "-n", "3", "-k", "4", "--method", "reap")
    for name, weights in (("a", "1000:1"), ("b", "1:1000")):
        first, second = weights.split(":")
        call(*base, "-t", f"demo_harbor:{first}", "-t", f"demo_kitchen:{second}", "--out", name)
    for name, task in (("a", "demo_harbor"), ("b", "demo_kitchen")):
        call(*base, "-t", task, "--out", f"only-{name}")
        mixed, alone = KeepSet.load(Path(name, "selection.json")), KeepSet.load(Path(f"only-{name}", "selection.json"))
        assert mixed.experts == alone.experts
        assert mixed.task == "demo_harbor+demo_kitchen"


def test_schedule(tiny: Path) -> None:
    call("select", "-m", str(tiny), "--calibration", "own.txt", "--schedule", "8-6-4-32", "--out", "out")
    assert [len(layer) for layer in kept(Path("out/selection.json"))] == [8, 6, 4, 32]
    assert KeepSet.load(Path("out/selection.json")).schedule == (8, 6, 4, 32)


@pytest.mark.parametrize(("words", "kind", "message"), [
    (["-t", "demo_harbor:2", "-t", "demo_kitchen:1", "-k", "4"], SpecError, "--out"),
    (["--calibration", "own.txt", "-k", "4"], SpecError, "--out"),
    (["--out", "x", "-k", "4"], SpecError, "nothing to calibrate on"),
    (["--out", "x", "--calibration", "own.txt"], SpecError, "--keep-k"),
    (["--out", "x", "--calibration", "own.txt", "-k", "1"], KeepKError, "shared"),
    (["--out", "x", "--calibration", "own.txt", "--schedule", "8-x"], KeepKError, "one number per layer"),
    (["--out", "x", "--calibration", "own.txt", "-k", "4", "--method", "reap", "--score", "ean"], SpecError, "--score"),
])
def test_mistakes(tiny: Path, words: list[str], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        call("select", "-m", str(tiny), *words)
    assert not Path("x").exists()


def test_several_processes_need_out(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SpecError, match=r"torchrun.*--out"):
        call("select", "-m", str(tiny), "-t", "demo_harbor", "-k", "4", "-o", "tree")
    assert not Path("tree").exists()


def test_activations_of_own_texts(tiny: Path) -> None:
    data = json.loads(call("activations", "-m", str(tiny), "--calibration", "own.txt", "--out", "stats", "--json"))
    assert data[0]["tokens"] == [14] and data[0]["experts_per_layer"] == [32] * 4
    assert data[0]["model"] == str(tiny)


def keep_set(*layers: tuple[int, ...] | None, scores: Any = None, shared: int = 0) -> KeepSet:
    return KeepSet(experts=layers, method="reap", keep_k=2, num_shared=shared, score="reap", scores=scores)


def test_coverage_and_overlap_by_hand() -> None:
    scores = (None, (0.5, 0.1, 0.1, 0.3, 9.0), (0.0, 0.0, 0.0, 0.0, 1.0))
    first = keep_set(None, (0, 3, 4), (0, 1, 4), scores=scores, shared=1)
    second = keep_set(None, (0, 1, 4), (0, 1, 4), shared=1)
    assert [(view.layer, view.kept, view.best) for view in layer_views(first)] == [(1, 3, 0), (2, 3, 0)]
    assert layer_views(first)[0].coverage == pytest.approx(0.8)
    assert layer_views(first)[1].coverage is None  # no routed score at all
    assert mean_coverage(second) is None
    assert jaccard(first, second) == [None, pytest.approx(1 / 3), 1.0]
    (overlap,) = overlaps({"a": first, "b": second, "other model": keep_set((0, 1), (0, 1), (0, 1))})
    assert (overlap.first, overlap.second, overlap.mean) == ("a", "b", pytest.approx(2 / 3))


def test_inspect_shows_odd_names_as_they_are() -> None:
    scores = ((0.5, 0.1, 0.1, 0.3), (0.1, 0.2, 0.3, 0.4))
    for name in ("[red]a$b$", "plain"):
        keep_set((0, 3), (2, 3), scores=scores).save(Path("runs", name, "selection.json"))
    (Path("runs") / ".hidden").mkdir()
    keep_set((0, 3), (2, 3)).save(Path("runs", ".hidden", "selection.json"))
    output = call("inspect", "runs", "--out", "pictures")
    assert "[red]a$b$: reap, keep-k 2, coverage 0.750 of reap" in output
    assert {path.name for path in Path("pictures").iterdir()} == {"[red]a$b$.png", "plain.png", "overlaps.png", FILES}
    assert find_selections([Path("runs")]).keys() == {"[red]a$b$", "plain"}
    with pytest.raises(SpecError, match="select experts first"):
        call("inspect", "pictures")
