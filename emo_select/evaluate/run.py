"""Evaluate a checkpoint on tasks and write the result files."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from emo_select import progress
from emo_select.checkpoint import open_checkpoint
from emo_select.errors import ModelError, SpecError, UsageError
from emo_select.evaluate import parallel
from emo_select.evaluate.options import EvalOptions
from emo_select.evaluate.places import configs
from emo_select.evaluate.responses import ResponseStore
from emo_select.evaluate.results import Heading, Outcome, finished_metrics, result_files, write_results
from emo_select.evaluate.room import require_room
from emo_select.faults import translated
from emo_select.models.adapters import adapter_fingerprint, base_and_adapter, merge_adapter
from emo_select.models.startup import importing
from emo_select.ownership import require_own_files
from emo_select.spec import digest
from emo_select.tasks.base import Task

if TYPE_CHECKING:
    from collections.abc import Iterator

    from emo_select.evaluate.engine import SharedPrefixLM

Metrics = dict[str, Any]
NAMED_ROWS = 20  # documents listed by number per kind of problem


@translated()
def evaluate_checkpoint(
    model_dir: str | Path, tasks: Sequence[Task], out_dir: Path | Mapping[str, Path],
    options: EvalOptions | None = None,
) -> dict[str, Metrics]:
    """Evaluate a model (folder, Hub id, demo/NAME) on the test split of `tasks`; returns metrics by task name.

    Files appear in `out_dir` (or `out_dir[task.name]`) task by task. What is there already for the same model and
    questions is kept, and a stopped evaluation goes on from the responses it had. Raises `DataMissingError` and
    `OwnershipError` before the model is loaded.
    """
    options = options or EvalOptions()
    for task in tasks:
        task.require_data()
    with open_checkpoint(base_and_adapter(str(model_dir))[0]) as checkpoint:
        require_room(checkpoint.config, tasks, options.max_length)
    with parallel.process_group(), Evaluator(str(model_dir), out_dir, options) as evaluator:
        evaluator.require_own_places(tasks)
        return {task.name: evaluator.evaluate(task, index) for index, task in enumerate(tasks)}


class Evaluator:
    """One model and one results folder; the model is loaded when the first task needs it.

    `keep_set` names a selection that the model is masked to (see `masking`); it is part of the model's identity.
    """

    def __init__(self, model: str, out_dir: Path | Mapping[str, Path], options: EvalOptions, *,
                 engine: SharedPrefixLM | None = None, keep_set: str | None = None) -> None:
        self.model, self.out_dir, self.options = model, out_dir, options
        self.keep_set, self._engine = keep_set, engine

    def __enter__(self) -> Evaluator:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        """Nothing to let go of: an engine that was handed in serves others, too."""

    def folder(self, task: Task) -> Path:
        """Where the results of a task lie."""
        return self.out_dir if isinstance(self.out_dir, Path) else self.out_dir[task.name]

    @cached_property
    def model_hash(self) -> str:
        """Digest of the weights and of every setting that changes a response."""
        options, (base, adapter) = self.options, base_and_adapter(self.model)
        with open_checkpoint(base) as checkpoint:
            identity = {"model": checkpoint.fingerprint, "dtype": options.precision, "max_length": options.max_length,
                        "add_bos_token": options.add_bos_token}
        identity |= {"adapter": adapter_fingerprint(adapter)} if adapter else {}
        return digest(identity if self.keep_set is None else {**identity, "keep_set": self.keep_set})

    @cached_property
    def engine(self) -> SharedPrefixLM:
        return self._engine or load_engine(self.model, self.options)

    def task_hash(self, task: Task) -> str:
        """Digest of the questions."""
        asked = self.options.samples.get(task.name) if self.options.samples else None
        return digest({"task": task.fingerprint(), "num_shots": self.options.num_shots, "limit": self.options.limit,
                       "samples": sorted(set(asked)) if asked else None})

    def require_own_places(self, tasks: Sequence[Task]) -> None:
        """Raise `OwnershipError` where files that are not ours are in the way of results that are still to come."""
        for task in tasks:
            if self._done(task) is None:
                require_own_files(*result_files(self.folder(task), task))

    def _done(self, task: Task) -> Metrics | None:
        """Metrics that are there already."""
        if self.options.force:
            return None
        return finished_metrics(self.folder(task), task, self.task_hash(task), self.model_hash)

    def evaluate(self, task: Task, task_idx: int = 0) -> Metrics:
        """Metrics of one task, its files written."""
        task_hash = self.task_hash(task)
        folder, started = self.folder(task), time.monotonic()
        done = self._done(task)
        engine = self.engine if done is None else None  # before the store: one that cannot be loaded leaves nothing
        with self._store(folder, task_hash) as store:
            if engine is None or done is not None:
                progress.say(f"{task.name}: done before with the same model and questions.")
                return done or {}
            engine.store = store
            outcome, issues = self._ask(task)
            heading = self._heading(task, task_hash, time.monotonic() - started, issues, task_idx)
            if parallel.rank() == 0:
                return write_results(folder, task, outcome, heading)
        return task.aggregate([prediction["metrics"] for prediction in outcome.predictions], outcome.docs)

    @contextmanager
    def _store(self, folder: Path, task_hash: str) -> Iterator[ResponseStore]:
        """The answers kept for one evaluation; once its files are written, nothing needs them."""
        store = ResponseStore(folder, self.model_hash, parallel.rank(), digest([self.model_hash, task_hash]))
        try:
            yield store
            if parallel.rank() == 0:
                store.discard()
        finally:
            store.close()

    def _ask(self, task: Task) -> tuple[Outcome, dict[str, Any]]:
        """Put the task's requests to the model through lm-eval; the outcome, and which rows had a problem."""
        with importing():
            from lm_eval.evaluator import evaluate

            from emo_select.evaluate import engine  # noqa: F401
            from emo_select.tasks.harness import HarnessTask

        options = self.options
        chosen = sorted(set(options.samples.get(task.name, ()))) if options.samples else []
        harness = HarnessTask(task, options.num_shots, options.limit)
        _require_documents(task, chosen, len(harness.eval_docs))
        with _without_lm_eval_bars():
            evaluate(self.engine, {task.name: harness}, samples={task.name: chosen} if chosen else None,
                     bootstrap_iters=0, log_samples=False)
        numbers = chosen or range(len(harness.eval_docs))
        docs = [harness.eval_docs[number] for number in numbers]
        responses: list[list[Any]] = [[] for _ in numbers]
        for instance in sorted(harness.instances, key=lambda instance: (instance.doc_id, instance.idx)):
            responses[instance.doc_id].append(instance.resps[0])
        predictions = [task.prediction(doc, answers) for doc, answers in zip(docs, responses, strict=True)]
        issues = row_issues(numbers, responses, self.engine.max_length, task.remarks(docs))
        _say_issues(task, issues, len(docs))
        return Outcome(numbers, docs, predictions), issues

    def _heading(self, task: Task, task_hash: str, seconds: float, issues: Mapping[str, Any], task_idx: int) -> Heading:
        engine = self.engine
        task_config, model_config = configs(self.model, task, self.options, self.keep_set)
        return Heading(
            task_hash=task_hash,
            model_hash=self.model_hash,
            task_config=task_config,
            model_config=model_config,
            compute_config={"device": str(engine.device), "processes": parallel.world_size(),
                            "token_budget": engine.token_budget, "tokens": engine.counters.total,
                            "shared_prefixes": engine.stock_reason or True},
            processing_time=seconds,
            row_issues=issues,
            task_idx=task_idx,
        )


def load_engine(model: str, options: EvalOptions) -> SharedPrefixLM:
    """The language model for lm-eval: weights on the device, tokenizer, shared prefixes.

    An adapter is merged into the weights of its model, in memory.
    """
    base, adapter = base_and_adapter(model)
    if options.backend == "vllm":
        from emo_select.evaluate.vllm import load_vllm_engine

        if adapter:
            raise UsageError(f"{adapter} is an adapter, which the vllm backend is not given; use --backend hf.")
        return cast("SharedPrefixLM", load_vllm_engine(model, options))
    from emo_select.evaluate.engine import SharedPrefixLM
    from emo_select.models import load_model, load_tokenizer

    tokenizer = load_tokenizer(base, trust_remote_code=options.trust_remote_code)
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise ModelError(f"The tokenizer of {model} has neither a bos_token nor an eos_token, one of which a score "
                         "begins with; set it in tokenizer_config.json.")
    weights: Any = load_model(base, dtype=options.precision, device=options.device_map or _device(options.device),
                              trust_remote_code=options.trust_remote_code)
    if adapter:
        weights = merge_adapter(weights, adapter)
    context = getattr(weights.config.get_text_config(), "max_position_embeddings", None) or options.max_length
    if context < options.max_length:
        progress.say_once(f"The model's context is {context} tokens; longer inputs are cut to that.")
    return SharedPrefixLM(weights, tokenizer, max_length=min(context, options.max_length),
                          token_budget=options.token_budget, add_bos_token=options.add_bos_token)


def row_issues(
    numbers: Sequence[int], responses: Sequence[Sequence[Any]], max_length: int, remarks: Mapping[str, Sequence[int]]
) -> dict[str, Any]:
    """Documents with requests that were cut to the model's context, whose answer has no token, or that the task finds
    odd (`remarks`: positions by kind).

    Per kind of problem: how many documents, and the numbers of the first ones.
    """
    kinds = {"longer_than_context": lambda answer: answer.was_cut(max_length),
             "answer_without_tokens": lambda answer: answer.num_tokens == 0 and not isinstance(answer, str)}
    found = {kind: [number for number, answers in zip(numbers, responses, strict=True) if any(map(test, answers))]
             for kind, test in kinds.items()}
    found |= {kind: [numbers[position] for position in positions] for kind, positions in remarks.items()}
    return {kind: {"documents": len(rows), "first": rows[:NAMED_ROWS]} for kind, rows in found.items() if rows}


SAID = {
    "longer_than_context": "are longer than the context and were cut on the left",
    "answer_without_tokens": "have an answer without a token of its own, which is not scored and never wins",
}


def _say_issues(task: Task, issues: Mapping[str, Any], documents: int) -> None:
    for kind, words in SAID.items():
        if kind in issues:
            found, first = issues[kind]["documents"], issues[kind]["first"][:3]
            some = ", ".join(map(str, first)) + (", …" if found > len(first) else "")
            progress.say(f"{task.name}: {found} of {documents} documents {words} (numbers {some}).")


def _require_documents(task: Task, chosen: Sequence[int], available: int) -> None:
    if chosen and not 0 <= chosen[0] <= chosen[-1] < available:
        raise SpecError(f"--samples asks {task.name} for document {chosen[-1] if chosen[0] >= 0 else chosen[0]}, but "
                        f"its documents are numbered 0 to {available - 1}.")


def _device(name: str) -> str:
    import torch

    if name != "auto":
        return name
    return f"cuda:{parallel.local_rank()}" if torch.cuda.is_available() else "cpu"


@contextmanager
def _without_lm_eval_bars() -> Iterator[None]:
    """Building requests takes lm-eval a moment; its progress bar would not heed --quiet."""
    from lm_eval.api import task as module

    shown = module.tqdm
    module.tqdm = lambda items, *args, **kwargs: items
    try:
        yield
    finally:
        module.tqdm = shown
