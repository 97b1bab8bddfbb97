"""The commands `finetune` and `merge-back`, on a shipped-size model with a real tokenizer and own data."""

import json
import os
import shutil

import pytest
import torch
from finetune_cases import GOLDEN, letter_rows, letters, save_family
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from emo_select import ownership
from emo_select.cli import common
from emo_select.cli.app import app
from emo_select.errors import EmoSelectError
from emo_select.finetune.recipe import require_tracker
from emo_select.spec import Execution

CASE = "moe_shared1_k8"


@pytest.fixture
def model(tmp_path):
    """The golden start checkpoint with a tokenizer of single letters and its pruning metadata."""
    folder = tmp_path / "model"
    shutil.copytree(GOLDEN / CASE / "model", folder)
    shutil.copy(GOLDEN / CASE / "merge" / "child_pruning_metadata.json", folder / "pruning_metadata.json")
    letters().save_pretrained(folder)
    return folder


@pytest.fixture
def own_data(tmp_path):
    (tmp_path / "own.jsonl").write_text(letter_rows())
    return tmp_path / "own.jsonl"


def invoke(*arguments):
    return CliRunner().invoke(app, ["--quiet", *map(str, arguments)], catch_exceptions=True)


def options(model, own_data, out):
    return ["finetune", "--model", model, "--train-file", own_data, "--out", out, "--device", "cpu", "--batch-size", 4,
            "--micro-batch-size", 2, "--lr", "1e-2"]  # fmt: skip


def test_under_torchrun_one_process_does_a_run(monkeypatch):
    """The first goes on alone, to start as many for finetuning; the others end before they do anything."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_PORT", "1")
    monkeypatch.setenv("RANK", "1")
    assert invoke("finetune", "no-such-run").exit_code == invoke("run", "-m", "x", "-t", "y", "-k", 1).exit_code == 0
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    assert "takes place on one machine" in str(invoke("finetune", "no-such-run").exception)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert common.only_process(None) == 2 and not {"RANK", "WORLD_SIZE", "MASTER_PORT"} & os.environ.keys()
    assert common.only_process(None) is None


def plan(*arguments):
    return invoke("run", "-m", "demo/emo", "-t", "demo_railway", "-k", 4, "--dry-run", "--json", *arguments)


def test_a_run_trains_by_the_same_options():
    """What is trained and how it is stored makes another run; who is told about it does not."""
    asked = ["--packing", "--warmup", 0, "--lora", "--lora-rank", 2, "--lora-target", "attention", "--merge"]
    results = [plan(*added, *told) for added in ([], asked, asked[:-1]) for told in ([], ["--gradient-checkpointing"])]
    plain, _, lora, told, unmerged, _ = (json.loads(result.stdout)[0] for result in results)
    training = lora["spec"]["training"]
    assert training["packing"] and training["warmup"] == 0 and not plain["spec"]["training"]["lora"]
    assert training["lora"] == {"rank": 2, "alpha": 32, "dropout": 0, "targets": ["attention"], "router": False,
                                "shared": False, "merge": True}
    assert plain["directory"].endswith("demo_railway_keepk_4_bs-32_lr-5e-5_epoch-1_selectivemode-layerwise")
    assert len({plain["directory"], lora["directory"], unmerged["directory"]}) == 3
    assert lora["directory"] == told["directory"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--lora", "--lora-target", "q_prj"], "did you mean 'q_proj'"),
        (["--lora", "--freeze", "routed"], "leave out --freeze or --lora"),
        (["--report-to", "trackio"], "pip install trackio"),
        (["--train-file", "no-such-file"], "no-such-file does not exist"),
        (["--train-file", os.devnull], "is a device, not a file"),
    ],
)
def test_a_run_that_could_not_train_is_not_begun(changes, message):
    assert message in str(plan(*changes).exception)


def test_a_run_evaluates_its_adapter(tmp_path):
    """Also after the tree has moved, which the adapter's configuration knows nothing of."""
    result = invoke("run", "-m", "demo/emo", "-t", "demo_railway", "-k", 4, "--method", "random", "--limit", 4,
                    "--lora", "--lora-target", "attention", "--lr", "1e-2", "--epochs", 0.25, "-o", tmp_path / "a")
    assert result.exit_code == 0, result.output
    [run] = (tmp_path / "a").rename(tmp_path / "b").glob("demoemo/*_variant-*")
    adapter = run / "finetuned_model" / "checkpoint-1"
    assert not (adapter / "config.json").exists()
    scored = json.loads((run / "results" / "checkpoint-1" / "task-demo_railway-metrics.json").read_text())
    again = invoke("eval", "--model", adapter, "-t", "demo_railway", "--limit", 4, "--out", tmp_path / "c", "--json")
    [found] = json.loads(again.stdout).values()
    assert found["demo_railway"]["metrics"] == scored["metrics"]
    assert "is an adapter" in str(invoke("merge-back", run, "--into", "demo/emo", "--out", tmp_path / "d").exception)


def test_own_data_then_merge_back(model, own_data, tmp_path):
    out = tmp_path / "tuned"
    result = invoke(*options(model, own_data, out), "--checkpoints", 2, "--freeze", "routed", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["checkpoints"] == [0, 1, 2] and report["examples"] == 8 and len(report["history"]) == 2
    assert (out / "routing.json").exists() and (out / "checkpoint-2" / "tokenizer.json").exists()
    snapshots = json.loads((out / "routing.json").read_text())["snapshots"]
    assert [snapshot["step"] for snapshot in snapshots] == [1, 2]
    assert all(sum(load) == pytest.approx(1, abs=1e-5) for load in snapshots[0]["load"])
    parent = GOLDEN.parent / "models" / "emo_shared1"
    result = invoke("merge-back", out / "checkpoint-2", "--into", parent, "--out", tmp_path / "merged", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["n_routable_copied"] == 28
    again = invoke("merge-back", out, "--into", parent, "--out", tmp_path / "merged")
    assert isinstance(again.exception, EmoSelectError)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--batch-size", 5], "do not divide the 5 examples"),
        (["--gpus", 3, "--batch-size", 4], "does not divide by 3 processes"),
        (["--freeze", "everything"], "freeze"),
        (["--lora", "--lora-target", "q_prj"], "did you mean 'q_proj'"),
        (["--merge"], "add --lora"),
        (["--lora", "--freeze", "routed"], "leave out --freeze or --lora"),
        (["--max-length", 2], "raise --max-length"),
        (["--task", "arc_easy"], "one of --task and --train-file"),
        (["--dtype", "float16"], "overflows"),
        (["--device", "cuda"], "GPUs here"),
        (["--report-to", "trackio"], "pip install trackio"),
    ],
)
def test_mistakes_are_one_sentence_before_the_model_is_loaded(changes, message, model, own_data, tmp_path, monkeypatch):
    monkeypatch.setattr("emo_select.models.loading.load_model", lambda *_, **__: pytest.fail("loaded"))
    result = invoke(*options(model, own_data, tmp_path / "out"), *changes)
    assert isinstance(result.exception, EmoSelectError), result.output
    assert message in str(result.exception) and "\n" not in str(result.exception)
    assert not (tmp_path / "out").exists()


def test_logs_of_a_tracker_are_not_taken_for_the_tracker(tmp_path, monkeypatch):
    """Where a tracker leaves a folder of its own name, Python would import that."""
    (tmp_path / "trackio").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(EmoSelectError, match="pip install trackio"):
        require_tracker(Execution(report_to="trackio"))


def test_tensorboard_logs_stay_when_the_training_is_complete(model, own_data, tmp_path):
    reason = "needs tensorboard, which is not among the requirements"
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason=reason)
    out = tmp_path / "out"
    result = invoke(*options(model, own_data, out), "--report-to", "tensorboard", "--json")
    assert result.exit_code == 0, result.output
    logged = events.EventAccumulator(str(out / "logs")).Reload()
    losses = [entry["loss"] for entry in json.loads(result.stdout)["history"]]
    assert [event.value for event in logged.Scalars("train/loss")] == pytest.approx(losses)


def test_nothing_longer_than_the_context_is_trained(model, tmp_path):
    """The golden model reads 256 tokens, fewer than --max-length; the end-of-sequence token is one of them."""
    fits, too_long = tmp_path / "fits.jsonl", tmp_path / "long.jsonl"
    for path, size in ((fits, 255), (too_long, 256)):
        path.write_text(json.dumps({"prompt": "ab", "completion": "c" * size}))
    result = invoke(*options(model, fits, tmp_path / "out"), "--batch-size", 1, "--micro-batch-size", 1, "--json")
    assert json.loads(result.stdout)["tokens"] == 256
    result = invoke(*options(model, too_long, tmp_path / "out"))
    assert "has 256 tokens and the limit is 255" in str(result.exception)


def test_the_output_does_not_lie_within_the_model(model, own_data):
    assert "choose an output directory outside" in str(invoke(*options(model, own_data, model / "tuned")).exception)


def test_checkpoints_of_another_model_are_not_overwritten(model, own_data, tmp_path):
    shutil.copytree(GOLDEN / "dense" / "model", tmp_path / "out" / "checkpoint-3")
    result = invoke(*options(model, own_data, tmp_path / "out"))
    assert "checkpoints of another model" in str(result.exception)
    assert "not made by emo-select" in str(invoke(*options(model, own_data, tmp_path / "out"), "--force").exception)
    ownership.mark(tmp_path / "out" / "checkpoint-3", ownership.FINETUNED)
    assert invoke(*options(model, own_data, tmp_path / "out"), "--force").exit_code == 0
    assert sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*")) == ["checkpoint-0", "checkpoint-2"]


def test_a_training_that_diverges_names_step_and_last_good_checkpoint(model, own_data, tmp_path):
    result = invoke(*options(model, own_data, tmp_path / "out"), "--loss-limit", 0.001, "--checkpoints", 2)
    message = str(result.exception)
    assert "diverged at step 1" in message and message.count("checkpoint-0") == 1
    assert not (tmp_path / "out" / "training.json").exists()


def test_tensors_that_the_model_ignores_and_subfolders_are_kept(own_data, tmp_path):
    model = tmp_path / "model"
    save_family("qwen3_moe", model)
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.arange(4.0)
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "tools.jinja").write_text("tools")
    result = invoke(*options(model, own_data, tmp_path / "out"))
    assert result.exit_code == 0, result.exception
    for folder in sorted((tmp_path / "out").glob("checkpoint-*")):
        trained = load_file(folder / "model.safetensors")
        assert trained.keys() == tensors.keys()
        assert torch.equal(trained["model.layers.0.self_attn.rotary_emb.inv_freq"], torch.arange(4.0))
        assert (folder / "additional_chat_templates" / "tools.jinja").read_text() == "tools"
    assert not torch.equal(trained["lm_head.weight"], tensors["lm_head.weight"])


def test_a_mistake_in_one_run_leaves_the_others_alone(tmp_path, monkeypatch):
    monkeypatch.setattr("emo_select.finetune.finetune", lambda *given, **more: {}["inv_freq"])
    result = invoke("run", "-m", "demo/emo", "-t", "demo_railway", "-k", "4,8", "--method", "random", "--limit", 2,
                    "-o", tmp_path)
    assert result.exit_code == 1 and not isinstance(result.exception, KeyError)
    assert len(list(tmp_path.glob("demoemo/*/selected_model"))) == 2
