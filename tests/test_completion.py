"""Values that a shell offers."""

import os
import subprocess
import sys
from pathlib import Path

from emo_select.cli import completion

PROGRAM = Path(sys.executable).with_name("emo-select")


def test_names_are_completed_after_the_last_comma(monkeypatch, tmp_path):
    (tmp_path / "models" / "some" / "model").mkdir(parents=True)
    (tmp_path / "models" / "some" / "model" / "config.json").touch()
    monkeypatch.setenv("EMO_SELECT_DATA_DIR", str(tmp_path))
    assert completion.models("demo/") == ["demo/emo", "demo/stdmoe"]
    assert completion.models("demo/emo,so") == ["demo/emo,some/model"]
    assert "allenai/Emo_1b14b_1T" in completion.models("allenai/")
    assert completion.tasks("mmlu_pro,arc_") == ["mmlu_pro,arc_easy", "mmlu_pro,arc_challenge"]
    assert completion.methods("layer") == ["layerwise"]
    assert completion.scores("gate") == ["gate_mass"]
    assert completion.stages("fine") == ["finetune"]


def test_runs_and_sweeps_are_those_of_the_tree(monkeypatch, tmp_path):
    run = tmp_path / "m" / "t_keepk_4_bs-32_lr-5e-5_epoch-1_selectivemode-random"
    run.mkdir(parents=True)
    (tmp_path / ".sweeps" / "mine").mkdir(parents=True)
    monkeypatch.setenv("EMO_SELECT_OUTPUT_DIR", str(tmp_path))
    assert completion.runs(str(tmp_path / "m")) == [str(run)]
    assert completion.sweeps("m") == ["mine", "main", "methods"]


def test_a_shell_gets_them():
    words = {"_EMO_SELECT_COMPLETE": "complete_bash", "COMP_WORDS": "emo-select run --method lay", "COMP_CWORD": "3"}
    done = subprocess.run([PROGRAM], env={**os.environ, **words}, capture_output=True, text=True)
    assert done.stdout.split() == ["layerwise"]
