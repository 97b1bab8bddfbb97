"""Our tasks under lm-eval's own evaluator, with a language model that is a formula."""

from pathlib import Path
from typing import Any

import pytest

from emo_select.tasks import Generation, LogLikelihood, Task
from emo_select.tasks.base import id_field
from emo_select.tasks.kinds import Generate, MultipleChoice, choice_doc, generation_doc, score_exact
from emo_select.tasks.shots import first_rows
from emo_select.tasks.sources import MemoryRows
from emo_select.tasks.splits import AS_STORED

lm_eval = pytest.importorskip("lm_eval")
from lm_eval.api.model import LM  # noqa: E402
from lm_eval.evaluator import evaluate  # noqa: E402

from emo_select.tasks.harness import HarnessTask  # noqa: E402

ROWS = {
    split: [{"id": f"{split}{number}", "q": f"{number}+1", "options": ["0", str(number + 1)]} for number in range(4)]
    for split in ("train", "validation", "test")
}


class Formula(LM):
    """Prefers longer continuations after a context with a question; answers every generation with the same text."""

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
        found = []
        for context, continuation in (request.args for request in requests):
            weight = 1.0 if context == "Answer:" else 2.0
            found.append(LogLikelihood(-weight / len(continuation), False, len(continuation)))
        return found

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
        self.options = [request.args[1] for request in requests]
        return [Generation(" 3\nignored", 4) for _ in requests]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
        raise AssertionError("never asked")


def make(kind: str) -> Task:
    common: dict[str, Any] = {
        "name": f"own_{kind}", "alias": f"own_{kind}:test", "group": "own", "sources": (MemoryRows("own", ROWS),),
        "rule": AS_STORED, "native_id": id_field("id"), "shots": first_rows("train", 2), "default_shots": 1,
    }
    if kind == "choice":
        return MultipleChoice(read=lambda row: choice_doc(f"{row['q']}\nAnswer:", row["options"], 1),
                              primary_metric="acc_uncond", **common)
    return Generate(read=lambda row: generation_doc(f"{row['q']}\nAnswer:", row["options"][1], [row["options"][1]]),
                    primary_metric="exact_match", score=score_exact, stops=("\n",), max_tokens=5, **common)


@pytest.mark.parametrize("kind, expected", [("choice", 0.0), ("generation", 1 / 3)])
def test_evaluate_runs_our_requests_and_metrics(kind: str, expected: float) -> None:
    task = make(kind)
    model = Formula()
    harness = HarnessTask(task, num_shots=2, limit=3)
    result = evaluate(model, {task.name: harness}, bootstrap_iters=0)
    samples = result["samples"][task.name]
    assert [sample["doc"]["native_id"] for sample in samples] == ["test0", "test1", "test2"]
    asked = [[next(iter(arguments)) for arguments in sample["arguments"]] for sample in samples]
    assert asked == [[request.context for request in task.requests(doc, 2)] for doc in task.docs("test")[:3]]
    docs = [sample["doc"] for sample in samples]
    ours = [task.prediction(sample["doc"], sample["filtered_resps"])["metrics"] for sample in samples]
    averages = task.aggregate(ours, docs)
    assert averages["primary_score"] == pytest.approx(expected)
    assert result["results"][task.name][f"{task.primary_metric},none"] == averages["primary_score"]
    if kind == "generation":
        assert model.options[0] == {"until": ["\n"], "max_gen_toks": 5, "do_sample": False, "temperature": 0.0}
    else:
        assert ours[2]["acc_per_token"] in (0, 1) and samples[0]["filtered_resps"][0].num_tokens == 2


def test_more_shots_than_there_are(tmp_path: Path) -> None:
    from emo_select.errors import TaskError

    with pytest.raises(TaskError, match="2 few-shot examples, not 3"):
        make("choice").examples("test", num_shots=3)


def test_missing_published_shots_fall_back_with_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    from emo_select.tasks.shots import by_identity, by_row

    for shots in (by_identity(lambda row: row["id"], ("train1", "gone")), by_row((1, 2), 99)):
        task = make("choice")
        task.shots = shots
        assert [doc["native_id"] for doc in task.shot_docs()[""]] == ["train0", "train1"]
        assert "using its first 2 rows" in " ".join(capsys.readouterr().err.split())
