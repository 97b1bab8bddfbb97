"""Responses of a model to requests, on disk as they come, found again by the hash of the request.

One line of JSON per response. A line that a crash cut short is ignored; the response is computed again.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, TextIO

from emo_select.tasks.base import Generation, LogLikelihood

Response = LogLikelihood | Generation


class ResponseStore:
    """Responses by request, kept in `folder` (None: in memory only). `model_key` says which model gave them.

    Every process writes its own file; all of them are read, so the number of processes may change between runs.
    """

    def __init__(self, folder: Path | None, model_key: str, rank: int = 0) -> None:
        self.folder, self.model_key = folder, model_key
        self._known: dict[str, list[Any]] = {}
        self._file: TextIO | None = None
        for path in self._files():
            self._known.update(_read(path))
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = (folder / f".responses-{rank}.jsonl").open("a", encoding="utf-8")
            self._file.write("\n")  # ends a line that a crash left unfinished

    def key(self, kind: str, args: tuple[Any, ...]) -> str:
        """Hash of one request to this model."""
        return hashlib.sha256(json.dumps([self.model_key, kind, args]).encode()).hexdigest()[:32]

    def get(self, key: str) -> Response | None:
        """The response of an earlier or this run."""
        known = self._known.get(key)
        if known is None:
            return None
        return Generation(*known) if isinstance(known[0], str) else LogLikelihood(*known)

    def add(self, key: str, response: Response) -> None:
        """Keep one response."""
        if isinstance(response, LogLikelihood):
            value: list[Any] = [response[0], response[1], response.num_tokens, response.num_tokens_all]
        else:
            value = [str(response), response.num_tokens]
        self._known[key] = value
        if self._file:
            self._file.write(json.dumps([key, value]) + "\n")

    def flush(self) -> None:
        """Hand everything written so far to the operating system, where the death of this process cannot reach it."""
        if self._file:
            self._file.flush()

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
        return sorted(self.folder.glob(".responses-*.jsonl")) if self.folder else []


def _read(path: Path) -> dict[str, list[Any]]:
    found = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            key, value = json.loads(line)
        except (ValueError, TypeError):
            continue
        found[key] = value
    return found
