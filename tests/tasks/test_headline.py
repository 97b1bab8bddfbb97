"""One headline metric per task: tasks, tables and printed scores agree."""

from __future__ import annotations

from emo_select.tables import load_layout
from emo_select.tasks import list_tasks
from emo_select.tasks.headline import Score, scores_of


def test_tables_and_tasks_name_the_same_metric_for_every_published_task() -> None:
    layout = load_layout()
    listed = {task.name: task.headline_metric for task in list_tasks() if task.group != "demo"}
    assert len(listed) == 46
    assert {name: layout.metric_of(layout.group_of(name)) for name in listed} == listed
    assert listed["squad_merged"] == "f1" and listed["arc_easy_merged"] == "acc_raw"


def test_a_score_says_metric_error_and_count() -> None:
    content = {"metrics": {"f1": 0.5, "recall": 0.625, "primary_score": 0.5}, "num_instances": 1200,
               "standard_errors": {"f1": 0.01234}}
    shown = scores_of(content, "gen5", "f1")
    assert [str(score) for score in shown] == ["f1 0.5000 ± 0.0123 (n = 1,200)", "recall 0.6250 (n = 1,200)"]
    assert str(Score("f1", None, None, 3)) == "f1 no value (n = 3)"


def test_a_task_of_no_group_shows_its_primary_metric() -> None:
    content = {"metrics": {"acc_per_char": 0.25, "acc_raw": 0.5, "primary_score": 0.25}}
    assert scores_of(content, "user", "acc_per_char")[0] == Score("acc_per_char", 0.25, None, None)
