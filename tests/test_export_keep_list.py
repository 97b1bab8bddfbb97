"""Keep sets in the forms of other programs, read back as those programs read them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from emo_select import prune_checkpoint
from emo_select.cli.app import app
from emo_select.errors import CheckpointError, KeepKError, OwnershipError, UnknownNameError
from emo_select.experts.keepset import KeepSet
from emo_select.export.keep_list import Layer, keep_list, prune_ratio

KEPT = ((1, 4, 31), (0, 4, 31), (2, 3, 31))
SCORES = tuple(tuple(float((expert * 7 + layer) % 32) for expert in range(32)) for layer in range(3))


def selection(folder: Path, **changes: object) -> Path:
    about = {"experts": KEPT, "method": "easy_ep", "keep_k": 3, "num_shared": 1, "scores": SCORES, "model": "demo/emo"}
    KeepSet(**(about | changes)).save(folder / "selection.json")
    return folder / "selection.json"


def lines(text: str) -> dict[int, list[int]]:
    """As vLLM-Ascend reads it: one single-key object a line, each layer once, no expert twice."""
    found: dict[int, list[int]] = {}
    for line in text.splitlines():
        [(layer, experts)] = json.loads(line).items()
        assert int(layer) not in found and len(set(experts)) == len(experts)
        found[int(layer)] = experts
    return found


def test_jsonl_lists_the_kept_experts_best_first(tmp_path: Path) -> None:
    found = lines(keep_list(selection(tmp_path), "jsonl"))
    assert found.keys() == {0, 1, 2}
    for layer, experts in found.items():
        assert sorted(experts) == list(KEPT[layer])
        assert experts == sorted(experts, key=lambda expert, layer=layer: -SCORES[layer][expert])


def test_ordered_lists_everything_and_says_the_ratio(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = lines(keep_list(selection(tmp_path), "ordered"))
    ratio = float(capsys.readouterr().err.partition("with this list is ")[2].partition(":")[0])
    for layer, experts in found.items():
        assert sorted(experts) == list(range(32))
        assert set(experts[:int(32 * (1 - ratio))]) == set(KEPT[layer])


@pytest.mark.parametrize("count", [7, 8, 60, 64, 128, 160, 256, 384])
def test_the_ratio_keeps_the_right_number_whatever_floats_do(count: int) -> None:
    for kept in range(1, count + 1):
        ratio = prune_ratio({0: Layer(count, range(kept))})
        assert 0 <= ratio < 1 and int(count * (1.0 - ratio)) == kept


def test_a_mask_has_a_row_for_each_moe_layer(tmp_path: Path) -> None:
    rows = json.loads(keep_list(selection(tmp_path), "mask"))
    assert [[i for i, kept in enumerate(row) if kept] for row in rows] == [list(kept) for kept in KEPT]
    assert {len(row) for row in rows} == {32}


def test_a_profile_names_what_is_dropped(tmp_path: Path) -> None:
    profile = json.loads(keep_list(selection(tmp_path), "profile"))
    assert profile["version"] == 1
    dropped = {(layer, expert) for layer, expert in profile["pruned_experts"]}
    assert dropped == {(layer, expert) for layer in range(3) for expert in range(32) if expert not in KEPT[layer]}


def test_dense_layers_are_left_out_and_numbers_stay(tmp_path: Path) -> None:
    config = {"model_type": "emo", "num_hidden_layers": 2, "hidden_size": 8, "num_experts_per_layer": [0, 4],
              "num_shared_experts_per_layer": [0, 0], "num_experts_per_tok": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    path = selection(tmp_path, experts=(None, (1, 2)), scores=None, num_shared=0, keep_k=2, model=str(tmp_path))
    assert lines(keep_list(path, "jsonl")) == {1: [1, 2]}
    assert json.loads(keep_list(path, "mask")) == [[0, 1, 1, 0]]


def test_pruned_models_speak_of_the_first_original(tmp_path: Path) -> None:
    prune_checkpoint("demo/emo", KeepSet.load(selection(tmp_path)), tmp_path / "once")
    again = KeepSet(experts=((0, 2),) * 3, method="random", keep_k=2, num_shared=1)
    prune_checkpoint(tmp_path / "once", again, tmp_path / "twice")
    assert lines(keep_list(tmp_path / "twice", "jsonl")) == {0: [1, 31], 1: [0, 31], 2: [2, 31]}


def test_what_cannot_be_written_is_said(tmp_path: Path) -> None:
    path = selection(tmp_path, experts=((1, 4, 31), (0, 31), (2, 3, 31)), scores=None, keep_k=2)
    with pytest.raises(KeepKError, match="use the format jsonl or profile"):
        keep_list(path, "ordered")
    with pytest.raises(UnknownNameError, match="did you mean 'jsonl'"):
        keep_list(path, "json")
    with pytest.raises(CheckpointError, match=r"no selection\.json"):
        keep_list(tmp_path / "nothing", "jsonl")
    with pytest.raises(KeepKError, match="does not fit layer"):
        keep_list(selection(tmp_path, experts=((1, 4, 99),) * 3, scores=None), "jsonl")


def test_the_command_prints_or_writes(tmp_path: Path) -> None:
    path = selection(tmp_path)
    shown = CliRunner().invoke(app, ["export", "keep-list", str(path)]).stdout
    done = CliRunner().invoke(app, ["export", "keep-list", str(path), "--to", str(tmp_path / "kept.jsonl")])
    assert done.stdout.strip() == str(tmp_path / "kept.jsonl")
    assert (tmp_path / "kept.jsonl").read_text() == shown and len(lines(shown)) == 3
    (tmp_path / "thesis.txt").write_text("years")
    refused = CliRunner().invoke(app, ["export", "keep-list", str(path), "--to", str(tmp_path / "thesis.txt")])
    assert isinstance(refused.exception, OwnershipError)
