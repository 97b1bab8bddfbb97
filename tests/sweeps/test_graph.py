"""Shipped sweep files stand for a stated number of runs, and what runs share becomes one unit."""

from collections import Counter
from pathlib import Path

import pytest

from emo_select.errors import KeepKError, SpecError, UnknownNameError
from emo_select.spec import RunSpec, checked
from emo_select.sweeps.graph import build
from emo_select.sweeps.spec import SweepRun, SweepSpec, expand_sweep, read_sweep

SWEEPS = Path(__file__).parents[2] / "sweeps"
NUMBERS = {  # runs, then units: activations, select, run
    "main": (1012, 0, 184, 1012),
    "methods": (1380, 92, 92, 1196),
    "calibration": (1992, 0, 332, 1060),
    "demo": (20, 4, 4, 20),
}
SMALL = {"name": "small", "models": ["a/b"], "tasks": ["demo_harbor"], "keep_k": [2, 4]}


def expanded(**changes):
    return expand_sweep(checked(SweepSpec, SMALL | changes))


def kinds(units):
    return Counter(unit.kind for unit in units)


@pytest.mark.parametrize("name", NUMBERS)
def test_shipped_files_stand_for_these_runs_and_units(name):
    runs = expand_sweep(read_sweep(SWEEPS / f"{name}.yaml"))
    units = build(runs)
    found = kinds(units)
    assert (len(runs), found["activations"], found["select"], found["run"]) == NUMBERS[name]
    assert len({(run.spec.model_directory, run.spec.directory_name) for run in runs}) == len(runs)
    assert len({unit.name for unit in units}) == len(units) and found["fetch"] == 1
    assert sum(len(unit.runs) for unit in units if unit.kind == "run") == len(runs)


def test_every_shipped_file_is_counted():
    assert {path.stem for path in SWEEPS.glob("*.yaml")} == set(NUMBERS)


def test_models_that_skip_selection_are_expanded_once():
    runs = expanded(models=["a/b", {"id": "a/dense", "selects": False, "keep_k": 4}], methods=["layerwise", "random"])
    dense = [run.spec for run in runs if run.spec.model == "a/dense"]
    assert [(spec.keep_k, spec.selects, spec.method) for spec in dense] == [(4, False, "layerwise")]
    assert len(runs) == 5


def test_published_micro_batches_are_overrides_of_the_shipped_files():
    runs = expand_sweep(read_sweep(SWEEPS / "main.yaml"))
    sizes = {run.spec.task: run.execution.micro_batch_size for run in runs}
    small = {task for task, size in sizes.items() if size == 2}
    assert small == {"gsm8k_generation_8shot_merged", "drop_merged", "squad_merged", "mmlu_merged_history"}
    assert set(sizes.values()) == {2, 8}


def test_each_unit_comes_after_those_it_needs():
    units = build(expanded(methods=["layerwise", "easy_ep", "reap", "random"]))
    seen = set()
    for unit in units:
        assert set(unit.needs) <= seen
        seen.add(unit.name)
    parents = {unit.name: unit.kind for unit in units}
    needed = {(unit.runs[0].spec.method, parents[unit.needs[0]]) for unit in units if unit.kind == "run"}
    assert needed == {("layerwise", "select"), ("easy_ep", "activations"), ("reap", "activations"),
                      ("random", "fetch")}


def test_work_that_only_one_run_needs_is_no_unit_of_its_own():
    assert kinds(build(expanded(keep_k=[2], methods=["layerwise", "easy_ep"]))) == {"fetch": 1, "run": 2}


def test_another_calibration_shares_nothing_and_another_evaluation_shares_all_but_itself():
    other_texts = build(expanded(variants=[{}, {"calibration": {"num_examples": 3}}]))
    assert kinds(other_texts) == {"fetch": 1, "select": 2, "run": 4}
    other_shots = build(expanded(variants=[{}, {"evaluation": {"num_shots": 0}}]))
    assert kinds(other_shots) == {"fetch": 1, "select": 1, "run": 2}
    assert all(len(unit.runs) == 2 for unit in other_shots if unit.kind == "run")


def test_runs_that_keep_all_experts_are_one_unit_whatever_their_method():
    methods = ["layerwise", "easy_ep", "random"]
    told = build(expanded(models=[{"id": "a/b", "experts": 4}], methods=methods))
    assert kinds(told) == {"fetch": 1, "run": 4}  # three for keep-k 2, which share nothing, and one for keep-k 4
    [whole] = [unit for unit in told if len(unit.runs) == 3]
    assert {run.spec.method for run in whole.runs} == set(methods) and {run.spec.keep_k for run in whole.runs} == {4}
    assert kinds(build(expanded(methods=methods))) == {"fetch": 1, "activations": 1, "select": 1, "run": 6}
    here = build(expanded(models=["demo/emo"], keep_k=[8, 32], methods=methods))
    assert kinds(here) == {"fetch": 1, "run": 4}


def test_a_units_name_depends_on_what_it_is():
    runs = expanded()
    names = {unit.label: unit.name for unit in build(runs)}
    assert {unit.label: unit.name for unit in build(list(reversed(runs)))} == names
    other = [SweepRun(spec=RunSpec(**{**run.spec.model_dump(), "score": "reap"})) for run in runs]
    assert not {unit.name for unit in build(other) if unit.kind != "fetch"} & set(names.values())


@pytest.mark.parametrize(("changes", "message"), [
    ({"keepk": [2]}, "Unknown key 'keepk'; did you mean 'keep_k'"),
    ({"settings": {"trainig": {}}}, "Unknown key 'trainig'; did you mean 'training'"),
    ({"settings": {"training": {"epoch": 2}}}, "Unknown key 'training.epoch'; did you mean 'training.epochs'"),
    ({"execution": {"micro_batch": 2}}, "Unknown key 'micro_batch'; did you mean 'micro_batch_size'"),
    ({"exclude": [{"taks": "x"}]}, "no 'taks' to match"),
    ({"tasks": None}, "has no `tasks`"),
    ({"tasks": ["arc_eazy"]}, "arc_easy"),
    ({"methods": ["layerwize"]}, "layerwise"),
    ({"name": "../up"}, "name"),
])
def test_mistakes_in_a_file_are_named(changes, message):
    with pytest.raises((SpecError, UnknownNameError)) as caught:
        expanded(**changes)
    assert message in str(caught.value)


def test_exclude_and_overrides_match_by_pattern():
    runs = expanded(tasks=["demo"], exclude=[{"task": "demo_*r*", "keep_k": [4]}],
                    overrides=[{"match": {"task": "demo_museum"}, "settings": {"training": {"epochs": 3}}}])
    assert all(run.spec.keep_k == 2 for run in runs if "r" in run.spec.task.removeprefix("demo"))
    assert {run.spec.task for run in runs if run.spec.training.epochs == 3} == {"demo_museum"}


def test_a_sweep_file_takes_what_the_command_line_takes():
    runs = expanded(models="demo/emo,demo/stdmoe", tasks="demo_harbor", keep_k=["full", "50%", 4], methods="layerwise",
                    settings={"training": {"learning_rate": 0.001}})
    assert [(run.spec.keep_k, run.keeps_all) for run in runs[:3]] == [(32, True), (16, False), (4, False)]
    assert len(runs) == 6
    assert runs[0].spec.training.learning_rate == "0.001"
    assert [run.spec.keep_k for run in expanded(models="demo/emo", keep_k="25%")] == [8]
    assert [run.spec.keep_k for run in expanded(models=[{"id": "a/b", "experts": 64}], keep_k=["25%"])] == [16]
    with pytest.raises(KeepKError, match=r"12\.5%"):
        expanded(keep_k="12,5%")
    with pytest.raises(KeepKError, match="how many experts a/b has"):
        expanded(keep_k=["50%"])


def test_an_exclude_may_name_a_share():
    runs = expanded(models=["demo/emo"], keep_k=["full", "50%"], exclude=[{"keep_k": "full"}])
    assert [run.spec.keep_k for run in runs] == [16]


def test_rules_that_concern_no_run_are_said(capsys):
    expanded(exclude=[{"keep_k": 2}, {"method": "randon"}], overrides=[{"match": {"task": "demo_harbour"}}])
    said = " ".join(capsys.readouterr().err.split())
    assert "the exclude method: randon concerns no run" in said
    assert "the override task: demo_harbour concerns no run" in said
    assert "keep_k: 2" not in said


def test_a_sweep_without_runs_is_refused():
    with pytest.raises(SpecError, match="has no runs"):
        expanded(exclude=[{"keep_k": [2, 4]}])
