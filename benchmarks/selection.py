"""Selection side by side: the streaming engine against the plain published algorithm, and its memory.

    python benchmarks/selection.py speed            # 16 layers × 128 experts, hidden 256, width 128, 32 × 128 tokens
    python benchmarks/selection.py few-shot         # 64 texts of 512 tokens that share the first 448
    python benchmarks/selection.py memory           # a checkpoint of at least 6 GB: peak resident memory by /proc
    python benchmarks/selection.py estimate         # the same figures on paper for the published 54 GB checkpoint
    python benchmarks/selection.py device           # tokens/s at the published shape in bf16, where there is a GPU

Every measurement runs in a process of its own. `speed` prints wall-clock and CPU seconds: on a machine that others
use too, compare the CPU seconds.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from common import make_random_checkpoint, run_child, table

KEEP_KS = [8, 16, 32, 64, 128]  # the published ones
COMMON = """
import json, sys, time, torch
sys.path.insert(0, {here!r})
from emo_select import progress
progress.configure(quiet=True)
from emo_select.checkpoint import open_checkpoint
from emo_select.experts import StreamOptions, collect_activations, prune_checkpoint, select_layerwise
source, arguments = sys.argv[1], json.loads(sys.argv[2])
torch.set_num_threads(arguments.get("threads", 2))
draw = torch.Generator().manual_seed(0)
prompts = torch.randint(3, 500, arguments["prompts"], generator=draw)
prompts[:, :arguments.get("shared", 0)] = prompts[0, :arguments.get("shared", 0)]
prompts = prompts.tolist()
checkpoint = open_checkpoint(source)
options = StreamOptions(**arguments.get("options", {{}}))
select_layerwise(open_checkpoint(arguments["warm"]), [[5, 6, 7]], [4])  # imports and first calls
wall, cpu = time.perf_counter(), time.process_time()
"""
DONE = "\nresult = {'wall': time.perf_counter() - wall, 'cpu': time.process_time() - cpu, 'found': found}\n"
PLAIN = """
from plain_selection import plain_easy_ep, plain_layerwise
from emo_select.models import load_model
"""
OURS_LAYERWISE = """
chosen = select_layerwise(checkpoint, prompts, arguments["keep_ks"], options=options)
found = {str(k): [list(layer) for layer in v.experts] for k, v in chosen.items()}
"""
PLAIN_LAYERWISE = PLAIN + """
found = {str(k): plain_layerwise(load_model(source), prompts, k) for k in arguments["keep_ks"]}
"""
OURS_EASY_EP = "found = collect_activations(checkpoint, prompts, options=options).score('easy_ep')"
PLAIN_EASY_EP = PLAIN + "found = plain_easy_ep(load_model(source), prompts)"
SELECT_AND_PRUNE = """
from pathlib import Path
chosen = select_layerwise(checkpoint, prompts, arguments["keep_ks"], options=options)
for k, v in chosen.items():
    prune_checkpoint(source, v, Path(arguments["out"]) / str(k))
found = None
"""
COLLECT = "collect_activations(checkpoint, prompts, options=options); found = None"
BARE = "found = None"  # imports and the warm-up: what the memory is compared with


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("speed", "few-shot", "memory", "estimate", "device"))
    parser.add_argument("--folder", type=Path, default=Path("/tmp/emo-select-benchmark"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--five", action="store_true", help="speed: also run the plain algorithm for all five keep-k")
    chosen = parser.parse_args()
    run = {"speed": speed, "few-shot": few_shot, "memory": memory, "estimate": estimate, "device": device}
    run[chosen.what](chosen)


def measure(code: str, source: Path, warm: Path, **arguments: Any) -> dict[str, Any]:
    """Run `code` in a process of its own; its result with the peak of resident memory."""
    program = COMMON.format(here=str(Path(__file__).parent)) + code + DONE
    child = run_child(program, str(source), json.dumps({**arguments, "warm": str(warm)}))
    return {**child["result"], "peak": child["peak_bytes"]}


def tiny(folder: Path) -> Path:
    return make_random_checkpoint(folder / "warm", layers=2, experts=8, hidden=32, width=16, heads=2)


def speed(chosen: argparse.Namespace) -> None:
    source, warm = make_random_checkpoint(chosen.folder / "small"), tiny(chosen.folder)
    common = {"prompts": [32, 128], "threads": chosen.threads}

    def run(name: str, code: str, keep_ks: list[int]) -> dict[str, Any]:
        found = measure(code, source, warm, keep_ks=keep_ks, **common)
        print(f"{name}: wall {found['wall']:.2f} s, CPU {found['cpu']:.2f} s", file=sys.stderr, flush=True)
        return found

    ours, together = run("ours", OURS_LAYERWISE, [16]), run("ours, five keep-k", OURS_LAYERWISE, KEEP_KS)
    easy = run("ours, activations", OURS_EASY_EP, [])
    plain = run("plain", PLAIN_LAYERWISE, [16])
    assert ours["found"]["16"] == together["found"]["16"] == plain["found"]["16"], "the keep sets differ"
    plain_easy = run("plain EASY-EP", PLAIN_EASY_EP, [])
    if chosen.five:
        parts = [plain if k == 16 else run(f"plain, keep {k}", PLAIN_LAYERWISE, [k]) for k in KEEP_KS]
        assert {k: v for part in parts for k, v in part["found"].items()} == together["found"], "the keep sets differ"
        apart = {kind: sum(part[kind] for part in parts) for kind in ("wall", "cpu")} | {"note": "each measured"}
    else:
        apart = {"wall": 5 * plain["wall"], "cpu": 5 * plain["cpu"], "note": "five times the one above"}
    worst = max(abs(a - b) / b for x, y in zip(easy["found"], plain_easy["found"], strict=True)
                for a, b in zip(x, y, strict=True) if b)
    rows = [ratio("layerwise, keep 16", plain, ours, "keep sets identical"),
            ratio(f"layerwise, keep {KEEP_KS}", apart, together, apart["note"]),
            ratio("EASY-EP and every other criterion", plain_easy, easy, f"scores within {worst:.0e}")]
    print(table(rows, ["", "plain wall s", "ours wall s", "×", "plain CPU s", "ours CPU s", "×", ""]))


def few_shot(chosen: argparse.Namespace) -> None:
    source, warm = make_random_checkpoint(chosen.folder / "small"), tiny(chosen.folder)
    rows = []
    for name, plain_code, code in (("layerwise, keep 16", PLAIN_LAYERWISE, OURS_LAYERWISE),
                                   ("EASY-EP and every other criterion", PLAIN_EASY_EP, OURS_EASY_EP)):
        plain, ours = (measure(c, source, warm, keep_ks=[16], prompts=[64, 512], shared=448, threads=chosen.threads)
                       for c in (plain_code, code))
        if code == OURS_LAYERWISE:
            assert plain["found"] == ours["found"], "the keep sets differ"
        rows.append(ratio(name, plain, ours, ""))
    print(table(rows, ["", "plain wall s", "ours wall s", "×", "plain CPU s", "ours CPU s", "×", ""]))


def ratio(name: str, plain: dict[str, Any], ours: dict[str, Any], note: str) -> list[object]:
    return [name, f"{plain['wall']:.2f}", f"{ours['wall']:.2f}", f"{plain['wall'] / ours['wall']:.1f}",
            f"{plain['cpu']:.2f}", f"{ours['cpu']:.2f}", f"{plain['cpu'] / ours['cpu']:.1f}", note]


def memory(chosen: argparse.Namespace) -> None:
    shape = {"layers": 16, "experts": 128, "hidden": 1024, "width": 256}
    source = make_random_checkpoint(chosen.folder / "large", vocab=8192, heads=8, **shape)
    warm, layer, budget = tiny(chosen.folder), layer_bytes(**shape), 4_000_000  # less than the hidden states
    total = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    common = {"prompts": [16, 128], "threads": chosen.threads, "keep_ks": [16],
              "options": {"memory_budget": budget}, "out": str(chosen.folder / "pruned")}
    rows = []
    for name, code in (("nothing (imports)", BARE), ("layerwise + prune, keep 16", SELECT_AND_PRUNE),
                       ("activations, every criterion", COLLECT)):
        found = measure(code, source, warm, **common)
        bound = 1.5 * layer + budget + 600e6
        rows.append([name, f"{found['peak'] / 1e6:.0f}", f"{bound / 1e6:.0f}", f"{found['wall']:.1f}"])
    print(f"Checkpoint {total / 1e9:.2f} GB, one layer {layer / 1e6:.0f} MB, hidden states {budget / 1e6:.0f} MB\n")
    print(table(rows, ["", "peak MB", "1.5 layers + budget + 600 MB", "wall s"]))


def layer_bytes(layers: int, experts: int, hidden: int, width: int, bytes_each: int = 4) -> int:
    """Bytes of one decoder layer."""
    return bytes_each * (experts * 3 * hidden * width + experts * hidden + 4 * hidden * hidden)


def estimate(chosen: argparse.Namespace) -> None:
    """The published shape: 16 layers × 128 experts, hidden 2048, width 1024, fp32."""
    layer = layer_bytes(16, 128, 2048, 1024)
    rows = []
    for keep_k in KEEP_KS[:-1]:  # keeping all 128 needs no pass
        shell, kept = layer - 128 * 3 * 2048 * 1024 * 4, keep_k * 3 * 2048 * 1024 * 4
        rows.append([keep_k, f"{(16 * shell + 15 * kept) / 1e9:.1f}", f"{(2 * shell + kept) / 1e9:.2f}"])
    print(f"One layer {layer / 1e9:.2f} GB; hidden states of a million tokens {1e6 * 2048 * 4 / 1e9:.1f} GB "
          "(fp32; beyond --memory-budget in the scratch file).\n")
    print(table(rows, ["layerwise, keep-k", "GB read of 54.3", "GB of weights held at most"]))
    print(f"\nactivations: {16 * layer / 1e9:.1f} GB read, {layer / 1e9:.2f} GB of weights held at most.")


def device(chosen: argparse.Namespace) -> None:
    """Tokens per second at the published shape, and what transfer and products must take at least."""
    import torch

    if not torch.cuda.is_available():
        print("No GPU here; nothing measured.")
        return
    shape = {"layers": 16, "experts": 128, "hidden": 2048, "width": 1024}
    source = make_random_checkpoint(chosen.folder / "device", vocab=8192, heads=16, dtype="BF16", **shape)
    warm, tokens = tiny(chosen.folder), 256 * 1024
    common = {"prompts": [256, 1024], "threads": chosen.threads, "keep_ks": [16], "options": {"device": "cuda"}}
    rows = []
    for name, code, read in (("layerwise, keep 16", OURS_LAYERWISE, 16), ("activations", COLLECT, 128)):
        seconds = measure(code, source, warm, **common)["wall"]
        transferred = 16 * (layer_bytes(**shape, bytes_each=2) * read / 128)
        flops = 2 * tokens * 16 * (4 * 2048 * 2048 + 8 * 3 * 2048 * 1024)
        rows.append([name, f"{seconds:.1f}", f"{tokens / seconds:,.0f}", f"{transferred / 1e9:.1f}",
                     f"{flops / seconds / 1e12:.0f}"])
    print(table(rows, ["", "wall s", "tokens/s", "GB read", "TFLOP/s reached"]))


if __name__ == "__main__":
    main()
