"""Small worlds for the tests of kills and faults: a model, a task, commands, and what has to be equal afterwards."""

import hashlib
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from emo_select.demo import demo_path

WARM = ("torch", "transformers", "datasets", "lm_eval.evaluator", "peft", "pyarrow.parquet", "emo_select.cli.app",
        "emo_select.experts.select", "emo_select.experts.prune", "emo_select.finetune.trainer",
        "emo_select.finetune.merge", "emo_select.evaluate.engine", "emo_select.models.emo", "emo_select.tables.report",
        "emo_select.pipeline.stages", "torch.distributed.checkpoint.state_dict",
        "transformers.models.auto.modeling_auto", "accelerate", "submitit", "emo_select.tasks.fetch")
ENGINE = find_spec("olmo_core") is not None
WARM += ("emo_select.pretrain.engine.work", "emo_select.pretrain.plots") if ENGINE else ()
HUB = {"models/someone/tiny/beef": ("config.json", "model.safetensors", "tokenizer.json", "code/modeling.py")}
VOLATILE = {"started", "seconds", "peak_memory", "peak_gpu_memory", "processing_time", "current_date", "cpu_seconds",
            "tokens_per_second", "since", "pid", "wall_seconds", "compute_config",
            "commit"}
WORDS = [f"w{i}" for i in range(20)]
RUN = ["run", "--model", "model", "--task", "task.yaml", "--batch-size", "2", "--micro-batch-size", "2", "--lr", "1e-3",
       "--checkpoints", "2", "--keep-k", "3", "--output-dir", "out"]


@dataclass(frozen=True)
class Case:
    """A command, and those that have to have run before it."""

    words: list[str]
    before: list[list[str]] = field(default_factory=list)


SELECT = ["select", "--model", "model", "--keep-k", "3", "--task", "task.yaml", "--out", "chosen"]
CASES = {
    "run layerwise": Case([*RUN, "--method", "layerwise"]),
    "run easy_ep": Case([*RUN, "--method", "easy_ep"]),
    "run twins": Case([*RUN, "--keep-k", "full", "--method", "layerwise,easy_ep"]),
    "select": Case(SELECT),
    "prune": Case(["prune", "chosen", "--out", "pruned"], [SELECT]),
    "activations": Case(["activations", "--model", "model", "--task", "task.yaml", "--out", "used"]),
    "finetune": Case(["finetune", "--model", "model", "--task", "task.yaml", "--out", "tuned", "--batch-size", "2",
                      "--micro-batch-size", "2", "--checkpoints", "2"]),
    "merge-back": Case(["merge-back", "pruned", "--into", "model", "--out", "merged"],
                       [SELECT, ["prune", "chosen", "--out", "pruned"]]),
    "compose": Case(["compose", "pruned", "others", "--model", "model", "--out", "both", "--finetuned"],
                    [SELECT, ["prune", "chosen", "--out", "pruned"], [*SELECT[:-1], "others-chosen", "--seed", "5",
                     "--method", "random"], ["prune", "others-chosen", "--out", "others"]]),
    "eval": Case(["eval", "--model", "model", "--task", "task.yaml", "--out", "scored"]),
    "report": Case(["report", "page.html", "--output-dir", "out"], [[*RUN, "--method", "random"]]),
    "table": Case(["table", "--to", "tables", "--output-dir", "out", "--format", "csv"],
                  [[*RUN, "--method", "random"]]),
    "fetch": Case(["fetch", "--model", "someone/tiny", "--to", "fetched"]),
}
if ENGINE:
    CASES["pretrain"] = Case(["pretrain", "recipe.yaml", "--data", "tokens.npy", "--tokenizer", "demo/emo", "--out",
                              "trained", "--device", "cpu", "--no-benchmarks"])
RECIPE = """
name: tiny
seed: 5
tokens: 320  # 5 steps
any_tokenizer: true
tokenizer: {vocab_size: 128, eos_token_id: 0, pad_token_id: 1}
model: {hidden_size: 8, layers: 1, heads: 2, init_std: 0.1, experts: {count: 4, shared: 1, top_k: 2, width: 8}}
objective: {pool: {smallest: 1, largest: 3}}
data: {sequence_length: 16, mask_documents: false}
batch: {sequences: 4, micro_batch: 4}
optimizer: {learning_rate: 0.01}
schedule: {warmup_steps: 1}
save: {every: 4, temporary_every: 1}
"""


class Warm:
    """The process of moment_server.py."""

    def __init__(self, *modules: str, **environment: str) -> None:
        server = [sys.executable, str(Path(__file__).with_name("moment_server.py")), *modules]
        self.process = subprocess.Popen(server, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                        env={**os.environ, "OMP_NUM_THREADS": "1", **environment})

    def __call__(self, words: list[str], root: Path, fault: str | None = None, at: int = 0, timeout: float = 120
                 ) -> tuple[int | None, list[tuple[str, str]], str]:
        """(exit code or None for a hang, moments, what was printed) of one command in the world `root`."""
        log = root.with_suffix(".log")
        log.with_name(log.name + ".seen").unlink(missing_ok=True)
        environment = {"XDG_CACHE_HOME": str(root / "cache"), "TMPDIR": str(root / "tmp"), "COLUMNS": "80"}
        request = {"words": words, "cwd": str(root), "root": str(root), "fault": fault, "at": at, "timeout": timeout,
                   "log": str(log), "env": environment}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        return answer["code"], [tuple(moment) for moment in answer["seen"]], log.read_text(errors="replace")

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(30)


def make_model(folder: Path) -> None:
    """Two layers of three routed experts and a shared one, in two shards, with a tokenizer of whole words."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from emo_select.models import EmoConfig, EmoForCausalLM

    torch.manual_seed(0)
    config = EmoConfig(vocab_size=24, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
                       num_experts=4, num_experts_per_tok=2, num_shared_experts=1, pad_token_id=0, eos_token_id=1,
                       max_position_embeddings=64, initializer_range=0.4)
    EmoForCausalLM(config).save_pretrained(folder, max_shard_size="4KB")
    words = ["<pad>", "<eos>", "<unk>", "Answer:", *WORDS]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", eos_token="<eos>"
                            ).save_pretrained(folder)


def make_task(folder: Path) -> None:
    rows = [{"q": f"w{i} w{i + 1} w{i + 2}", "options": [f"w{i + 3}", f"w{i + 4}"], "gold": i % 2} for i in range(12)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "task.yaml").write_text(
        "name: words\nkind: multiple_choice\ndata: rows.jsonl\nsplits: {train: 0.34, validation: 0.33, test: 0.33}\n"
        'text: "{{q}} Answer:"\nchoices: options\ngold: "{{gold}}"\n')


def make_tokens(folder: Path) -> None:
    """A recipe, and documents of random tokens in the demo's vocabulary."""
    import numpy as np

    told = json.loads((demo_path("emo") / "config.json").read_text())
    tokens = np.random.default_rng(0).integers(4, told["vocab_size"], 800)
    tokens[19::20] = told["eos_token_id"]
    tokens.astype("u1" if told["vocab_size"] <= 256 else "<u2").tofile(folder / "tokens.npy")
    (folder / "recipe.yaml").write_text(RECIPE)


def make_world(folder: Path) -> None:
    """Everything that the cases start from."""
    folder.mkdir(parents=True)
    (folder / "tmp").mkdir()
    make_model(folder / "model")
    make_task(folder)
    make_tokens(folder)


def make_hub(root: Path) -> None:
    """A model of the Hub."""
    for place, names in HUB.items():
        for name in names:
            (root / place / name).parent.mkdir(parents=True, exist_ok=True)
            (root / place / name).write_text(json.dumps(f"content of {name}"))
        (root / place).with_name("REFS").write_text(json.dumps({"main": Path(place).name}))


def copy(world: Path, target: Path) -> Path:
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(world, target)
    return target


def contents(root: Path) -> dict[str, object]:
    """Every file of a world by name, with what has to be equal in it; the cache apart, of which only whole files."""
    found: dict[str, object] = {}
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        if path.is_dir():
            if not name.startswith("cache"):
                found[name + "/"] = None
        elif not name.startswith("cache/") or path.name.endswith(".partial"):
            found[name] = content(path, root)
    return found


def content(path: Path, root: Path) -> object:
    data = path.read_bytes()
    if path.name == ".emo-select-files.json":  # sizes and hashes of pages that hold times
        return {name: len(entries) for name, entries in json.loads(data)["files"].items()} if data else None
    if path.suffix == ".json" and data:
        return settled(json.loads(data), str(root))
    if path.suffix == ".jsonl" and path.parent.name == "watch":
        return Watched({(told := json.loads(line))["step"]: settled(told, str(root)) for line in data.splitlines()})
    if path.suffix == ".pt" or path.name == ".metadata":  # equal pickles need not have equal bytes
        import torch

        return plain(torch.load(path, weights_only=False) if path.suffix == ".pt" else vars(pickle.loads(data)))
    if path.suffix == ".png" and path.parent.name == "watch":
        return "whole" if b"IEND" in data[-12:] else "cut"
    if path.suffix == ".html":
        return "whole" if data.rstrip().endswith(b"</html>") else "cut"
    if path.suffix in (".yaml", ".md"):
        return settled(data.decode(), str(root))
    return hashlib.sha256(data).hexdigest()


class Watched(dict):
    """What was told of each step. A kill after a checkpoint, before its step was told of, costs that one line."""

    def __eq__(self, other: object) -> bool:
        one, more = sorted((self, other), key=len)
        return len(one) >= len(more) - 1 and all(one.get(step, told) == told for step, told in more.items())

    def __ne__(self, other: object) -> bool:
        return not self == other


def plain(value: object) -> object:
    """A pickle's content, without the number that every checkpoint has of its own, and the state of torch's generator:
    a loader of data draws a seed at every start, which nothing uses."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items() if key not in ("storage_meta", "torch")}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value.tolist() if hasattr(value, "tolist") else repr(value)


def settled(value: object, root: str) -> object:
    """JSON without what differs from run to run: times, memory, places, sizes of files that hold times."""
    if isinstance(value, dict):
        kept = {key: sorted(item) if key == "outputs" else item for key, item in value.items() if key not in VOLATILE}
        return {key: settled(item, root) for key, item in kept.items()}
    if isinstance(value, list):
        return [settled(item, root) for item in value]
    return re.sub(re.escape(root), "ROOT", value) if isinstance(value, str) else value


def differences(one: dict[str, object], other: dict[str, object]) -> dict[str, object]:
    """Names that only one has, or whose content differs."""
    names = one.keys() ^ other.keys()
    changed = {name for name in one.keys() & other.keys() if one[name] != other[name]}
    return {name: ("only left" if name not in other else "only right" if name not in one else "differs")
            for name in sorted(names | changed)}
