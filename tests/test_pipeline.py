"""Plans say what is missing or stale and why; executing them leaves records that the next plan believes."""

import json
import shutil

import pytest

from emo_select import record
from emo_select.checkpoint import resolve
from emo_select.errors import SpecError
from emo_select.experts import KeepSet
from emo_select.pipeline import Wanted, cost, execute, execute_all, expand, plan
from emo_select.pipeline.adopt import twin_key
from emo_select.spec import Execution
from emo_select.tree import Tree

CHEAP = ("activations", "select", "prune", "eval")
MACHINE = Execution(device="cpu")
SETTINGS = {"calibration": {"num_examples": 4}, "evaluation": {"limit": 4}}


def runs(root, keep_ks=("8",), methods=("random",), **settings):
    wanted = Wanted(["demo/emo"], ["demo_harbor"], keep_ks, methods, SETTINGS | settings)
    return expand(wanted, Tree(root), MACHINE)


def actions(run, stages=CHEAP, force=()):
    return {step.stage: step.action.value for step in plan(run, stages, force)}


def done(run, stages=CHEAP):
    execute(run, plan(run, stages))
    return run


@pytest.fixture
def finished(tmp_path):
    return done(runs(tmp_path)[0])


def test_a_new_run_does_everything_that_its_method_needs(tmp_path):
    random, one_pass = runs(tmp_path, methods=("random", "easy_ep"))
    assert actions(random) == {
        "activations": "skip", "select": "run", "prune": "run", "finetune": "skip", "eval": "run"}
    assert actions(one_pass)["activations"] == "run"


def test_a_finished_run_does_nothing(finished):
    assert set(actions(finished).values()) == {"done", "skip"}
    assert set(record.load(finished.paths).stages) == {"select", "prune", "eval/checkpoint-0"}


def test_the_record_says_what_it_took(finished):
    stage = record.load(finished.paths).stages["prune"]
    assert stage.seconds > 0 and stage.peak_memory > 2**20 and stage.versions["torch"]
    written = finished.paths.selected_model / "model.safetensors"
    assert stage.outputs["selected_model/model.safetensors"] == written.stat().st_size
    found = json.loads(finished.paths.record.read_text())
    assert found["spec"]["model"] == "demo/emo" and found["model_fingerprint"] == finished.source.fingerprint


def test_lost_files_are_made_again_only_if_something_needs_them(finished):
    shutil.rmtree(finished.paths.selected_model)
    assert actions(finished)["prune"] == "skip"
    assert actions(finished, ("prune",))["prune"] == "run"
    shutil.rmtree(finished.paths.results)
    assert (actions(finished)["prune"], actions(finished)["eval"]) == ("run", "run")
    done(finished)
    assert set(actions(finished).values()) == {"done", "skip"}


def test_a_cut_file_is_not_taken_for_a_whole_one(finished):
    path = finished.paths.selected_model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert actions(finished, ("prune",))["prune"] == "run"


def test_a_changed_dependency_makes_everything_after_it_stale(finished):
    found = json.loads(finished.paths.record.read_text())
    found["stages"]["select"]["fingerprint"] = "0" * 16
    finished.paths.record.write_text(json.dumps(found))
    assert actions(finished)["select"] == "run"
    done(finished)
    assert set(actions(finished).values()) == {"done", "skip"}


def test_force_repeats_a_stage_and_what_follows_it(finished):
    assert actions(finished, force=("prune",)) == {
        "activations": "skip", "select": "done", "prune": "run", "finetune": "skip", "eval": "run"}


def test_a_stage_without_its_input_is_refused(tmp_path):
    with pytest.raises(SpecError, match="eval needs prune"):
        plan(runs(tmp_path)[0], ("eval",))


def test_keep_k_that_differ_share_one_layerwise_pass_and_agree_with_single_ones(tmp_path):
    together = runs(tmp_path / "a", ("4", "8"), ("layerwise",))
    assert execute_all([(run, plan(run, ("select",))) for run in together]) == []
    notes = [record.load(run.paths).stages["select"].notes for run in together]
    assert [note["shared_by"] for note in notes] == [2, 2]
    for run in together:
        [alone] = runs(tmp_path / "b", (str(run.spec.keep_k),), ("layerwise",))
        done(alone, ("select",))
        assert alone.paths.selection.read_bytes() == run.paths.selection.read_bytes()


def test_one_failing_run_does_not_stop_the_others(tmp_path):
    bad, good = runs(tmp_path, ("4", "8"))
    bad.paths.directory.mkdir(parents=True)
    bad.paths.record.write_text("{")
    planned = [(good, plan(good, ("select",)))]
    planned.insert(0, (bad, planned[0][1]))
    [(run, error)] = execute_all(planned)
    assert run is bad and "not valid JSON" in str(error)
    assert good.paths.selection.exists()


def test_all_experts_are_computed_once_whatever_the_method(tmp_path):
    found = runs(tmp_path, ("full",), ("layerwise", "easy_ep", "random"))
    planned = [(run, plan(run, CHEAP)) for run in found]
    assert all(actions(run)["activations"] == "skip" for run in found)
    assert [each.tokens > 0 for each in cost.of_all(planned)] == [True, False, False]
    assert execute_all(planned) == []
    first, *others = found
    for run in others:
        assert set(actions(run).values()) == {"done", "skip"}
        shared = {name for name, stage in record.load(run.paths).stages.items() if "shared_with" in stage.notes}
        assert shared == {"prune", "eval/checkpoint-0"}
        assert KeepSet.load(run.paths.selection).method == run.spec.method
        for folder in ("selected_model/model.safetensors", "results/checkpoint-0/task-demo_harbor-metrics.json"):
            assert (run.paths.directory / folder).samefile(first.paths.directory / folder)


def test_shots_of_the_examples_matter_even_where_all_experts_are_kept(tmp_path):
    def key(**calibration):
        [run] = runs(tmp_path, ("full",), calibration=calibration)
        assert run.keeps_all
        return twin_key(run.spec, keeps_all=run.keeps_all)

    assert key(num_examples=2) == key(num_examples=4, seed=3) != key(num_examples=2, num_shots=0)
    assert not any(run.keeps_all for run in [*runs(tmp_path, ("31",)), *runs(tmp_path, ("full",), num_shared=0)])


@pytest.fixture
def own_model(tmp_path):
    """A copy of a demo model that may be changed."""
    folder = tmp_path / "own"
    shutil.copytree(resolve("demo/emo"), folder)
    return folder


@pytest.mark.parametrize(("name", "redone"), [
    ("tokenizer.json", {"select", "prune", "eval"}), ("generation_config.json", {"prune", "eval"}),
    ("model.safetensors", {"select", "prune", "eval"}), ("chat_template.jinja", {"select", "prune", "eval"})])
def test_a_changed_file_of_the_model_makes_stale_what_it_can_change(own_model, tmp_path, name, redone):
    wanted = Wanted([str(own_model)], ["demo_harbor"], ["8"], ["random"], SETTINGS)
    [run] = expand(wanted, Tree(tmp_path), MACHINE)
    done(run)
    path = own_model / name
    path.write_bytes(path.read_bytes()[:-1] + b"\x81" if name == "model.safetensors" else b"{ }")
    [again] = expand(wanted, Tree(tmp_path), MACHINE)
    assert {stage for stage, action in actions(again).items() if action == "run"} == redone


def test_planning_a_new_run_reads_no_weights(tmp_path, monkeypatch):
    monkeypatch.setattr("emo_select.checkpoint.reader.content_of", None)
    assert actions(runs(tmp_path, methods=("easy_ep",))[0])["eval"] == "run"
