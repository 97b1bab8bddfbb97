"""The program as a person meets it: quick help, nothing heavy imported, one sentence per mistake."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("torch", "transformers", "lm_eval", "pandas", "datasets", "matplotlib", "submitit", "numpy")
PROGRAM = Path(sys.executable).with_name("emo-select")


def emo_select(*words, **options):
    return subprocess.run([PROGRAM, *words], capture_output=True, text=True, timeout=120, **options)


def imported_by(code):
    probe = f"import sys\n{code}\nprint([name for name in {HEAVY!r} if name in sys.modules])"
    shown = subprocess.check_output([sys.executable, "-c", probe], text=True)
    return json.loads(shown.splitlines()[-1].replace("'", '"'))


def commands():
    from emo_select.cli.app import app

    return sorted(command.name or command.callback.__name__.replace("_", "-") for command in app.registered_commands)


def test_importing_the_package_and_the_program_imports_nothing_heavy():
    assert imported_by("import emo_select, emo_select.cli.app") == []


def test_help_imports_nothing_heavy():
    code = "from emo_select.cli.app import app\ntry: app(['run', '--help'])\nexcept SystemExit: pass"
    assert imported_by(code) == []


def test_every_command_has_help():
    listed = commands()
    assert {"activations", "select", "prune", "finetune", "eval", "table", "run", "pretrain", "version"} <= set(listed)
    for name in listed:
        shown = emo_select(name, "--help")
        assert shown.returncode == 0, shown.stderr
        assert "Usage" in shown.stdout


def test_version_names_what_numbers_depend_on():
    found = json.loads(emo_select("version", "--json").stdout)
    assert {"python", "torch", "transformers", "lm-eval"} <= set(found)


def test_models_lists_the_published_ones():
    found = json.loads(emo_select("models", "--json").stdout)
    assert "allenai/Emo_1b14b_1T" in found["published"]
    assert found["shipped"] == ["demo/emo", "demo/stdmoe"]


RUN = ("run", "--model", "demo/emo", "--task", "demo", "--keep-k", "4")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("run", "--model", "demo/emu", "--task", "demo", "--keep-k", "4"), "did you mean 'demo/emo'"),
        (("run", "--model", "./nowhere", "--task", "demo", "--keep-k", "4"), "There is no folder './nowhere'"),
        (("run", "--model", "demo/emo", "--task", "dem", "--keep-k", "4"), "did you mean 'demo"),
        (("run", "--model", "demo/emo", "--task", "demo", "--keep-k", "33"), "Cannot keep 33 experts"),
        (("run", "--model", "demo/emo", "--task", "demo", "--keep-k", "1"), "leaves no routed expert"),
        (("run", "--model", "demo/emo", "--task", "demo", "--keep-k", "half"), "neither a number"),
        ((*RUN, "--method", "layerwsie"), "did you mean 'layerwise'"),
        ((*RUN, "--stages", "selec"), "did you mean 'select'"),
        ((*RUN, "--stages", "finetune"), "add it to --stages"),
        ((*RUN, "--lr", "fast"), "not a positive number"),
        ((*RUN, "--output-dir", "/proc/x"), "choose another with --output-dir"),
        ((*RUN, "--score", "loudness"), "Unknown"),
        ((*RUN, "--device", "cuda:7"), "--device cpu"),
        ((*RUN, "--gpus", "3"), "does not divide by 3 processes"),
        ((*RUN, "--micro-batch-size", "5"), "do not divide"),
    ],
)
def test_a_mistake_is_one_sentence_and_nothing_is_left(words, said, tmp_path):
    options = () if "--output-dir" in words else ("--output-dir", "out")
    done = emo_select(*words, *options, cwd=tmp_path)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def with_tokenizer(folder):
    """The folder, with the demo's tokenizer in it: a model without one is refused for that."""
    for path in (Path(__file__).parents[1] / "emo_select" / "demo" / "models" / "emo").glob("token*"):
        shutil.copy(path, folder)
    return str(folder)


def test_a_dense_model_cannot_be_selected_from(golden, tmp_path):
    dense = with_tokenizer(shutil.copytree(golden / "models" / "dense_olmo2", tmp_path / "dense"))
    done = emo_select("select", "--model", dense, "--task", "demo_railway", "--keep-k", "4", cwd=tmp_path)
    assert done.returncode == 2
    assert "`emo-select run` finetunes and evaluates it as it is" in done.stderr


def test_too_little_disk_is_said_before_work(tmp_path):
    """A checkpoint of three terabytes: headers that promise it, in a sparse file."""
    import struct

    from emo_select.models.shapes import outline

    config = {"model_type": "emo", "num_hidden_layers": 1, "num_experts": 4, "num_experts_per_tok": 2,
              "hidden_size": 2**18, "intermediate_size": 2**18, "num_attention_heads": 2**11, "num_key_value_heads": 1,
              "vocab_size": 316, "dtype": "float32"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with_tokenizer(tmp_path)
    header, at = {}, 0
    for name, info in outline(config, tmp_path).tensors.items():
        header[name] = {"dtype": "F32", "shape": list(info.shape), "data_offsets": [at, at + info.bytes]}
        at += info.bytes
    text = json.dumps(header).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + at)
    done = emo_select("run", "--model", str(tmp_path), "--task", "demo_railway", "--keep-k", "2", "--method", "random",
                      "--output-dir", str(tmp_path / "out"))
    assert done.returncode == 2
    assert "GB free; free some space" in done.stderr
    assert not list((tmp_path / "out").rglob("*.json"))
