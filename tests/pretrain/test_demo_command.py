"""`emo-select pretrain-demo`."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import yaml
from test_demo_trainer import TINY
from typer.testing import CliRunner

from emo_select.cli.app import app
from emo_select.errors import SpecError, UnknownNameError


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY))
    return path


def test_it_trains_and_says_where_the_checkpoint_lies(config, tmp_path):
    done = CliRunner().invoke(app, ["pretrain-demo", "--config", str(config), "-o", str(tmp_path / "out"), "--json"])
    assert done.exit_code == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["checkpoint"] == str(tmp_path / "out") and told["config"]["name"] == "tiny"
    assert (tmp_path / "out/model.safetensors").is_file()


def test_without_json_stdout_stays_empty(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["pretrain-demo", "--config", str(config)])
    assert done.exit_code == 0 and not done.stdout and "pretrained/tiny" in done.stderr
    assert (tmp_path / "pretrained/tiny/tokenizer.json").is_file()


def test_a_wrong_name_is_told_before_any_work(tmp_path):
    runner = CliRunner()
    assert isinstance(runner.invoke(app, ["pretrain-demo", "--config", "demo/emu"]).exception, UnknownNameError)
    assert isinstance(runner.invoke(app, ["pretrain-demo", "--config", str(tmp_path / "no.yaml")]).exception, SpecError)


def test_the_module_imports_no_torch():
    code = "import sys, emo_select.cli.pretrain_demo, emo_select.pretrain; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
