"""Responses of a model to requests, on disk as they come, found again by the hash of the request.

One line of JSON per response. A line that a crash cut short is ignored; that response is computed again.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TextIO

from emo_select.tasks.base import Generation, LogLikelihood

Stored = list[Any]  # the arguments of Score or of Text


class Score(LogLikelihood):
    """A log-likelihood that knows how long its request was: `num_tokens_all` counts context and continuation."""

    def was_cut(self, max_length: int) -> bool:
        """Whether the request did not fit a model input of `max_length` tokens."""
        return self.num_tokens_all > max_length + 1


class Text(Generation):
    """A generated text that knows whether its prompt was cut."""

    cut: bool

    def __new__(cls, text: str, num_tokens: int = 0, cut: bool = False) -> Text:
        self = super().__new__(cls, text, num_tokens)
        assert isinstance(self, Text)
        self.cut = cut
        return self

    def was_cut(self, max_length: int) -> bool:
        """Whether the prompt and the longest answer did not fit together."""
        return self.cut


Response = Score | Text
FLUSH_EVERY_S = 1.0  # what a killed process may lose


class ResponseStore:
    """Responses by request key, kept in `folder` (None: in memory only). `model_key` says which model gave them.

    A store belongs to the one evaluation `owner`; others in the same folder have their own. Every process writes its
    own file; all of them are read, so the number of processes may change between runs.
    """

    def __init__(self, folder: Path | None, model_key: str, rank: int = 0, owner: str = "") -> None:
        self.folder, self.model_key, self.owner = folder, model_key, owner
        self._known: dict[str, Stored] = {}
        self._file: TextIO | None = None
        self._flushed = time.monotonic()
        for path in self._files():
            self._known.update(_read(path))
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = (folder / f".responses-{owner}-{rank}.jsonl").open("a", encoding="utf-8")
            self._file.write("\n")  # ends a line that a crash left unfinished

    def key(self, kind: str, args: tuple[Any, ...]) -> str:
        """Hash of one request to this model."""
        return hashlib.sha256(json.dumps([self.model_key, kind, args]).encode()).hexdigest()[:32]

    def __contains__(self, key: str) -> bool:
        return key in self._known

    def __getitem__(self, key: str) -> Stored:
        return self._known[key]

    def response(self, key: str) -> Response:
        """The response to one request."""
        stored = self._known[key]
        return Text(*stored) if isinstance(stored[0], str) else Score(*stored)

    def add(self, key: str, response: Response) -> None:
        """Keep one response, in memory and on disk."""
        stored: Stored = [*response, response.num_tokens, response.num_tokens_all] if isinstance(response, Score) \
            else [str(response), response.num_tokens, response.cut]
        self._known[key] = stored
        if self._file:
            self._file.write(json.dumps([key, stored]) + "\n")
            if time.monotonic() - self._flushed > FLUSH_EVERY_S:
                self._file.flush()
                self._flushed = time.monotonic()

    def learn(self, answers: Iterable[tuple[str, Stored]]) -> None:
        """Take over what other processes found; they keep it on disk."""
        self._known.update(answers)

    def close(self) -> None:
        """Close the file and keep it."""
        if self._file:
            self._file.close()
            self._file = None

    def discard(self) -> None:
        """Remove the files of all processes: the result files hold everything now."""
        self.close()
        for path in self._files():
            path.unlink(missing_ok=True)

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob(f".responses-{self.owner}-*.jsonl")) if self.folder else []


def _read(path: Path) -> dict[str, Stored]:
    found = {}
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            key, stored = json.loads(line)
        except (ValueError, TypeError):
            continue
        found[key] = stored
    return found
