"""Tasks of the installed lm-eval: its prompts, shots, splits and metrics, our data look-up.

lm_eval is imported when a task is looked for, and a task is built, which reads its data, when it is first used.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from emo_select.errors import DataMissingError, EmoSelectError, TaskError
from emo_select.tasks.base import Doc, Example, Request, Row, SplitRule, Task
from emo_select.tasks.lmeval_index import Leaf, find_leaves
from emo_select.tasks.metrics import mean, standard_error
from emo_select.tasks.sources import HubRows

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

    from emo_select.tasks.lmeval_index import Index

LM_EVAL_NEW_TOKENS = 256  # what lm-eval generates at most where a task does not say
SHOTS_SEED = 1234  # the seed that lm-eval's own command gives its few-shot sampler
PREFERRED = ("acc_norm", "acc", "exact_match", "f1")  # which metric of several is the primary one
DEFAULT_METRICS = {"multiple_choice": ["acc", "acc_norm"], "loglikelihood": ["acc"], "generate_until": ["exact_match"]}
PACKAGED = ("json", "csv", "parquet", "text", "arrow")  # dataset paths that are file formats, not data sets


def load_lm_eval(name: str, data_dir: Path | None) -> list[Task]:
    """The tasks of a name of lm-eval: a task, a group, a tag, or `GROUP.TASK` for a task as its group sets it."""
    leaves, index = find_leaves(name)
    return [_make(leaf, index, data_dir) for leaf in leaves]


def _make(leaf: Leaf, index: Index, data_dir: Path | None) -> Task:
    config = leaf.config
    output = config.get("output_type", "generate_until")
    if reason := _unusable(config, output):
        raise TaskError(f"lm-eval:{leaf.name} {reason}; tasks of text, of the kinds {', '.join(DEFAULT_METRICS)}, can "
                        "be run.")
    kind = LmEvalGeneration if output == "generate_until" else LmEvalChoice
    name = f"lm-eval-{leaf.name}"
    return kind(
        name=name, alias=f"{name}:test", group="lm-eval", sources=_sources(config, data_dir), rule=_rule(config),
        read=dict, primary_metric=_primary(config, output), default_shots=int(config.get("num_fewshot") or 0),
        delimiter=None, leaf=leaf, index=index, data_dir=data_dir,
    )


def _unusable(config: Mapping[str, Any], output: str) -> str | None:
    """Why a task cannot be run here, as the end of a sentence; None if it can."""
    if config.get("unsafe_code"):
        return "executes what the model writes"
    if config.get("doc_to_image") or config.get("doc_to_audio"):
        return "needs images or sound"
    if "class" in config:
        return "is a program of its own"
    return None if output in DEFAULT_METRICS else f"is of the kind {output}"


def _sources(config: Mapping[str, Any], data_dir: Path | None) -> tuple[HubRows, ...]:
    path = config.get("dataset_path")
    if not isinstance(path, str) or path in PACKAGED or path.count("/") > 1 or "custom_dataset" in config:
        return ()
    return (HubRows((path,), str(config.get("dataset_name") or "default"), _splits(config), data_dir),)


def _splits(config: Mapping[str, Any]) -> tuple[str, ...]:
    names = [config.get(f"{split}_split") for split in ("training", "validation", "test", "fewshot")]
    return tuple(dict.fromkeys(name for name in names if name))


def _rule(config: Mapping[str, Any]) -> SplitRule:
    """Evaluation takes the test split, else the validation split, which is then not calibrated on."""

    def absent(sources: Sequence[Any]) -> Sequence[Row]:
        raise AssertionError("rows come from lm-eval's own task")  # LmEvalTask reads its splits itself

    tested = bool(config.get("test_split"))
    return SplitRule(train=absent if config.get("training_split") else None, test=absent,
                     validation=absent if tested and config.get("validation_split") else None)


def _primary(config: Mapping[str, Any], output: str) -> str:
    given = [entry.get("metric") for entry in config.get("metric_list") or ()]
    names = [name for name in given if isinstance(name, str)] or DEFAULT_METRICS.get(output, ["acc"])
    return next((name for name in PREFERRED if name in names), names[0])


@dataclass(eq=False, kw_only=True)
class LmEvalTask(Task):
    """A task of lm-eval. Documents are {"row": …, "number": …, "split": …}; nothing of a row is changed."""

    leaf: Leaf
    index: Index
    data_dir: Path | None = None
    _contexts: dict[tuple[str, int], list[Any]] = field(default_factory=dict, init=False, repr=False)

    @cached_property
    def inner(self) -> Any:
        """lm-eval's own object, with its data. Raises `DataMissingError`."""
        from lm_eval.tasks._factory import TaskFactory
        from lm_eval.tasks._index import Entry, Kind

        leaf = self.leaf
        if leaf.inline:
            entry = Entry(name=leaf.base, kind=Kind.TASK, yaml_path=None, cfg=dict(leaf.config))
        else:
            entry = self.index[leaf.base]
        with _our_data(self):
            return TaskFactory().build(entry, overrides=dict(leaf.overrides), registry=self.index)

    @property
    def dataset(self) -> str:
        return self.sources[0].label if self.sources else str(self.leaf.config.get("dataset_path") or "lm-eval")

    def require_data(self) -> None:
        try:
            _ = self.inner
        except EmoSelectError:
            raise
        except Exception as error:  # whatever code of a task raises
            raise TaskError(f"lm-eval cannot build {self.leaf.name}: {type(error).__name__}: {error}") from error

    def _read_split(self, split: str) -> list[Doc]:
        self.require_data()
        if getattr(self.rule, split) is None:
            return super()._read_split(split)  # raises, naming the way out
        read = {"train": self.inner.training_docs, "validation": self.inner.validation_docs}
        rows = self.inner.eval_docs if split == "test" else read[split]()
        return [{"row": row, "number": number, "split": split, "native_id": number, "group": ""}
                for number, row in enumerate(rows)]

    # ---- texts

    def check(self, doc: Doc) -> None:
        """lm-eval checks its own documents."""

    def oddities(self, doc: Doc) -> list[str]:
        return []

    def prefix(self, doc: Doc, num_shots: int | None = None) -> str:
        """Empty: lm-eval draws shots for each document, so that no block is shared."""
        return ""

    def prompt(self, doc: Doc) -> str:
        return self._gold(doc, 0).prompt

    def question_hash(self, doc: Doc) -> str:
        return hashlib.sha256(json.dumps(doc["row"], sort_keys=True, default=str).encode()).hexdigest()[:16]

    def answer(self, doc: Doc) -> str:
        return self._gold(doc, 0).answer

    def shot(self, doc: Doc) -> str:
        return self._gold(doc, 0).text

    def examples(self, split: str, num_shots: int | None = None, limit: int | None = None, *,
                 leave_out_shots: bool = False) -> list[Example]:
        """lm-eval never draws a document as its own example, so none has to be left out."""
        return [self._gold(doc, num_shots) for doc in self.docs(split)[:limit]]

    def _gold(self, doc: Doc, num_shots: int | None) -> Example:
        """The document's prompt and its gold answer."""
        instances = self._instances(doc, num_shots)
        target = self.inner.doc_to_target(doc["row"])
        if self.inner.OUTPUT_TYPE == "multiple_choice":
            return Example(*map(str, instances[self._gold_index(doc["row"], target)].args))
        if self.inner.OUTPUT_TYPE == "loglikelihood":
            return Example(*map(str, instances[0].args))
        first = target[0] if isinstance(target, list) else target
        text = self.inner.doc_to_choice(doc["row"])[first] if self.inner.config.doc_to_choice else first
        return Example(str(instances[0].args[0]), f"{self.inner.config.target_delimiter}{text}")

    def _gold_index(self, row: Row, target: Any) -> int:
        gold = self.inner.doc_to_text(row) if getattr(self.inner, "multiple_input", 0) else target
        gold = gold[0] if isinstance(gold, list) else gold
        return int(gold) if not isinstance(gold, str) else list(self.inner.doc_to_choice(row)).index(gold)

    def _instances(self, doc: Doc, num_shots: int | None) -> list[Instance]:
        count = self.default_shots if num_shots is None else num_shots
        context = self._context(doc, count)
        found = self.inner.construct_requests(doc=doc["row"], ctx=context, metadata=(self.name, doc["number"], 1))
        return found if isinstance(found, list) else [found]

    def _context(self, doc: Doc, count: int) -> Any:
        """The prompt with shots. They are drawn in document order, so all earlier documents are drawn for too."""
        known = self._contexts.setdefault((doc["split"], count), [])
        if doc["number"] >= len(known):
            wanted = max(2 * len(known), doc["number"] + 1)
            self.inner.set_fewshot_seed(SHOTS_SEED)
            known[:] = [self._one_context(other["row"], count) for other in self.docs(doc["split"])[:wanted]]
        return known[doc["number"]]

    def _one_context(self, row: Row, count: int) -> Any:
        prefix = self.inner.doc_to_prefix(row)
        try:
            return self.inner.fewshot_context(row, num_fewshot=count, gen_prefix=prefix)
        except (ValueError, IndexError) as error:
            raise TaskError(f"lm-eval cannot draw {count} examples for {self.leaf.name}: {error}.") from error

    # ---- evaluation

    def requests(self, doc: Doc, num_shots: int | None = None) -> list[Request]:
        generating = self.kind == "generation"
        pairs = [instance.args for instance in self._instances(doc, num_shots)]
        return [Request(context, None if generating else continuation) for context, continuation in pairs]

    def prediction(self, doc: Doc, responses: Sequence[Any]) -> dict[str, Any]:
        plain = [str(one) if isinstance(one, str) else (float(one[0]), bool(one[1])) for one in responses]
        metrics: dict[str, Any] = {}
        for number, (name, filtered) in enumerate(self._filtered(doc, plain).items()):
            for metric, value in self.inner.process_results(doc["row"], filtered).items():
                metrics[metric if number == 0 else f"{metric},{name}"] = _plain(value)
        label = self.inner.doc_to_target(doc["row"])
        return {"metrics": metrics, "model_output": [_output(one) for one in responses], "label": _plain(label)}

    def _filtered(self, doc: Doc, responses: Sequence[Any]) -> dict[str, list[Any]]:
        """The responses after each of the task's filters."""
        from lm_eval.api.instance import Instance

        instances: list[Any] = [
            Instance(request_type="loglikelihood", doc=doc["row"], arguments=(), idx=index, resps=[response])
            for index, response in enumerate(responses)
        ]
        for one in self.inner._filters:
            one.apply(instances)
        names = list(instances[0].filtered_resps)
        return {name: [instance.filtered_resps[name] for instance in instances] for name in names}

    def aggregate(self, metrics: Sequence[Mapping[str, Any]], docs: Sequence[Doc]) -> dict[str, Any]:
        ways: Mapping[str, Callable[[list[Any]], Any]] = self.inner.aggregation()
        averages: dict[str, Any] = {}
        for name in metrics[0]:
            way = ways.get(name.partition(",")[0])
            column = [doc[name] for doc in metrics]
            averages[name] = mean(column) if way is None else _plain(way(column))
        return {**averages, "primary_score": averages.get(self.primary_metric, next(iter(averages.values())))}

    def standard_errors(self, metrics: Sequence[Mapping[str, Any]], docs: Sequence[Doc]) -> dict[str, float]:
        numeric = [name for name, value in metrics[0].items() if isinstance(value, int | float)]
        return {name: standard_error([doc[name] for doc in metrics]) for name in numeric}


@dataclass(eq=False, kw_only=True)
class LmEvalChoice(LmEvalTask):
    """Kinds multiple_choice and loglikelihood."""

    kind: ClassVar[str] = "multiple_choice"


@dataclass(eq=False, kw_only=True)
class LmEvalGeneration(LmEvalTask):
    """Kind generate_until."""

    kind: ClassVar[str] = "generation"

    @property
    def max_new_tokens(self) -> int:
        options = self.leaf.config.get("generation_kwargs") or {}
        return int(options.get("max_gen_toks") or options.get("max_new_tokens") or LM_EVAL_NEW_TOKENS)

    @property
    def generation_options(self) -> dict[str, Any]:
        return dict(self.inner.config.generation_kwargs)


def _plain(value: Any) -> Any:
    """NumPy scalars and arrays as Python values."""
    return value.tolist() if hasattr(value, "tolist") else value


def _output(response: Any) -> dict[str, Any]:
    tokens = getattr(response, "num_tokens", None)
    if isinstance(response, str):
        return {"continuation": str(response), "num_tokens": tokens}
    return {"sum_logits": float(response[0]), "is_greedy": bool(response[1]), "num_tokens": tokens}


# ---- its data


@contextmanager
def _our_data(task: LmEvalTask) -> Iterator[None]:
    """While lm-eval builds a task, its data comes from the data folder, the cache or the Hub, in that order."""
    import datasets
    from lm_eval.api.task import ConfigurableTask

    stock = ConfigurableTask.download

    def download(inner: Any, dataset_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if task.sources and not dataset_kwargs:
            with suppress(DataMissingError):
                inner.dataset = _dataset(task)
                return
        try:
            stock(inner, dataset_kwargs, **kwargs)
        except Exception as error:  # `datasets` raises many kinds; scripts are refused by it too
            raise DataMissingError(
                f"The data of lm-eval:{task.leaf.name} ({task.dataset}) is not on this machine and cannot be loaded "
                f"({type(error).__name__}); on a machine with network access run "
                f"`emo-select fetch --task lm-eval:{task.leaf.name} --to DIR`, then give --data-dir DIR."
            ) from error

    ConfigurableTask.download = download
    datasets.disable_progress_bars()  # tasks that rework their rows would show one for every split
    try:
        yield
    finally:
        ConfigurableTask.download = stock


def _dataset(task: LmEvalTask) -> Any:
    """The splits as `datasets` objects, straight from the files."""
    import datasets
    import pyarrow.parquet

    source = task.sources[0]
    assert isinstance(source, HubRows)
    source.require(task.name)
    splits = {}
    for split in source.splits:
        files = source.locate(split)
        if all(file.suffix == ".parquet" for file in files):
            tables = [pyarrow.parquet.read_table(file) for file in files]
            splits[split] = datasets.Dataset(pyarrow.concat_tables(tables))
        else:
            splits[split] = datasets.Dataset.from_list([dict(row) for row in source.rows(split)])
    return datasets.DatasetDict(splits)
