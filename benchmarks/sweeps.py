"""Sweeps: what sharing saves, how long handing in takes, and what a unit costs beside its work.

    python benchmarks/sweeps.py plan [--data-dir DIR]   # main, methods, calibration: shared, alone, as published
    python benchmarks/sweeps.py submit                  # 3,000 units to a real Slurm (SLURM_CONF), held
    python benchmarks/sweeps.py overhead                # units with nothing to do, under the local executor

`plan` needs no weights: it makes checkpoints of the published shapes as sparse files, which take no disk.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from common import table

from emo_select.spec import Execution
from emo_select.sweeps import estimate, local, slurm, store
from emo_select.sweeps.bench import Bench
from emo_select.sweeps.control import Control
from emo_select.sweeps.graph import build
from emo_select.sweeps.profile import Profile
from emo_select.sweeps.spec import SweepRun, SweepSpec, expand_sweep, read_sweep
from emo_select.sweeps.store import Job, Submission
from emo_select.tree import Tree

SWEEPS = Path(__file__).parents[1] / "sweeps"
LAYERS = 16
KEEP_KS_OF_PUBLISHED_LAUNCHER = 5  # models that skip selection were trained once per keep-k all the same
SHAPE = {"num_hidden_layers": LAYERS, "hidden_size": 2048, "intermediate_size": 1024, "num_attention_heads": 16,
         "num_key_value_heads": 16, "vocab_size": 100352, "num_experts_per_tok": 8, "max_position_embeddings": 4096,
         "rms_norm_eps": 1e-6, "rope_theta": 500000.0, "tie_word_embeddings": False, "hidden_act": "silu"}


def plan(data_dir: str | None) -> None:
    """Cost of the shipped sweeps from nothing: shared, each run alone, and by the published launchers' schedule."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in ("main", "methods", "calibration"):
            runs = _with_sparse_models(expand_sweep(read_sweep(SWEEPS / f"{name}.yaml")), Path(folder), data_dir)
            bench = Bench(Tree(Path(folder) / "tree"))
            start = time.perf_counter()
            estimator = estimate.Estimator(bench)
            shared, alone = estimator.shared(build(runs)), estimator.alone(runs)
            took = time.perf_counter() - start
            published = sum((_published(estimator, run) for run in runs), estimate.Cost())
            rows += [_row(name, part, cost, published) for part, cost in
                     (("shared", shared), ("each run alone", alone), ("published schedule", published))]
            print(f"{name}: planned in {took:.1f} s, {shared.unknown} runs without data", file=sys.stderr)
    print(table(rows, ("sweep", "schedule", "selection tokens", "training tokens", "TB read",
                       "published / this: tokens to select", "tokens to train", "bytes")))


def submit(units: int) -> None:
    """Hand held units to Slurm and take them back."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        control = _many(Path(folder), units, Profile(time="1h", extra={"hold": True}))
        start = time.perf_counter()
        control.submit()
        took = time.perf_counter() - start
        start = time.perf_counter()
        queued = len(slurm.queue())
        polled = time.perf_counter() - start
        again = Control(control.tree, control.submission)
        start = time.perf_counter()
        again.watch.look()
        looked = time.perf_counter() - start
        control.cancel()
    print(f"{queued} units in the queue: submitted in {took:.1f} s; one query {polled:.2f} s; status {looked:.1f} s")


def overhead(units: int, workers: int) -> None:
    """Local units that find nothing to do: what a unit costs beside its work."""
    with tempfile.TemporaryDirectory() as folder:
        control = _many(Path(folder), units, Profile(executor="local", workers=workers))
        chosen = {unit.name: unit for unit in control.units if unit.kind == "fetch"}
        first = next(iter(chosen.values()))
        copies = {f"fetch-{n}": first.model_copy(update={"name": f"fetch-{n}"}) for n in range(units)}
        store.save_jobs(control.paths, (Job(root=str(folder), sweep="many", unit=unit) for unit in copies.values()))
        start = time.perf_counter()
        local.run(control.paths, copies, control.submission.profile)
        took = time.perf_counter() - start
    print(f"{units} fetch checks, {workers} worker(s): {took:.1f} s, {took / units * 1000:.0f} ms per unit")


def _many(root: Path, units: int, profile: Profile) -> Control:
    """A sweep of the shipped model with `units` units in all: a fetch check and runs that share nothing."""
    variants = tuple({"calibration": {"seed": seed}} for seed in range(units - 1))
    sweep = SweepSpec(name="many", models=["demo/emo"], tasks=("demo_harbor",), keep_k=(8,), methods=("random",),
                      variants=variants)
    return Control(Tree(root), Submission(sweep=sweep, keep_weights="none", profile=profile))


def _published(estimator: estimate.Estimator, run: SweepRun) -> estimate.Cost:
    """One run by the published scripts: a greedy selection repeats the network from its embedding for every layer, so
    (layers + 1) / 2 passes; every run loads the whole model; models that skip selection are run for every keep-k."""
    if estimator.bench.missing(run):
        return estimate.Cost(unknown=1)
    passes = {"layerwise": (LAYERS + 1) / 2, "random": 0}.get(run.spec.method, 1) * run.spec.selects
    repeats = 1 if run.spec.selects else KEEP_KS_OF_PUBLISHED_LAUNCHER
    whole = estimator.bench.bind(run).source.total_bytes
    return estimate.Cost(selection_tokens=int(passes * estimator.calibration_tokens(run)) if passes else 0,
                         training_tokens=repeats * estimator.training_tokens(run), bytes_read=repeats * whole)


def _row(name: str, schedule: str, cost: estimate.Cost, published: estimate.Cost) -> list[str]:
    parts = ("selection_tokens", "training_tokens", "bytes_read")
    ratios = [getattr(published, part) / getattr(cost, part) for part in parts]
    return [name, schedule, f"{cost.selection_tokens / 1e9:.2f} G", f"{cost.training_tokens / 1e9:.2f} G",
            f"{cost.bytes_read / 1e12:.1f}", *(f"{ratio:.2f}" for ratio in ratios)]


def _with_sparse_models(runs: list[SweepRun], folder: Path, data_dir: str | None) -> list[SweepRun]:
    execution = Execution(data_dir=data_dir)
    return [run.model_copy(update={
        "spec": run.spec.model_copy(update={"model": str(_sparse(folder, run.spec.model))}),
        "execution": execution}) for run in runs]


def _sparse(folder: Path, model: str) -> Path:
    """A checkpoint of the published shape whose weights are a hole in a file."""
    target = folder / model.replace("/", "--")
    if target.exists():
        return target
    experts = 0 if "Dense" in model else 32 if "1b4b" in model else 128
    target.mkdir(parents=True)
    kind = {"model_type": "emo", "architectures": ["EmoForCausalLM"], "num_experts": experts,
            "num_shared_experts": 1 if "Emo" in model else 0} if experts else {"model_type": "flex_olmo_prenorm"}
    (target / "config.json").write_text(json.dumps({**SHAPE, **kind}))
    header, at = {}, 0
    for name, shape in _shapes(experts):
        size = 4 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    with (target / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)
    return target


def _shapes(experts: int) -> list[tuple[str, list[int]]]:
    hidden, width, vocab = SHAPE["hidden_size"], SHAPE["intermediate_size"], SHAPE["vocab_size"]
    found = [("model.embed_tokens.weight", [vocab, hidden]), ("lm_head.weight", [vocab, hidden]),
             ("model.norm.weight", [hidden])]
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        found += [(f"{at}self_attn.{part}_proj.weight", [hidden, hidden]) for part in "qkvo"]
        found += [(f"{at}{norm}.weight", [hidden]) for norm in ("pre_attention_layernorm", "pre_feedforward_layernorm")]
        blocks = [f"experts.{expert}." for expert in range(experts)] or [""]
        inner = width if experts else 8 * width
        for block in blocks:
            found += [(f"{at}mlp.{block}gate_proj.weight", [inner, hidden]),
                      (f"{at}mlp.{block}up_proj.weight", [inner, hidden]),
                      (f"{at}mlp.{block}down_proj.weight", [hidden, inner])]
        found += [(f"{at}mlp.gate.weight", [experts, hidden])] if experts else []
    return found


def main() -> None:
    """Run one of the measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("plan", "submit", "overhead"))
    parser.add_argument("--data-dir")
    parser.add_argument("--units", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1)
    chosen = parser.parse_args()
    if chosen.what == "plan":
        plan(chosen.data_dir)
    elif chosen.what == "submit":
        submit(chosen.units or 3000)
    else:
        overhead(chosen.units or 50, chosen.workers)


if __name__ == "__main__":
    main()
