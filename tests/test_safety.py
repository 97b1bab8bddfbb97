"""Nothing runs that was not asked for: no code of a checkpoint, no yes on stdin, no pickle, no formula, no markup."""

import io
import json
import pickletools
import random
import shutil
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch

from emo_select import record
from emo_select.checkpoint import resolve
from emo_select.errors import CheckpointError, ModelError, SpecError
from emo_select.finetune.randomness import load_random, random_file, save_random
from emo_select.models import load_model, load_tokenizer
from emo_select.spec import checked
from emo_select.sweeps.profile import Profile
from emo_select.tables.write import Table, render

CODE = """import pathlib
pathlib.Path(__file__).with_name("ran").touch()
pathlib.Path({mark!r}).touch()
"""


@pytest.fixture
def foreign(tmp_path):
    """A checkpoint whose tokenizer and configuration are code of its own, which leaves a mark when it runs."""
    folder = tmp_path / "foreign"
    shutil.copytree(resolve("demo/emo"), folder)
    (folder / "tokenizer.json").unlink()
    settings = {"tokenizer_class": "Nobody", "auto_map": {"AutoTokenizer": ["code.Nobody", "code.Nobody"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "code.py").write_text(CODE.format(mark=str(tmp_path / "mark")))
    return folder


def as_foreign_type(folder):
    config = json.loads((folder / "config.json").read_text())
    own = {"AutoConfig": "code.Nobody", "AutoModelForCausalLM": "code.Nobody"}
    config |= {"model_type": "nobodys", "auto_map": own}
    (folder / "config.json").write_text(json.dumps(config))


def yes_to(*words):
    """The program, with somebody who answers yes to everything."""
    return subprocess.run([sys.executable, "-m", "emo_select", *words], input="y\n" * 1000, capture_output=True,
                          text=True, timeout=300)


def test_a_yes_on_stdin_runs_no_code(foreign, tmp_path):
    done = yes_to("select", "-m", str(foreign), "-k", "4", "-t", "demo_railway", "--output-dir", str(tmp_path / "out"))
    assert not (tmp_path / "mark").exists()
    assert done.returncode == 2 and "--trust-remote-code" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_a_foreign_architecture_runs_no_code(load, foreign, tmp_path):
    as_foreign_type(foreign)
    with pytest.raises(ModelError, match="trust"):
        load(str(foreign))
    assert not (tmp_path / "mark").exists()


def test_every_call_into_transformers_says_that_nothing_is_trusted():
    """A call without the argument would ask on stdin."""
    import ast
    from pathlib import Path

    import emo_select

    names = ("AutoConfig.from_pretrained", "AutoTokenizer.from_pretrained", "AutoModelForCausalLM.from_pretrained",
             "AutoModelForCausalLM.from_config", "AutoModel.from_pretrained", "load_dataset")
    found = 0
    for file in Path(emo_select.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(names):
                found += 1
                passed = {keyword.arg for keyword in node.keywords}  # None: **options, which the function checks
                assert passed & {"trust_remote_code", None}, (file, node.lineno)
    assert found


# ---- pickles


def generators():
    return random.getstate(), [np.array(part).tolist() for part in np.random.get_state()], \
        torch.random.get_rng_state().tolist()


def test_random_generators_are_kept_without_a_pickle(tmp_path):
    random.seed(5)
    np.random.seed(6)
    np.random.standard_normal()
    torch.manual_seed(7)
    path = random_file(tmp_path, 0)
    before = generators()
    save_random(path)
    assert not zipfile.is_zipfile(path)
    with pytest.raises(Exception):  # noqa: B017
        pickletools.dis(path.read_bytes(), out=io.StringIO())
    random.random(), np.random.rand(), torch.rand(1)
    assert generators() != before
    assert load_random(path)
    assert generators() == before


def test_another_number_of_processes_and_older_states(tmp_path):
    assert load_random(random_file(tmp_path, 3)) is False
    (tmp_path / "rng_state.pth").touch()
    with pytest.raises(CheckpointError, match="pickle"):
        load_random(random_file(tmp_path, 0))
    random_file(tmp_path, 0).write_bytes(b"no")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_random(random_file(tmp_path, 0))


# ---- tables and batch scripts

CELLS = ["=1+1", "+cmd|' /C calc'!A0", "-2+3", "@SUM(A1)", "\t=1", "-0.25", "+3.1 %", "-", "plain", "a-b"]
ESCAPED = ["'=1+1", "'+cmd|' /C calc'!A0", "'-2+3", "'@SUM(A1)", "'\t=1", "-0.25", "+3.1 %", "-", "plain", "a-b"]


@pytest.mark.parametrize("style, delimiter", [("csv", ","), ("tsv", "\t")])
def test_no_cell_is_a_formula(style, delimiter):
    import csv

    text = render(Table("t", ["=name", "value"], [[cell, -0.5] for cell in CELLS]), style)
    rows = list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter))
    assert rows == [["'=name", "value"], *[[cell, "-0.5000"] for cell in ESCAPED]]


def test_no_markup_in_markdown():
    cells = ["<img src=x onerror=alert(1)>", "[x](javascript:alert(1))", "a|b", "a\\", "\\|", "`x`", "two\nlines"]
    text = render(Table("t", ["<b>", "n"], [[cell, 1.0] for cell in cells]), "markdown")
    assert "<" not in text and len(text.splitlines()) == len(cells) + 2
    assert "\\[x\\](javascript" in text and "a\\|b" in text and "a\\\\ " in text and "\\\\\\| " in text
    assert "\\`x\\`" in text


@pytest.mark.parametrize("values", [{"partition": "gpu\n#SBATCH --uid=0"}, {"extra": {"exclude": "a\nrm -rf /"}},
                                    {"extra": {"a\nb": 1}}, {"setup": ["module load x\nrm -rf /"]},
                                    {"python": "python\r"}])
def test_a_profile_holds_no_second_line(values):
    with pytest.raises(SpecError, match="line breaks"):
        checked(Profile, values)


def test_looking_at_the_commit_takes_no_lock(monkeypatch, tmp_path):
    seen = []

    def run(command, **options):
        seen.append(command)
        return subprocess.CompletedProcess(command, 0, stdout="abc\n", stderr="")

    monkeypatch.setattr(subprocess, "run", run)
    record._git(tmp_path, "status")
    assert seen[0][:2] == ["git", "--no-optional-locks"]
