"""What `serve` decides before a server starts: which folder, which engine, which command; and how one is watched."""

from __future__ import annotations

import importlib.util
import json
import shutil
import socket
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from emo_select import prune_checkpoint
from emo_select.checkpoint import resolve
from emo_select.cli.app import app
from emo_select.errors import CheckpointError, EmoSelectError, ModelError, SpecError, UsageError
from emo_select.experts.keepset import KeepSet
from emo_select.serving.engines import ENGINES, Engine, Server, engine_for
from emo_select.serving.process import complete, running, wait_until_healthy
from emo_select.serving.source import folder_to_serve

DEMO = resolve("demo/emo")
KEPT = KeepSet(experts=((1, 4, 31),) * 3, method="random", keep_k=3, num_shared=1)
OTHER = KeepSet(experts=((0, 4, 31),) * 3, method="random", keep_k=3, num_shared=1)

SERVER = """
import http.server, json, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def answer(self, body):
        self.send_response(200); self.end_headers(); self.wfile.write(body)
    def do_GET(self): self.answer(b"")
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.answer(json.dumps({"choices": [{"text": f"{asked['model']}: {asked['prompt']}"}]}).encode())
    def log_message(self, *_): pass
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def engine(script: str) -> Engine:
    """An engine whose program is a Python script that takes the port."""
    return Engine("little", lambda server: ["python", "-c", script, str(server.port)], lambda: None,
                  lambda config: None, lambda server: server.name)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def printed(*words: object) -> str:
    done = CliRunner().invoke(app, ["serve", "--print", *map(str, words)])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.stdout.strip()


def test_the_printed_command_is_complete(tmp_path: Path) -> None:
    folder = tmp_path / "my model"
    shutil.copytree(DEMO, folder)
    assert printed(folder, "--engine", "vllm", "--port", 8123, "--", "--dtype", "float32") == (
        f"vllm serve '{folder}' --served-model-name 'my model' --host 127.0.0.1 --port 8123 --dtype float32")
    command = printed(folder, "--engine", "transformers")
    assert command.startswith(f"python -m emo_select.serving.transformers_cli serve '{folder}' --host")


def test_a_run_serves_its_last_checkpoint_under_its_own_name(tmp_path: Path) -> None:
    run = tmp_path / "railway_run"
    (run / "finetuned_model").mkdir(parents=True)
    (run / "run.json").write_text("{}")
    with pytest.raises(CheckpointError, match="has no selected_model"):
        folder_to_serve(str(run), None, None)
    shutil.copytree(DEMO, run / "selected_model")
    assert folder_to_serve(str(run), None, None) == run / "selected_model"
    for step in ("checkpoint-0", "checkpoint-4", "checkpoint-12"):
        shutil.copytree(DEMO, run / "finetuned_model" / step)
    assert folder_to_serve(str(run), None, None).name == "checkpoint-12"
    assert folder_to_serve(str(run), None, None, step=4).name == "checkpoint-4"
    assert folder_to_serve(str(run), None, None, step=0).name == "selected_model"
    assert "--served-model-name railway_run " in printed(run, "--engine", "vllm")
    with pytest.raises(SpecError, match="own selection"):
        folder_to_serve(str(run), tmp_path, None)
    with pytest.raises(SpecError, match="for run directories"):
        folder_to_serve("demo/emo", None, None, step=4)


def test_a_keep_set_prunes_once(tmp_path: Path) -> None:
    KEPT.save(tmp_path / "selection.json")
    folder = folder_to_serve("demo/emo", tmp_path / "selection.json", None)
    assert folder == tmp_path / "selected_model"
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert folder_to_serve("demo/emo", tmp_path, None) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    OTHER.save(tmp_path / "selection.json")
    with pytest.raises(SpecError, match="choose another with --out"):
        folder_to_serve("demo/emo", tmp_path, None)
    assert folder_to_serve("demo/emo", tmp_path, tmp_path / "other") == tmp_path / "other"


def test_what_is_missing_or_cannot_be_served_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr("emo_select.serving.engines.find_spec",
                        lambda name: None if name in ("vllm", "fastapi") else found(name))
    with pytest.raises(UsageError, match=r"Serving needs vLLM 0\.27 or newer \(pip install .*transformers\[serving\]"):
        engine_for("auto", DEMO)
    with pytest.raises(SpecError, match="auto, vllm or transformers"):
        engine_for("sglang", DEMO)
    dense = tmp_path / "dense"
    dense.mkdir()
    (dense / "config.json").write_text(json.dumps({"model_type": "olmo2_noqknorm_prenorm"}))
    with pytest.raises(ModelError, match=r"dense baseline.*; use --engine transformers"):
        engine_for("vllm", dense)
    assert engine_for("auto", dense, installed=False).name == "transformers"
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="is an adapter; finetune with --lora --merge"):
        engine_for("auto", tmp_path / "adapter")


def test_an_old_vllm_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("emo_select.serving.engines.find_spec", lambda name: object())
    monkeypatch.setattr("emo_select.serving.engines.vllm_version", lambda: (0, 9, 1))
    assert ENGINES["vllm"].missing() == "vLLM 0.27 or newer (0.9.1 is installed)"


def test_a_server_is_started_asked_and_stopped(tmp_path: Path) -> None:
    little, server = engine(SERVER), Server(DEMO, "mine", port=free_port())
    with running(little, server) as process:
        wait_until_healthy(process, little, server)
        assert complete(little, server, "The") == "mine: The"
        with pytest.raises(UsageError, match="choose another with --port"), running(little, server):
            pass
    assert process.poll() is not None


def test_a_server_that_does_not_come_up_is_said() -> None:
    broken, server = engine("raise SystemExit(3)"), Server(DEMO, "mine", port=free_port())
    with pytest.raises(EmoSelectError, match="little ended with exit code 3 before it was ready"), \
            running(broken, server) as process:
        wait_until_healthy(process, broken, server)


def test_what_a_server_started_ends_with_it(tmp_path: Path) -> None:
    """Engines run in processes of their own; none may keep a GPU."""
    script = (f"import subprocess; child = subprocess.Popen(['sleep', '600']);"
              f"open({str(tmp_path / 'child')!r}, 'w').write(str(child.pid)); raise SystemExit(3)")
    broken, server = engine(script), Server(DEMO, "mine", port=free_port())
    with pytest.raises(EmoSelectError), running(broken, server) as process:
        wait_until_healthy(process, broken, server)
    pid = int((tmp_path / "child").read_text())
    deadline = time.monotonic() + 30  # a loaded machine takes a moment to end what was killed
    while _lives(pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] not in "ZX"
    except OSError:
        return False


def test_a_pruned_model_is_recognised_by_what_it_was_pruned_from(tmp_path: Path) -> None:
    """A folder of the right name that another model was pruned to is not served in its place."""
    KEPT.save(tmp_path / "selection.json")
    shutil.copytree(resolve("demo/stdmoe"), tmp_path / "std")
    kept = KEPT.model_copy(update={"num_shared": 0})
    prune_checkpoint(tmp_path / "std", kept, tmp_path / "selected_model")
    with pytest.raises(SpecError, match="is another model than demo/emo pruned to"):
        folder_to_serve("demo/emo", tmp_path, None)
