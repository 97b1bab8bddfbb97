"""Tasks: what is calibrated on, trained on and evaluated. See docs/tasks.md."""

from emo_select.tasks.base import Example, Generation, LogLikelihood, Request, Task
from emo_select.tasks.registry import GROUPS, get_tasks, groups, list_tasks, remember, task_file

__all__ = ["GROUPS", "Example", "Generation", "LogLikelihood", "Request", "Task", "get_tasks", "groups", "list_tasks",
           "remember", "task_file"]
