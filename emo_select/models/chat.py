"""Chats as the tokenizer's template writes them: the one place that runs a template of somebody else's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from emo_select.errors import TaskError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def require_conversation(messages: Any, where: str) -> list[dict[str, Any]]:
    """`messages` if they are a chat: objects with the texts `role` and `content`; else `TaskError` naming `where`."""
    if not isinstance(messages, list) or not messages or not all(map(_is_message, messages)):
        raise TaskError(f"{where}: 'messages' must be a list of objects with the texts 'role' and 'content'.")
    return messages


def render_chat(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, Any]], where: str, **options: bool
                ) -> str:
    """The chat as text; `TaskError` naming `where` if the template refuses it or fails."""
    from jinja2 import TemplateError

    try:
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False, **options))
    except (TemplateError, TypeError, ValueError, KeyError, AttributeError, ArithmeticError, RecursionError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise TaskError(f"{where}: the tokenizer's chat template does not take this chat ({reason}).") from None


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))
