"""Commands as people type them: plans of models that are not here, revisions, the folder that `fetch` fills."""

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

import emo_select
from emo_select.checkpoint import at_revision, split_revision
from emo_select.cli.app import app
from emo_select.errors import EmoSelectError, KeepKError, ModelError
from emo_select.tasks import lengths, list_tasks

DEMO = Path(emo_select.__file__).parent / "demo" / "models"
RELEASED = ("run", "--model", "allenai/Emo_1b14b_1T", "--task", "mmlu", "--keep-k", "16", "--dry-run")


def typed(*words, stream="stdout"):
    """What a command prints; its errors are raised."""
    done = CliRunner().invoke(app, [str(word) for word in words])
    if done.exception is not None and not (isinstance(done.exception, SystemExit) and done.exit_code == 0):
        raise done.exception
    return getattr(done, stream)


@pytest.fixture(autouse=True)
def nothing_here(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)


def test_a_released_model_is_planned_on_a_machine_without_it():
    plan = json.loads(typed(*RELEASED, "--tokens-per-second", "20000", "--json"))
    assert len(plan) == 17
    cost = plan[0]["cost"]
    assert cost["bytes"] == 2 * 4 * (13_568_641_024 - 112 * 16 * (3 * 2048 * 1024 + 2048))  # pruned and finetuned
    assert 36e9 < cost["memory"] < 37e9  # 16 bytes for each of 2.29 billion parameters
    assert cost["seconds"] == pytest.approx(cost["tokens"] / 20000)
    assert all(step["action"] in ("run", "skip") for run in plan for step in run["steps"])
    assert not list(Path().rglob("*.json"))


def test_the_plan_is_also_said_in_words():
    said = " ".join(typed(*RELEASED, stream="stderr").split())
    assert "17 runs, 17 with work to do." in said
    assert "--tokens-per-second gives a speed" in said


def test_a_sweep_over_released_models_is_planned_whole():
    plan = json.loads(typed("sweep", "plan", Path(__file__).parents[1] / "sweeps" / "main.yaml", "--json",
                            "--tokens-per-second", "20000"))
    assert plan["runs"] == {"all": 1012, "done": 0, "to_do": 1012}
    assert plan["cost"]["unknown"] == 0
    assert plan["memory_bytes"] == 16 * 13_568_641_024  # finetuning with all experts
    assert plan["cost"]["tokens"] > 1e9 and plan["disk_bytes"] > 10e12 and plan["seconds"] > 3600


def test_a_model_of_which_nothing_is_known_is_refused():
    with pytest.raises(ModelError, match="fetch --model some/model --to DIR"):
        typed("run", "--model", "some/model", "--task", "demo", "--keep-k", "4", "--dry-run")


def test_lengths_are_shipped_for_every_published_task_and_agree_with_data_that_is_here(shared_dir):
    published = [task for task in list_tasks() if task.group != "demo"]
    assert len(published) == 46 and all(lengths.known(task) for task in published)
    absent = {task.name: task for task in published}
    for task in list_tasks(shared_dir / "data"):
        if task.name in ("arc_easy_merged", "openbookqa_merged", "mmlu_merged_law", "gsm8k_generation_8shot_merged"):
            for split in ("train", "test"):
                shipped = lengths.mean_tokens(absent[task.name], split, None)
                assert lengths.mean_tokens(task, split, None) == pytest.approx(shipped, rel=0.1), (task.name, split)


def test_a_folder_that_fetch_filled_holds_the_model_under_its_hub_id(tmp_path):
    """Every stage, from another process's point of view: the run is in the tree of the Hub id."""
    shutil.copytree(DEMO / "emo", tmp_path / "got" / "models" / "some" / "emo")
    made = typed("select", "--model", "some/emo", "--task", "demo_railway", "--keep-k", "4", "--num-examples", "8",
                 "--data-dir", tmp_path / "got", "--output-dir", "tree")
    run = Path(made.split()[-1]).parent
    assert run.parent == Path("tree/someemo").resolve() or run.parent == Path("tree/someemo")
    typed("prune", run)
    metadata = json.loads((run / "selected_model" / "config.json").read_text())
    assert metadata["num_experts"] == 4


def test_revisions_are_part_of_a_models_name(tmp_path):
    assert split_revision("allenai/Emo_1b14b_1T@step1000") == ("allenai/Emo_1b14b_1T", "step1000")
    assert split_revision("demo/emo") == ("demo/emo", None)
    assert at_revision("a/b", "main") == at_revision("a/b@main", "main") == "a/b@main"
    for model, revision, said in (("demo/emo", "main", "has no revisions"), ("a/b@v1", "v2", "names the revision 'v1'"),
                                  (str(tmp_path), "main", "has no revisions")):
        with pytest.raises(ModelError, match=said):
            at_revision(model, revision)
    plan = json.loads(typed(*RELEASED, "--revision", "v2", "--json"))
    assert plan[0]["spec"]["model"] == "allenai/Emo_1b14b_1T@v2"


@pytest.mark.parametrize("command", [
    ("run", "--task", "demo", "--keep-k", "4"), ("select", "--task", "demo", "--keep-k", "4"),
    ("activations", "--task", "demo"), ("eval", "--task", "demo"), ("finetune", "--task", "demo_railway", "--out", "x"),
])
def test_every_command_that_names_a_model_takes_a_revision(command):
    with pytest.raises(ModelError, match="has no revisions"):
        typed(*command, "--model", "demo/emo", "--revision", "main")


def test_activations_alone_are_computed_and_begin_no_run():
    words = ("activations", "--model", "demo/emo", "--task", "demo_railway", "-n", "8", "--output-dir", "tree")
    folder = Path(typed(*words).strip())
    assert (folder / "scores.safetensors").is_file()
    assert [path.name for path in Path("tree/demoemo").iterdir() if path.is_dir()] == ["activations"]
    before = (folder / "scores.safetensors").stat().st_mtime_ns
    assert Path(typed(*words).strip()) == folder
    assert (folder / "scores.safetensors").stat().st_mtime_ns == before


def test_run_takes_the_longest_text():
    plan = json.loads(typed(*RELEASED, "--max-length", "1000", "--json"))
    spec = plan[0]["spec"]
    assert {spec[part]["max_length"] for part in ("calibration", "training", "evaluation")} == {1000}


def test_a_decimal_comma_is_refused():
    with pytest.raises(KeepKError, match="two ways"):
        typed("run", "--model", "demo/emo", "--task", "demo", "--keep-k", "12,5%")


def test_version_is_an_option_too():
    assert typed("--version") == f"emo-select {emo_select.__version__}\n"


def test_errors_are_those_of_the_package():
    with pytest.raises(EmoSelectError):
        typed("run", "--model", "demo/emo", "--task", "demo", "--keep-k", "99")
