"""Selection at the shapes of published models: two layers of random weights each, one model at a time.

    python benchmarks/shapes.py estimate                     # on paper, from the published configurations
    python benchmarks/shapes.py qwen3-30b-a3b                # layerwise and all criteria, float32 and bfloat16
    python benchmarks/shapes.py deepseek-v3 --experts 64     # with fewer experts, where the disk is small
    python benchmarks/shapes.py emo-14b --only layerwise --tokens 2048

Every measurement runs in a process of its own. CPU seconds can be compared on a machine that others use too. `layer`
is what one layer takes in the precision that is computed in; the goal for the peak is 1.5 of them (of what is held:
all experts for the criteria, the kept ones for layerwise), the budget for hidden states, and 600 MB. The share of time
in matrix products is what `select` reports.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from common import make_random_weights, run_child, table

from emo_select.models.shapes import outline

LATENT = {"q_lora_rank": 1536, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128}
COMMON = {"max_position_embeddings": 4096, "tie_word_embeddings": False, "dtype": "bfloat16", "bos_token_id": 1,
          "eos_token_id": 2, "pad_token_id": 0}
# What the published config.json say of sizes and routing, and how many layers there are.
MODELS: dict[str, tuple[int, dict[str, Any]]] = {
    "emo-14b": (16, {"model_type": "emo", "hidden_size": 2048, "intermediate_size": 1024, "num_attention_heads": 16,
                     "num_key_value_heads": 16, "num_experts": 128, "num_experts_per_tok": 8, "num_shared_experts": 1,
                     "vocab_size": 100352}),
    "qwen3-30b-a3b": (48, {"model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144,
                           "moe_intermediate_size": 768, "num_attention_heads": 32, "num_key_value_heads": 4,
                           "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True,
                           "decoder_sparse_step": 1, "vocab_size": 151936}),
    "glm-4.5-air": (46, {"model_type": "glm4_moe", "hidden_size": 4096, "intermediate_size": 10944,
                         "moe_intermediate_size": 1408, "num_attention_heads": 96, "num_key_value_heads": 8,
                         "head_dim": 128, "n_routed_experts": 128, "n_shared_experts": 1, "num_experts_per_tok": 8,
                         "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "norm_topk_prob": True,
                         "partial_rotary_factor": 0.5, "vocab_size": 151552}),
    "gpt-oss-120b": (36, {"model_type": "gpt_oss", "hidden_size": 2880, "intermediate_size": 2880,
                          "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64,
                          "num_local_experts": 128, "num_experts_per_tok": 4, "sliding_window": 128,
                          "vocab_size": 201088}),
    "deepseek-v3": (61, {"model_type": "deepseek_v3", "hidden_size": 7168, "intermediate_size": 18432,
                         "moe_intermediate_size": 2048, "num_attention_heads": 128, "num_key_value_heads": 128,
                         "n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8, "n_group": 8,
                         "topk_group": 4, "norm_topk_prob": True, "routed_scaling_factor": 2.5,
                         "first_k_dense_replace": 3, "vocab_size": 129280, **LATENT}),
}
COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")
CHILD = """
import json, sys, time, torch
from emo_select import progress
from emo_select.checkpoint import open_checkpoint
from emo_select.experts import StreamOptions, collect_activations, select_layerwise
import emo_select.experts.passes as passes
source, a = sys.argv[1], json.loads(sys.argv[2])
torch.set_num_threads(a["threads"])
said = []
progress.say, passes.WORTH_SAYING = said.append, 0.0
prompts = torch.randint(3, 4000, (a["tokens"] // 128, 128), generator=torch.Generator().manual_seed(0)).tolist()
options = StreamOptions(device="cpu", dtype=a["dtype"], memory_budget=a["budget"])
checkpoint = open_checkpoint(source)
wall, cpu = time.perf_counter(), time.process_time()
if a["what"] == "layerwise":
    kept = select_layerwise(checkpoint, prompts, [a["keep"]], options=options)[a["keep"]].experts
else:
    kept = None
    collect_activations(checkpoint, prompts, options=options)
result = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu, "said": said[-1], "kept": kept}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=("estimate", *MODELS))
    parser.add_argument("--folder", type=Path, default=Path("/tmp/emo-select-benchmark"))
    parser.add_argument("--experts", type=int, help="fewer than the model has, where disk or memory is small")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", choices=("layerwise", "criteria"))
    parser.add_argument("--dtype", choices=("float32", "bfloat16"))
    parser.add_argument("--keep-files", action="store_true")
    chosen = parser.parse_args()
    estimate() if chosen.model == "estimate" else measure(chosen)


def estimate() -> None:
    rows = []
    for name, (layers, _) in MODELS.items():
        config = cut_out(name, None)
        shell, experts = layer_weights(config)
        keep = experts_of(config) // 8
        for what, held in (("layerwise, an eighth kept", shell + experts // 8), ("every criterion", shell + experts)):
            size = [f"{(1.5 * held * each + 0.6e9) / 1e9:.1f}" for each in (4, 2)]
            read = layers * held * 2 / 1e9
            rows.append([name, what.replace("an eighth", str(keep)), f"{held * 2 / 1e9:.2f}", *size, f"{read:.0f}"])
    print(table(rows, ["", "", "GB of a layer held, bf16", "goal for the peak without budget, GB: fp32", "bf16",
                       "GB read in all"]))


def measure(chosen: argparse.Namespace) -> None:
    config, budget = cut_out(chosen.model, chosen.experts), 64_000_000
    source = make_random_weights(chosen.folder / chosen.model, config)
    shell, experts = layer_weights(config)
    keep, rows, kept = experts_of(config) // 8, [], {}
    for what in [chosen.only] if chosen.only else ["layerwise", "criteria"]:
        held = shell + (experts // 8 if what == "layerwise" else experts)
        for dtype, each in (("float32", 4), ("bfloat16", 2)):
            if chosen.dtype not in (None, dtype):
                continue
            found = run_child(CHILD, str(source), json.dumps({
                "what": what, "dtype": dtype, "tokens": chosen.tokens, "threads": chosen.threads, "keep": keep,
                "budget": budget}))
            result, goal = found["result"], 1.5 * held * each + budget + 600e6
            kept[what, dtype] = result["kept"]
            rows.append([what, dtype, f"{result['cpu']:.1f}", f"{result['wall']:.1f}", share(result["said"]),
                         f"{held * each / 1e9:.2f}", f"{found['peak_bytes'] / 1e9:.2f}", f"{goal / 1e9:.2f}"])
            print(rows[-1], flush=True)
    print(f"\n{chosen.model}, {experts_of(config)} experts, two layers, {chosen.tokens} tokens, keep {keep}\n")
    print(table(rows, ["", "", "CPU s", "wall s", "in products", "layer held, GB", "peak GB", "goal GB"]))
    both = [kept.get(("layerwise", dtype)) for dtype in ("float32", "bfloat16")]
    if all(both):
        print(f"\nKeep sets of float32 and bfloat16 have {overlap(*both):.1%} in common.")
    if not chosen.keep_files:
        shutil.rmtree(source)


def cut_out(name: str, experts: int | None) -> dict[str, Any]:
    """The published configuration with two layers, both with experts, and a small vocabulary."""
    config = {**COMMON, **MODELS[name][1], "num_hidden_layers": 2, "vocab_size": 4096}
    if "first_k_dense_replace" in config:
        config["first_k_dense_replace"] = 0
    for key in COUNTS:
        if key in config and experts:
            config[key] = experts
    return config


def experts_of(config: Mapping[str, Any]) -> int:
    return next(config[key] for key in COUNTS if key in config)


def layer_weights(config: dict[str, Any]) -> tuple[int, int]:
    """Numbers in one layer: all but its experts, and its experts."""
    shell = experts = 0
    for name, info in outline(config, Path("paper")).tensors.items():
        if name.startswith("model.layers.1."):
            count = info.bytes // 2
            if ".experts." in name:
                experts += count
            else:
                shell += count
    return shell, experts


def share(said: str) -> str:
    return said.partition("s, ")[2].partition(" of them")[0] if "matrix products" in said else "–"


def overlap(a: list[list[int]], b: list[list[int]]) -> float:
    return sum(len(set(x) & set(y)) for x, y in zip(a, b, strict=True)) / sum(map(len, a))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
