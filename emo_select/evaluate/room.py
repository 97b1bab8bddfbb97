"""Whether prompts and answers fit a model's context, asked before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from emo_select.errors import SpecError
from emo_select.tasks.base import Task


def context_of(config: Mapping[str, Any], max_length: int) -> int:
    """Tokens of the longest model input: `max_length`, or the model's own context where that is shorter."""
    return min(int(config.get("max_position_embeddings") or max_length), max_length)


def require_room(config: Mapping[str, Any], tasks: Iterable[Task], max_length: int) -> None:
    """Raise `SpecError` for a task that generates as many tokens as the whole context, or more: no prompt would fit."""
    context = context_of(config, max_length)
    for task in tasks:
        if task.max_new_tokens is not None and task.max_new_tokens >= context:
            limit = "--max-length" if context == max_length else "the model's context"
            raise SpecError(f"{task.name} generates up to {task.max_new_tokens} tokens, which leaves no room for a "
                            f"prompt in {context} ({limit}); lower max_tokens in a task file of your own, or take a "
                            "longer context.")
