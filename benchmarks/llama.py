"""Size and speed of a full and a pruned EMO in llama.cpp, as `export gguf` writes them.

    python benchmarks/llama.py            # 6 layers × 48 experts, hidden 512; 12 experts kept; f32 and q8_0

llama.cpp runs in the environment of tests/clients (`make clients`) and times itself: a prompt of 256 tokens, then 32
new ones, the better of two. Weights are random: only size and speed mean anything.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from common import environment, make_random_checkpoint, run_child, table
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as tokenizer_models

from emo_select.experts.keepset import KeepSet
from emo_select.experts.prune import prune_checkpoint
from emo_select.export.gguf import export_gguf

SHAPE = {"layers": 6, "experts": 48, "hidden": 512, "width": 256, "heads": 8, "top_k": 5, "shared": 1}
ASK = """
import json, sys, time, xllamacpp
settings = xllamacpp.CommonParams()
settings.model.path = sys.argv[1]
settings.n_ctx, settings.n_parallel, settings.fit_params, settings.port = 512, 1, False, 0
settings.verbosity, settings.cpuparams.n_threads = 0, int(sys.argv[2])
server, found = xllamacpp.Server(settings), []
for _ in range(2):
    cpu = time.process_time()
    answer = server.handle_completions({"prompt": list(range(3, 259)), "n_predict": 32, "temperature": 0,
                                        "ignore_eos": True, "cache_prompt": False})
    found.append((json.loads(answer) if isinstance(answer, str | bytes) else answer)["timings"])
    found[-1]["cpu"] = time.process_time() - cpu
result = {name: max(one[name] for one in found) for name in ("prompt_per_second", "predicted_per_second")}
result["cpu"] = min(one["cpu"] for one in found)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/emo-select-llama"))
    parser.add_argument("--keep", type=int, default=12)
    parser.add_argument("--threads", type=int, default=2)
    chosen = parser.parse_args()
    rows = []
    for name, model in models(chosen.folder, chosen.keep).items():
        for dtype in ("f32", "q8_0"):
            out = chosen.folder / f"{name}-{dtype}"
            shutil.rmtree(out, ignore_errors=True)
            export_gguf(model, out, dtype=dtype)
            child = run_child(ASK, str(out / "model.gguf"), str(chosen.threads), python=environment("llama"))
            speed = child["result"]
            rows.append([name, dtype, f"{(out / 'model.gguf').stat().st_size / 1e6:.0f}",
                         f"{speed['prompt_per_second']:.0f}", f"{speed['predicted_per_second']:.0f}",
                         f"{speed['cpu']:.2f}", f"{child['peak_bytes'] / 1e6:.0f}"])
    print(table(rows, ["model", "type", "MB", "prompt tokens/s", "new tokens/s", "CPU s for both", "peak MB"]))


def models(folder: Path, keep: int) -> dict[str, Path]:
    """The full model, and the one with `keep` experts per layer, the shared one among them."""
    full, pruned = make_random_checkpoint(folder / "full", **SHAPE), folder / f"pruned-{keep}"
    write_tokenizer(full)
    if not pruned.exists():
        experts = ((*range(keep - 1), SHAPE["experts"] - 1),) * SHAPE["layers"]
        prune_checkpoint(full, KeepSet(experts=experts, method="random", keep_k=keep, num_shared=1), pruned)
    return {f"{SHAPE['experts']} experts": full, f"{keep} experts": pruned}


def write_tokenizer(folder: Path) -> None:
    """One token a byte, and a merge, as llama.cpp wants one."""
    tokens = ["<|endoftext|>", "<|pad|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "he"]
    made = Tokenizer(tokenizer_models.BPE({token: number for number, token in enumerate(tokens)}, [("h", "e")]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.add_special_tokens(tokens[:2])
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": tokens[0], "pad_token": tokens[1]}))


if __name__ == "__main__":
    main()
