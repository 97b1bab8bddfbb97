"""What the benchmarks share: random checkpoints of any size, child processes with their peak memory, tables."""

from __future__ import annotations

import importlib.util
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from emo_select.checkpoint import ShardedWriter, TensorSpec, assign_shards
from emo_select.models.shapes import outline

POOL_VALUES = 1 << 25  # random values that all tensors are cut from: drawing every one would take longer than the disk


def make_random_checkpoint(directory: Path, *, layers: int = 16, experts: int = 128, hidden: int = 256,
                           width: int = 128, vocab: int = 512, heads: int = 4, top_k: int = 8, shared: int = 1,
                           dtype: str = "F32", seed: int = 0, max_shard_bytes: int = 5_000_000_000) -> Path:
    """A checkpoint of random weights in the published EMO layout, streamed to disk; memory stays at one tensor.

    Routers are scaled so that routing is peaked, as in a trained model. `dtype` is "F32" or "BF16". A folder that
    was made with the same arguments is left as it is.
    """
    config = _config(layers=layers, experts=experts, hidden=hidden, width=width, vocab=vocab, heads=heads, top_k=top_k,
                     shared=shared, dtype=dtype)
    return write_random(directory, config, _shapes(config), dtype, seed, max_shard_bytes)


def write_random(directory: Path, config: dict[str, Any], shapes: Iterable[tuple[str, tuple[int, ...]]], dtype: str,
                 seed: int = 0, max_shard_bytes: int = 5_000_000_000) -> Path:
    """Random weights of these names and shapes beside `config`, streamed to disk."""
    made = directory / "config.json"
    if made.exists() and json.loads(made.read_text()) == {**config, "benchmark_seed": seed}:
        return directory
    directory.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    pool = torch.randn(POOL_VALUES, generator=generator)
    specs = [TensorSpec(name, dtype, shape) for name, shape in shapes]
    with ShardedWriter(directory, assign_shards(specs, max_shard_bytes)) as out:
        for spec in specs:
            out.write(spec.name, _values(spec, pool, generator).to(_TORCH[dtype]))
    made.write_text(json.dumps({**config, "benchmark_seed": seed}))
    return directory


def make_random_weights(directory: Path, config: dict[str, Any], seed: int = 0) -> Path:
    """A checkpoint of random weights for any config.json, in the names that the Hub has, streamed to disk in BF16."""
    made = directory / "config.json"
    if made.exists() and json.loads(made.read_text()) == config:
        return directory
    directory.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    pool = torch.randn(POOL_VALUES, generator=generator)
    specs = [TensorSpec(name, "BF16", info.shape) for name, info in outline(config, directory).tensors.items()]
    with ShardedWriter(directory, assign_shards(specs, 5_000_000_000)) as out:
        for spec in specs:
            out.write(spec.name, _values(spec, pool, generator).to(torch.bfloat16))
    made.write_text(json.dumps(config))
    return directory


_TORCH = {"F32": torch.float32, "BF16": torch.bfloat16}


def _config(*, layers: int, experts: int, hidden: int, width: int, vocab: int, heads: int, top_k: int, shared: int,
            dtype: str) -> dict[str, Any]:
    return {"architectures": ["EmoForCausalLM"], "model_type": "emo", "hidden_size": hidden, "intermediate_size": width,
            "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": heads,
            "num_experts": experts, "num_experts_per_tok": top_k, "num_shared_experts": shared, "vocab_size": vocab,
            "max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "rope_theta": 500000.0, "norm_topk_prob": False,
            "tie_word_embeddings": False, "pad_token_id": 1, "eos_token_id": 0, "bos_token_id": None,
            "hidden_act": "silu", "attention_bias": False, "router_aux_loss_coef": 0.01, "output_router_logits": False,
            "dtype": {"F32": "float32", "BF16": "bfloat16"}[dtype]}


def _shapes(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, width, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    yield "model.embed_tokens.weight", (vocab, hidden)
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        for part in ("q", "k", "v", "o"):
            yield f"{at}self_attn.{part}_proj.weight", (hidden, hidden)
        for norm in ("pre_attention_layernorm", "pre_feedforward_layernorm"):
            yield f"{at}{norm}.weight", (hidden,)
        yield f"{at}mlp.gate.weight", (config["num_experts"], hidden)
        for e in range(config["num_experts"]):
            yield f"{at}mlp.experts.{e}.down_proj.weight", (hidden, width)
            yield f"{at}mlp.experts.{e}.gate_proj.weight", (width, hidden)
            yield f"{at}mlp.experts.{e}.up_proj.weight", (width, hidden)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (vocab, hidden)


def _values(spec: TensorSpec, pool: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    count = spec.bytes // (4 if spec.dtype == "F32" else 2)
    if len(spec.shape) == 1:
        return torch.ones(spec.shape)
    start = int(torch.randint(len(pool), (), generator=generator))
    repeats = -(-count // len(pool))
    flat = torch.cat([pool[start:], *[pool] * (repeats - 1), pool[:start]])[:count] if start + count > len(pool) else (
        pool[start:start + count])
    scale = 2.0 if spec.name.endswith("mlp.gate.weight") else 1.0 if "embed" in spec.name else 0.7
    return flat.reshape(spec.shape) * (scale / spec.shape[-1] ** 0.5 if scale != 1.0 else 1.0)


@contextmanager
def stopwatch() -> Iterator[list[float]]:
    """`with stopwatch() as seconds: …` leaves the wall-clock time in `seconds[0]`."""
    seconds = [0.0]
    start = time.perf_counter()
    yield seconds
    seconds[0] = time.perf_counter() - start


def run_child(code: str, *arguments: str, python: str | Path = sys.executable) -> dict[str, Any]:
    """Run Python code in a fresh process; returns what it printed as JSON last, plus `seconds` and `peak_bytes`.

    `python` may be the interpreter of another environment.
    `peak_bytes` is the child's VmHWM, its resident set at the highest, shared libraries included.
    """
    tail = ("\nimport json, re\n"
            "peak = int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]) * 1024\n"
            "print(json.dumps({'result': globals().get('result'), 'peak_bytes': peak}))")
    with stopwatch() as seconds:
        command = [str(python), "-c", code + tail, *arguments]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return {**json.loads(done.stdout.splitlines()[-1]), "seconds": seconds[0]}


def environment(name: str, requirements: Path | None = None) -> Path:
    """Python of a client's environment (see tests/clients), else of one by `requirements`; made where it is missing."""
    place = Path(__file__).parents[1] / "tests" / "clients" / "environments.py"
    spec = importlib.util.spec_from_file_location("environments", place)
    assert spec is not None and spec.loader is not None
    environments: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(environments)
    environments.REQUIREMENTS = requirements or environments.REQUIREMENTS
    made: Path = environments.python_of(name) or environments.make(name) / "bin" / "python"
    return made


def drop_page_cache(paths: Sequence[Path]) -> None:
    """Ask the kernel to forget the files' cached pages, so that the next read comes from the disk."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def own_peak_bytes() -> int:
    """Highest resident set of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def table(rows: Sequence[Sequence[object]], header: Sequence[str]) -> str:
    """A markdown table."""
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in (header, ["---"] * len(header), *rows)]
    return "\n".join(lines)
