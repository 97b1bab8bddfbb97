"""REAP scores side by side: this package, CerebrasResearch/reap and llm-compressor, on the same weights and tokens.

    python benchmarks/peers.py --reap CLONE              # CLONE: a clone of github.com/CerebrasResearch/reap
    python benchmarks/peers.py --reap CLONE --large      # then a checkpoint of 3.3 GB as well, for the memory

Each runs in a process and an environment of its own (made once, as for tests/clients; benchmarks/requirements).
Start-up is everything up to a first pass over a tiny checkpoint; then reading the model and scoring it are measured.
Peers load the whole model and observe batches of 8 texts, the default of REAP. All weigh by the model's own gate: the
repository of REAP renormalises where the configuration says so, the others take what the model computes. Its observer
scores the unpruned model (`reap` here); llm-compressor prunes each layer before it scores the next (here `layerwise
--score reap`).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from common import environment, run_child, table, write_random

import emo_select

HERE = Path(__file__).parent
REQUIREMENTS = HERE / "requirements"
TOKENIZER = Path(emo_select.__file__).parent / "demo" / "models" / "emo"  # llm-compressor wants one beside a model
SIZES = {"tiny": {"layers": 2, "experts": 8, "hidden": 64, "width": 32},
         "middle": {"layers": 6, "experts": 48, "hidden": 512, "width": 256},
         "large": {"layers": 16, "experts": 128, "hidden": 512, "width": 256}}
FAMILIES = {"qwen3_moe": ("Qwen3MoeForCausalLM", True), "olmoe": ("OlmoeForCausalLM", False)}
VOCABULARY, HEADS, TOP_K = 512, 8, 4

BEGIN = """
import json, os, sys, time
sys.path.insert(0, os.environ["PEERS_CODE"])
begun = time.perf_counter()
arguments = json.loads(sys.argv[1])
import torch
torch.set_num_threads(arguments["threads"])
"""
MEASURE = """
observe(arguments["warm"], arguments["rows"][:2])  # imports and first calls
started, wall, cpu = time.perf_counter() - begun, time.perf_counter(), time.process_time()
found = observe(arguments["model"], arguments["rows"])
result = {"start": started, "wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu, **found}
"""
OURS = """
from emo_select import progress
progress.configure(quiet=True)
from emo_select.checkpoint import open_checkpoint
from emo_select.experts import collect_activations, select_layerwise
from emo_select.experts.methods import select_from_scores
"""
ONE_PASS = OURS + """
def observe(folder, rows):
    checkpoint = open_checkpoint(folder)
    scores = collect_activations(checkpoint, rows)
    chosen = select_from_scores(scores, "reap", checkpoint.config["num_experts"] // 2, checkpoint.config)
    return {**{name: scores.score(name) for name in ("reap", "ean", "frequency")}, "kept": chosen.experts}
"""
LAYERWISE = OURS + """
def observe(folder, rows):
    checkpoint = open_checkpoint(folder)
    half = checkpoint.config["num_experts"] // 2
    chosen = select_layerwise(checkpoint, rows, [half], score="reap")[half]
    return {"reap": chosen.scores, "kept": chosen.experts}
"""
REAP = """
import logging
from transformers import AutoModelForCausalLM
from reap.observer import MoETransformerObserver, MoETransformerObserverConfig
logging.disable(logging.INFO)
def observe(folder, rows):
    model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype="auto").eval()
    block = {"qwen3_moe": "Qwen3MoeSparseMoeBlock", "olmoe": "OlmoeSparseMoeBlock"}[model.config.model_type]
    settings = MoETransformerObserverConfig(renormalize_router_weights=bool(model.config.norm_topk_prob),
                                            record_pruning_metrics_only=True)
    settings.module_class_name_to_hook_regex = block
    observer = MoETransformerObserver(model, settings)
    with torch.no_grad():
        for start in range(0, len(rows), 8):
            model(torch.tensor(rows[start:start + 8]))
    state = observer.report_state()
    layers = [state[layer] for layer in sorted(state)]
    drop = model.config.num_experts // 2
    kept = [[e for e in range(model.config.num_experts) if e not in torch.topk(layer["reap"], drop, largest=False)[1]]
            for layer in layers]
    return {"reap": [layer["reap"].tolist() for layer in layers],
            "ean": [layer["ean_mean"].tolist() for layer in layers],
            "frequency": [(layer["expert_frequency"] / layer["total_tokens"]).tolist() for layer in layers],
            "kept": kept}
"""
LLM_COMPRESSOR = """
from datasets import Dataset
from loguru import logger
from transformers import AutoModelForCausalLM
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning.reap import REAPPruningModifier
from llmcompressor.modifiers.pruning.reap.utils import REAPSaliencyTracker
logger.remove()
compute, seen = REAPSaliencyTracker.compute_retained_experts, []
def recorded(tracker, *rest):
    kept = compute(tracker, *rest)
    seen.append((tracker.mean_saliency.tolist(), kept.tolist()))
    return kept
REAPSaliencyTracker.compute_retained_experts = recorded
def observe(folder, rows):
    seen.clear()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    data = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]})
    oneshot(model=model, tokenizer=folder, dataset=data, recipe=REAPPruningModifier(sparsity=0.5), batch_size=8,
            num_calibration_samples=len(rows), max_seq_length=len(rows[0]), moe_calibrate_all_experts=False,
            shuffle_calibration_samples=False)
    return {"reap": [one for one, _ in seen], "kept": [kept for _, kept in seen]}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reap", type=Path, help="clone of CerebrasResearch/reap; left out without it")
    parser.add_argument("--large", action="store_true", help="a checkpoint of 3.3 GB, too")
    parser.add_argument("--size", action="append", choices=tuple(SIZES), help="only these sizes")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/emo-select-peers"))
    parser.add_argument("--threads", type=int, default=2)
    chosen = parser.parse_args()
    rows, sizes = [], chosen.size or ["tiny", "middle", *(["large"] if chosen.large else [])]
    for size in sizes:
        for family in FAMILIES if size != "large" else ["qwen3_moe"]:
            rows += compare(chosen, size, family)
    print(table(rows, ["checkpoint", "", "start-up s", "wall s", "CPU s", "peak MB", "× wall", "× CPU", "× peak",
                       "scores and kept halves beside ours"]))


def compare(chosen: argparse.Namespace, size: str, family: str) -> list[list[object]]:
    """One table row per program, each peer under the method of ours that does the same."""
    model, warm = make(chosen.folder, size, family), make(chosen.folder, "tiny", family)
    megabytes = sum(file.stat().st_size for file in model.glob("*.safetensors")) / 1e6
    rows: list[list[object]] = []
    ours: dict[str, Any] = {}
    for name, python, code, path in programs(chosen):
        found = measure(python, code, path, model, warm, chosen.threads)
        if name.startswith("ours"):
            ours = found
        seconds = [f"{found[key]:.1f}" for key in ("start", "wall", "cpu")]
        ratios = [f"{found[key] / ours[key]:.1f}" for key in ("wall", "cpu", "peak")]
        rows.append([f"{family}, {megabytes:,.0f} MB", name, *seconds, f"{found['peak'] / 1e6:,.0f}", *ratios,
                     "" if found is ours else agreement(ours, found)])
        print(*rows[-1], sep=" | ", file=sys.stderr, flush=True)
    return rows


def programs(chosen: argparse.Namespace) -> Iterator[tuple[str, str | Path, str, str]]:
    """Name, interpreter, code, and where its own code lies."""
    if chosen.reap is not None:
        yield "ours, reap", sys.executable, ONE_PASS, str(HERE.parent)
        yield "CerebrasResearch/reap", environment("reap", REQUIREMENTS), REAP, str(chosen.reap / "src")
    yield "ours, layerwise --score reap", sys.executable, LAYERWISE, str(HERE.parent)
    yield "llm-compressor", environment("llmcompressor", REQUIREMENTS), LLM_COMPRESSOR, str(HERE)


def measure(python: str | Path, code: str, path: str, model: Path, warm: Path, threads: int) -> dict[str, Any]:
    """The result of one program in a process of its own, with the peak of its resident memory."""
    rows = torch.randint(3, VOCABULARY, (16, 128), generator=torch.Generator().manual_seed(0)).tolist()
    os.environ["PEERS_CODE"] = path
    child = run_child(BEGIN + code + MEASURE, json.dumps({"model": str(model), "warm": str(warm), "rows": rows,
                                                          "threads": threads}), python=python)
    return {**child["result"], "peak": child["peak_bytes"]}


def agreement(ours: dict[str, Any], other: dict[str, Any]) -> str:
    """Largest relative differences of the statistics that both have, and in how many layers the same half is kept."""
    differences = [f"{name} {apart(ours[name], other[name]):.0e}" for name in ("reap", "ean", "frequency")
                   if name in other]
    pairs = list(zip(ours["kept"], other["kept"], strict=True))
    same = sum(sorted(one) == sorted(two) for one, two in pairs)
    return f"{', '.join(differences)}; same half in {same} of {len(pairs)} layers"


def apart(ours: list[list[float]], theirs: list[list[float]]) -> float:
    return max(abs(a - b) / abs(a) for one, two in zip(ours, theirs, strict=True)
               for a, b in zip(one, two, strict=True) if a)


def make(folder: Path, size: str, family: str) -> Path:
    """A checkpoint of random weights with peaked routing."""
    shape = SIZES[size]
    model = write_random(folder / f"{family}-{size}", configuration(family, **shape), shapes(family, **shape), "F32")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, model)
    return model


def configuration(family: str, layers: int, experts: int, hidden: int, width: int) -> dict[str, Any]:
    architecture, renormalises = FAMILIES[family]
    return {"architectures": [architecture], "model_type": family, "hidden_size": hidden, "intermediate_size": width,
            "moe_intermediate_size": width, "num_hidden_layers": layers, "num_attention_heads": HEADS,
            "num_key_value_heads": HEADS, "head_dim": hidden // HEADS, "num_experts": experts,
            "num_experts_per_tok": TOP_K, "norm_topk_prob": renormalises, "vocab_size": VOCABULARY,
            "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": False,
            "pad_token_id": 1, "eos_token_id": 0, "bos_token_id": None, "hidden_act": "silu", "attention_bias": False,
            "router_aux_loss_coef": 0.01, "output_router_logits": False, "decoder_sparse_step": 1,
            "mlp_only_layers": [], "torch_dtype": "float32"}


def shapes(family: str, layers: int, experts: int, hidden: int, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    norm = hidden // HEADS if family == "qwen3_moe" else hidden  # per head, or over all of them
    yield "model.embed_tokens.weight", (VOCABULARY, hidden)
    for layer in range(layers):
        at = f"model.layers.{layer}."
        for part in ("q", "k", "v", "o"):
            yield f"{at}self_attn.{part}_proj.weight", (hidden, hidden)
        for part in ("q", "k"):
            yield f"{at}self_attn.{part}_norm.weight", (norm,)
        for part in ("input", "post_attention"):
            yield f"{at}{part}_layernorm.weight", (hidden,)
        yield f"{at}mlp.gate.weight", (experts, hidden)
        for e in range(experts):
            yield f"{at}mlp.experts.{e}.gate_proj.weight", (width, hidden)
            yield f"{at}mlp.experts.{e}.up_proj.weight", (width, hidden)
            yield f"{at}mlp.experts.{e}.down_proj.weight", (hidden, width)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (VOCABULARY, hidden)


if __name__ == "__main__":
    main()
