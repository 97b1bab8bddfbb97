"""`serve` through the real servers: started, healthy, one completion, stopped."""

from __future__ import annotations

from pathlib import Path

import pytest
from client_calls import in_environment
from made_checkpoints import prune, save_emo

pytestmark = [pytest.mark.client, pytest.mark.timeout(3600)]
PROMPT = "The"


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("served")
    return prune(save_emo(root / "emo"), root / "selected_model", 16)


def completed(folder: Path) -> str:
    """The greedy continuation by our own class."""
    from emo_select.models import load_model, load_tokenizer

    model, tokenizer = load_model(str(folder), dtype="float32", device="cpu"), load_tokenizer(str(folder))
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    text = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=1)
    return str(tokenizer.decode(text[0, ids.shape[1]:], skip_special_tokens=True))


@pytest.mark.parametrize(("engine", "port", "options"), [
    ("vllm", 18711, ["--dtype", "float32", "--enforce-eager", "--max-model-len", "256"]),
    ("transformers", 18712, ["--dtype", "float32", "--device", "cpu"]),
])
def test_a_completion_of_each_server(engine: str, port: int, options: list[str], pruned: Path) -> None:
    done = in_environment("vllm", "-m", "emo_select", "serve", pruned, "--engine", engine, "--check", "--port",
                          str(port), "--", *options)
    assert f"Ready: http://127.0.0.1:{port}/v1" in done.stderr
    assert done.stdout.strip("\n") == completed(pruned)
    assert "Traceback" not in done.stdout


def test_a_model_that_the_server_cannot_run_is_refused_before_it_starts() -> None:
    done = in_environment("vllm", "-m", "emo_select", "serve", "demo/emo", "--engine", "vllm", "--check", code=2)
    assert "attention heads of 32" in done.stderr and "--engine transformers" in done.stderr
    assert "Starting" not in done.stderr and "Traceback" not in done.stderr
