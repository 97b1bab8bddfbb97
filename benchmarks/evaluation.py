"""Shared-prefix evaluation beside lm-eval's own HFLM: same model, same requests, same process.

    python benchmarks/evaluation.py --data-dir FOLDER [--docs 24] [--threads 1] [--only hellaswag,winogrande]
                                    [--block FILE] [--out results.json]

The model is a random EMO whose arithmetic outweighs the overhead of a forward; its tokenizer is a byte-level BPE
trained on train texts of the tasks. Prints per task: tokens per document (stock, here, and the least possible: every
distinct prefix token and every continuation once), wall and processor time, their ratios, and how the results differ.
`--block` gives the published few-shot text of the one task named by `--only`, where the data at hand lacks its rows.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.common import make_random_checkpoint, table
from emo_select.evaluate.engine import SharedPrefixLM, scored_input
from emo_select.evaluate.prefixes import Planner
from emo_select.models import load_model
from emo_select.tasks import get_tasks
from emo_select.tasks.harness import HarnessTask

SIZES = {"layers": 6, "experts": 16, "hidden": 512, "width": 256, "heads": 8, "top_k": 4, "vocab": 8192}
TASKS = {"hellaswag": 6.0, "mmlu_biology": 7.0, "mmlu_pro_psychology": 7.0, "arc_challenge": 5.0, "winogrande": 2.0}
GENERATION, GENERATION_TARGET, NEW_TOKENS, ROWS = "gsm8k", 1.3, 96, 8
MAX_LENGTH, STOCK_BATCH, TRAINING_TEXTS = 2048, 8, 2000


def main() -> None:
    options = _options()
    logging.disable(logging.WARNING)
    torch.set_num_threads(options.threads)
    names = [name for name in (*TASKS, GENERATION) if name in (options.only or (*TASKS, GENERATION))]
    tasks = {name: get_tasks([name], data_dir=options.data_dir)[0] for name in (*TASKS, GENERATION)}
    block = options.block.read_text() if options.block else None
    requests = {name: _requests(tasks[name], options.docs, block) for name in names}
    tokenizer = _tokenizer([e.text for task in tasks.values() for e in task.examples("train", 0, TRAINING_TEXTS)])
    with tempfile.TemporaryDirectory() as folder:
        model = load_model(str(make_random_checkpoint(Path(folder) / "model", **SIZES)))
    rows = []
    for name in names:
        compare = _compare_generation if name == GENERATION else _compare_scoring
        rows.append({"task": name, "documents": options.docs, **compare(model, tokenizer, requests[name])})
        print(json.dumps(rows[-1]), flush=True)
    if options.out:
        options.out.write_text(json.dumps(rows, indent=1))
    print("\n" + as_table(rows))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--docs", type=int, default=24)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", type=lambda text: text.split(","))
    parser.add_argument("--block", type=Path)
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def _requests(task: Any, docs: int, block: str | None) -> list[Instance]:
    """Requests of documents spread evenly over the test split; `block` replaces the few-shot text."""
    harness = HarnessTask(task, None, None)
    harness.docs = harness.docs[:: max(1, len(harness.docs) // docs)][:docs]
    harness.build_all_requests(limit=None, rank=0, world_size=1)
    for request in harness.instances if block is not None else ():
        context, continuation = request.args
        own = task.prefix(request.doc)
        request.arguments = (block + context[len(own):] if context.startswith(own) else context, continuation)
    return list(harness.instances)


def _tokenizer(texts: Sequence[str]) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=SIZES["vocab"], special_tokens=["<|endoftext|>", "<|pad|>"],
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    inner.train_from_iterator(sorted(set(texts)), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|endoftext|>", pad_token="<|pad|>")


def _compare_scoring(model: Any, tokenizer: Any, requests: list[Instance]) -> dict[str, Any]:
    ours, stock = _engines(model, tokenizer, STOCK_BATCH)
    pairs = ours.encode_pairs([request.args for request in requests])
    inputs = [scored_input(context, rest, MAX_LENGTH)[0] for _, context, rest in pairs]
    found, here = _timed(lambda: ours.loglikelihood(requests))
    expected, there = _timed(lambda: stock.loglikelihood(requests, disable_tqdm=True))
    differences = [(abs(a[0] - b[0]), abs(a[0] - b[0]) / abs(b[0])) for a, b in zip(found, expected, strict=True)]
    return {
        "tokens_stock": _distinct_input_tokens(inputs),
        "tokens_here": ours.counters.total, "tokens_least": Planner(inputs, 1).distinct_tokens,
        "padding": ours.counters.padding, **_ratios(here, there),
        "max_difference": max(absolute for absolute, _ in differences),
        "outside_tolerance": sum(absolute > 5e-4 and relative > 2e-6 for absolute, relative in differences),
        "same_greedy": [score[1] for score in found] == [score[1] for score in expected],
        "same_best_choice": _best(requests, found) == _best(requests, expected),
    }


def _distinct_input_tokens(inputs: Sequence[Any]) -> int:
    """What stock feeds: every distinct input whole (answers of one token share theirs)."""
    return sum({row.tokens.tobytes(): len(row.tokens) for row in inputs}.values())


def _best(requests: Sequence[Instance], scores: Sequence[Any]) -> dict[int, int]:
    """Index of the most likely choice of every document, over its conditional requests."""
    best: dict[int, tuple[float, int]] = {}
    for request, score in zip(requests, scores, strict=True):
        if request.args[0] != "Answer:":
            best[request.doc_id] = max(best.get(request.doc_id, (float("-inf"), 0)), (score[0], request.idx))
    return {document: index for document, (_, index) in best.items()}


def _compare_generation(model: Any, tokenizer: Any, requests: list[Instance]) -> dict[str, Any]:
    """Generation with a stop string at which a random model ends its rows at mixed lengths."""
    ours, stock = _engines(model, tokenizer, ROWS)
    _set_stop(requests, [])
    free = ours.generate_until(requests)
    _set_stop(requests, [_spreading_stop(free)])
    ours, stock = _engines(model, tokenizer, ROWS)
    found, here = _timed(lambda: ours.generate_until(requests))
    expected, there = _timed(lambda: stock.generate_until(requests, disable_tqdm=True))
    lengths = sorted(text.num_tokens for text in found)
    return {**_ratios(here, there), "tokens_here": ours.counters.total, "identical": list(map(str, found)) == expected,
            "new_tokens": [lengths[0], lengths[len(lengths) // 2], lengths[-1]]}


def _set_stop(requests: list[Instance], stops: list[str]) -> None:
    for request in requests:
        request.arguments = (request.args[0], {**request.args[1], "until": stops, "max_gen_toks": NEW_TOKENS})


def _spreading_stop(texts: Sequence[str]) -> str:
    """The character whose first occurrences differ most between the texts."""
    def spread(character: str) -> float:
        places = torch.tensor([float(text.find(character) if character in text else len(text)) for text in texts])
        return float(places.std())

    return max(sorted(set("".join(texts)) - {"\ufffd"}), key=spread)


def _engines(model: Any, tokenizer: Any, batch: int) -> tuple[SharedPrefixLM, HFLM]:
    stock = HFLM(pretrained=model, tokenizer=tokenizer, max_length=MAX_LENGTH, add_bos_token=False, batch_size=batch)
    return SharedPrefixLM(model, tokenizer, max_length=MAX_LENGTH), stock


def _timed(call: Callable[[], Any]) -> tuple[Any, tuple[float, float]]:
    wall, processor = time.perf_counter(), time.process_time()
    result = call()
    return result, (time.perf_counter() - wall, time.process_time() - processor)


def _ratios(here: tuple[float, float], there: tuple[float, float]) -> dict[str, float]:
    return {"seconds_stock": there[0], "seconds_here": here[0], "ratio": there[0] / here[0],
            "cpu_seconds_stock": there[1], "cpu_seconds_here": here[1], "cpu_ratio": there[1] / here[1]}


def as_table(rows: Sequence[dict[str, Any]]) -> str:
    """The measurements as a markdown table."""
    lines = []
    for row in rows:
        tokens = [f"{row[key] / row['documents']:.0f}" if key in row else "" for key in
                  ("tokens_stock", "tokens_here", "tokens_least")]
        same = row.get("identical", row.get("same_best_choice"))
        times = [f"{row[key]:.1f}" for key in ("seconds_stock", "seconds_here", "ratio", "cpu_ratio")]
        lines.append([row["task"], row["documents"], *tokens, *times, TASKS.get(row["task"], GENERATION_TARGET),
                      f"{row.get('max_difference', 0):.1e}", "yes" if same else "no"])
    return table(lines, ["task", "docs", "tokens/doc stock", "here", "least", "s stock", "s here", "ratio", "CPU ratio",
                         "target", "max Δ", "same answers"])


if __name__ == "__main__":
    main()
