"""A task of ours as a task of lm-eval. Importing this module imports lm_eval."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.task import Task as LmEvalTask

from emo_select.tasks.base import Doc, Task
from emo_select.tasks.metrics import mean


def _not_averaged(values: Sequence[Any]) -> float:
    return math.nan


class HarnessTask(LmEvalTask):
    """Asks the first `limit` test documents of `task`; requests and metrics are those of `task` itself.

    `process_results` returns the metrics of one document; what else is published per document comes from
    `task.prediction(doc, responses)` and the averages from `task.aggregate`.
    """

    VERSION = 0

    def __init__(self, task: Task, num_shots: int | None = None, limit: int | None = None) -> None:
        self.task = task
        self.num_shots = task.default_shots if num_shots is None else num_shots
        self.docs = list(task.docs("test")[:limit])
        self.OUTPUT_TYPE = "generate_until" if task.kind == "generation" else "loglikelihood"
        super().__init__(config={"task": task.name, "num_fewshot": self.num_shots, "repeats": 1})

    def download(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to download: the task has its data."""

    @property
    def eval_docs(self) -> Sequence[Doc]:
        return self.docs

    def has_training_docs(self) -> bool:
        return False

    def has_validation_docs(self) -> bool:
        return False

    def has_test_docs(self) -> bool:
        return True

    def test_docs(self) -> Sequence[Doc]:
        return self.docs

    def fewshot_context(self, doc: Doc, num_fewshot: int, *args: Any, **kwargs: Any) -> str:
        return self.task.prefix(doc, num_fewshot)

    def doc_to_text(self, doc: Doc) -> str:
        return self.task.prompt(doc)

    def doc_to_target(self, doc: Doc) -> str:
        return self.task.answer(doc)

    def construct_requests(self, doc: Doc, ctx: str, **kwargs: Any) -> list[Instance]:
        options = self.task.generation_options if self.task.kind == "generation" else None
        requests = self.task.requests(doc, self.num_shots)
        return [
            Instance(
                request_type=self.OUTPUT_TYPE,
                doc=doc,
                arguments=(request.context, request.continuation if options is None else dict(options)),
                idx=index,
                metadata=kwargs["metadata"],
            )
            for index, request in enumerate(requests)
        ]

    def process_results(self, doc: Doc, results: Sequence[Any]) -> dict[str, Any]:
        metrics: dict[str, Any] = self.task.prediction(doc, results)["metrics"]
        return metrics

    def aggregation(self) -> Mapping[str, Callable[[Sequence[Any]], float]]:
        return _Aggregation()

    def higher_is_better(self) -> Mapping[str, bool]:
        return {self.task.primary_metric: True}


class _Aggregation(dict[str, Callable[[Sequence[Any]], float]]):
    """Every metric is averaged over documents, except indices of choices."""

    def __missing__(self, name: str) -> Callable[[Sequence[Any]], float]:
        return _not_averaged if name.startswith("predicted_index") or name == "correct_choice" else mean
