"""A run that is killed at any moment is finished by the same command, with the same result as one left alone."""

import hashlib
import json
import subprocess
import sys

import pytest

from emo_select.tree import Tree

COMMAND = ("run", "--model", "demo/emo", "--task", "demo_harbor", "--keep-k", "8", "--checkpoints", "2",
           "--limit", "40")
# The child kills itself with SIGKILL at the first rename or opening of a file that matches a pattern.
CHILD = """
import os, re, signal, sys
import emo_select.cli.app
pattern = re.compile(sys.argv.pop(1))
def watch(event, arguments):
    if event in ("os.rename", "open") and pattern.search(f"{event} {' '.join(map(str, arguments))}"):
        os.kill(os.getpid(), signal.SIGKILL)
if pattern.pattern:
    sys.addaudithook(watch)
emo_select.cli.app.main()
"""
NEVER_EQUAL = {"processing_time", "current_date", "model_hash", "model_config", "compute_config", "beaker_info"}
MOMENTS = {
    "inside select, before the keep set is in place": r"os\.rename .*selection\.json\.",
    "inside prune, while a shard is written": r"open .*\.selected_model\.partial/\S*safetensors",
    "inside prune, before the folder is in place": r"os\.rename .*\.selected_model\.partial ",
    "inside finetune, before a checkpoint is in place": r"os\.rename .*checkpoint-[1-9]",
    "inside eval, before the metrics are in place": r"os\.rename .*results/checkpoint-0/.*-metrics\.json",
}


def start(root, pattern=""):
    words = [sys.executable, "-c", CHILD, pattern, *COMMAND, "--output-dir", str(root)]
    return subprocess.run(words, capture_output=True, text=True, timeout=300)


def content(path):
    """What has to be equal in a file: weights to the byte, results without times and paths."""
    if path.name == "selection.json":
        return json.loads(path.read_text())
    if path.name.endswith("-metrics.json"):
        return {key: value for key, value in json.loads(path.read_text()).items() if key not in NEVER_EQUAL}
    if path.suffix == ".safetensors":
        return hashlib.sha256(path.read_bytes()).hexdigest()
    return None


def outcome(root):
    [run] = Tree(root).runs()
    return {str(path.relative_to(run.directory)): content(path)
            for path in sorted(run.directory.rglob("*")) if path.is_file() and content(path) is not None}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    root = tmp_path_factory.mktemp("undisturbed")
    done = start(root)
    assert done.returncode == 0, done.stderr
    return outcome(root)


@pytest.mark.parametrize("moment", MOMENTS)
def test_the_next_run_completes_what_a_killed_one_began(moment, undisturbed, tmp_path):
    assert start(tmp_path, MOMENTS[moment]).returncode == -9
    done = start(tmp_path)
    assert done.returncode == 0, done.stderr
    assert outcome(tmp_path) == undisturbed
    assert [path for path in tmp_path.rglob("*.partial") if path.is_dir()] == []


def test_what_an_undisturbed_run_leaves(undisturbed):
    names = set(undisturbed)
    assert "selection.json" in names
    assert {"selected_model/model.safetensors", "finetuned_model/checkpoint-0/model.safetensors"} <= names
    start, pruned = (undisturbed[f"{folder}/model.safetensors"] for folder in (
        "finetuned_model/checkpoint-0", "selected_model"))
    assert start == pruned
    steps = {name.split("/")[1] for name in names if name.startswith("results/")}
    assert len(steps) == 3
