"""Runs with transformers 4.57: what the published remote code makes of a checkpoint, model by model."""

import json
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

AUTO_MAP = {"AutoConfig": "configuration_emo.EmoConfig", "AutoModelForCausalLM": "modeling_emo.EmoForCausalLM"}


def with_code(checkpoint: str, code: str, folder: Path) -> Path:
    """A copy of the checkpoint that names the remote code, which lies in it."""
    shutil.copytree(checkpoint, folder)
    for file in Path(code).glob("*.py"):
        shutil.copy(file, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": AUTO_MAP}))
    return folder


@torch.no_grad()
def ask(folder: Path, rows: list[list[int]], new_tokens: int) -> dict:
    model, loading = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, dtype=torch.float32, output_loading_info=True)
    answers = []
    for row in rows:
        ids = torch.tensor([row])
        chosen = model(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
        text = model.generate(ids, max_new_tokens=new_tokens, do_sample=False, eos_token_id=None, pad_token_id=1)
        answers.append({"log_probabilities": chosen.tolist(), "tokens": text[0, len(row):].tolist()})
    return {"answers": answers, **{key: sorted(loading[key]) for key in ("missing_keys", "unexpected_keys")}}


if __name__ == "__main__":
    job, found = json.loads(Path(sys.argv[1]).read_text()), {}
    for name, checkpoint in job["models"].items():
        with tempfile.TemporaryDirectory() as scratch:
            folder = with_code(checkpoint, job["code"], Path(scratch) / name)
            found[name] = ask(folder, job["rows"], job["new_tokens"])
    Path(sys.argv[2]).write_text(json.dumps(found))
