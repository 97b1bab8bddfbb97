"""Every failure a user can cause or meet, as a type with one sentence that names the fix.

`UsageError` is raised before any work starts (exit code 2); every other `EmoSelectError` stops work that
had begun and leaves a resumable state (exit code 1).
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable
from functools import wraps
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


class EmoSelectError(Exception):
    """Root of all errors of this package. `str(error)` is one sentence for the user."""

    exit_code = 1


class UsageError(EmoSelectError):
    """The request cannot be carried out as given; nothing was started."""

    exit_code = 2


class SpecError(UsageError):
    """A run, sweep or option value is not valid."""


class UnknownNameError(UsageError):
    """A model, task, method, metric or key that does not exist."""

    def __init__(self, kind: str, name: str, known: Iterable[str], hint: str = "") -> None:
        super().__init__(f"Unknown {kind} {name!r}; {hint or nearest(name, known)}")


class ModelError(UsageError):
    """A model cannot be used for what was asked."""


class TextError(UsageError):
    """A text file cannot be read as what it should hold; the message names the file and the line."""


class CheckpointError(UsageError):
    """Files of a checkpoint are missing, truncated or do not fit each other."""


class KeepKError(UsageError):
    """A keep-k that the model cannot satisfy."""


class TaskError(UsageError):
    """A task definition or a row of its data is not valid."""


class TokenDataError(UsageError):
    """Token files, a mix of them, or texts to make them from cannot be used."""


class DataMissingError(UsageError):
    """A dataset is not available locally; the message names the command that fetches it."""


class DiskSpaceError(UsageError):
    """The output would not fit on its disk."""


class StorageError(EmoSelectError):
    """The disk, or what lies on it, failed during work; what was finished is kept."""


class OwnershipError(UsageError):
    """What stands at an output's place was not made by this package, or is still needed."""


class LockedError(UsageError):
    """Another process is working on the same run directory."""


class StandstillError(EmoSelectError):
    """Work was stopped several times without getting any further."""


class NumericError(EmoSelectError):
    """NaN or infinity in weights, scores or losses."""


def keywords_checked(function: Callable[P, R]) -> Callable[P, R]:
    """Make a mistyped keyword of a public function a `SpecError` sentence with the near match."""
    known = list(inspect.signature(function).parameters)

    @wraps(function)
    def checked(*args: P.args, **values: P.kwargs) -> R:
        unknown = [name for name in values if name not in known]
        if unknown:
            raise SpecError(f"{function.__name__}() has no {unknown[0]!r}; {nearest(unknown[0], known)}")
        return function(*args, **values)

    return checked


def nearest(name: str, known: Iterable[str]) -> str:
    """The known spellings close to `name` as a question, else the known names, as the end of a sentence."""
    options = sorted(set(known))
    close = difflib.get_close_matches(name, options, n=3, cutoff=0.5)
    if close:
        return f"did you mean {' or '.join(map(repr, close))}?"
    return "known: " + ", ".join(options[:12]) + (", …" if len(options) > 12 else ".")
