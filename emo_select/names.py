"""Who has which name in a tree.

A model's folder and a task's part of a run's name leave out what would tell two models or tasks apart. The first one
that comes gets the published name and leaves a note in the tree; another one that maps to the same name gets it with
eight digits of its own behind it.

    <root>/<model>/.model.json      whose folder it is
    <root>/.tasks/<task>.json       whose name it is, for tasks of a user's own

A model is the same where its id or its absolute path is the same, whatever its weights (what was made from other ones
is stale), or where its content is and the path of the note is gone: it was moved. A task of a user's own is the same
where its file or its content is.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from emo_select.errors import LockedError, TextError
from emo_select.ownership import MODEL_NOTE, RUN_RECORD
from emo_select.progress import say_once
from emo_select.spec import Frozen, digest, model_directory
from emo_select.storage import create_json, write_json
from emo_select.textfile import read_json_object
from emo_select.tree import Tree

if TYPE_CHECKING:
    from emo_select.tasks import Task

TASKS = ".tasks"
Content = Callable[[], str]
"""Gives a fingerprint, for which files may have to be read."""


class Holder(Frozen):
    """What a note says of the model or task that has a name."""

    name: str
    """As the user gave it."""
    path: str | None = None
    """Where it lies, absolute; None for models of the Hub or the demo."""
    fingerprint: str = ""
    """Of its content, when it was last used here; empty where unknown."""

    def is_same(self, name: str, path: str | None, content: Content, *, by_content: bool = False) -> bool:
        """Whether this is the model or task that is now called `name` and lies at `path`."""
        if self.path is None or path is None:
            return self.name == name
        if self.path == path:
            return True
        moved = by_content or not Path(self.path).exists()
        return moved and self.fingerprint != "" and self.fingerprint == content()


class Names:
    """Gives names in one tree, reading its notes. What it gave stays reserved, so that one command's models differ."""

    def __init__(self, tree: Tree) -> None:
        self.root = tree.root
        self._reserved: dict[Path, Holder] = {}

    def model_folder(self, model: str, path: str | None, content: Content) -> str:
        """The folder below the root of a model that lies at `path`."""
        published = model_directory(model)
        for note in {*self._reserved, *self.root.glob(f"*/{MODEL_NOTE}")} if path else ():
            holder = self._holder(note)
            if holder is not None and holder.path == path:
                return note.parent.name  # whatever it is called today
        return self._given("model", published, model, path, content, lambda name: self.root / name / MODEL_NOTE)

    def folder(self, model: str) -> str:
        """The folder of a model below the root."""
        path = absolute(model)
        return self.model_folder(model, path, lambda: _fingerprint(path or model))

    def keys(self, model: str, path: str | None) -> dict[str, Any]:
        """The keys of a `RunSpec` that say which model it is of and where that lies in the tree."""
        folder = self.model_folder(model, path, lambda: _fingerprint(path or model))
        named = folder if folder != model_directory(model) else None
        return {"model": model, "model_path": path, "model_folder": named}

    def task(self, task: Task) -> str:
        """What a task is called in this tree, by which this process finds it from now on.

        Tasks that are not of a user's own have their name.
        """
        from emo_select.tasks import remember

        if task.file is None:
            return task.name
        name = self._given("task", task.name, task.name, task.file, task.fingerprint,
                           lambda chosen: self.root / TASKS / f"{chosen}.json")
        remember(name, task.file)
        return name

    def _given(self, kind: str, published: str, name: str, path: str | None, content: Content,
               note: Callable[[str], Path]) -> str:
        own = f"{published}-{digest(path or name)[:8]}"
        by_content = kind == "task"
        for candidate in (own, published):  # once it has a name of its own, it keeps that
            holder = self._holder(note(candidate))
            if holder is not None and holder.is_same(name, path, content, by_content=by_content):
                return self._reserve(note(candidate), name, path, candidate)
        other = self._holder(note(published))
        if other is None:
            return self._reserve(note(published), name, path, published)
        say_once(f"In {self.root}, {published} belongs to the {kind} {other.path or other.name}; "
                 f"{path or name} is called {own} there.")
        return self._reserve(note(own), name, path, own)

    def _reserve(self, note: Path, name: str, path: str | None, chosen: str) -> str:
        self._reserved.setdefault(note, Holder(name=name, path=path))
        return chosen

    def _holder(self, note: Path) -> Holder | None:
        return self._reserved.get(note) or holder_of(note)


def holder_of(note: Path) -> Holder | None:
    """Who has the name of a note; None where nobody has. Folders from before there were notes: by their runs."""
    if note.is_file():
        try:
            return Holder.model_validate(read_json_object(note))
        except (ValidationError, TextError):
            return None  # cut short; it is written anew
    runs = sorted(note.parent.glob(f"*/{RUN_RECORD}")) if note.name == MODEL_NOTE else []
    return next((found for found in map(_of_run, runs) if found), None)


def _of_run(record: Path) -> Holder | None:
    try:
        spec = read_json_object(record)["spec"]
        return Holder(name=spec["model"], path=spec.get("model_path"))
    except (KeyError, TypeError, AttributeError, ValidationError, TextError):
        return None


def _fingerprint(model: str) -> str:
    from emo_select.checkpoint import open_checkpoint

    return open_checkpoint(model, download=False).fingerprint


def absolute(model: str) -> str | None:
    """The path of a model that is a folder of the user's, whatever directory it was named from; else None."""
    path = Path(model).expanduser()
    return os.path.normpath(path.absolute()) if path.is_dir() and not model.startswith("demo/") else None


def claim(note: Path, name: str, path: str | None, fingerprint: str = "") -> None:
    """Write or renew the note of a model or task that a name was given to; without a fingerprint, only write one.

    Raises `LockedError` where another process took the name for something else since then.
    """
    mine = Holder(name=name, path=path, fingerprint=fingerprint)
    found = holder_of(note)
    if found == mine or (found is None and create_json(note, mine.model_dump())):
        return
    found = found or holder_of(note)  # another process was faster
    by_content = note.name != MODEL_NOTE
    if found and not found.is_same(name, path, lambda: fingerprint or _fingerprint(path or name),
                                   by_content=by_content):
        raise LockedError(f"{note.parent / note.stem} was taken by {found.path or found.name} a moment ago; "
                          "run the same command again.")
    if not (found and note.is_file() and not fingerprint):
        write_json(note, mine.model_dump())


@contextmanager
def claimed(notes: Mapping[str, Path]) -> Iterator[None]:
    """Claim the notes of models, by name, for the body; if it fails, those that it left alone in their folders go."""
    new = [note for note in notes.values() if not note.exists()]
    for model, note in notes.items():
        claim(note, model, absolute(model))
    try:
        yield
    except BaseException:
        for note in new:
            _withdraw(note)
        raise


def _withdraw(note: Path) -> None:
    """Remove a note, and the folders that hold nothing else."""
    if [path.name for path in note.parent.iterdir()] != [note.name]:
        return
    note.unlink()
    with suppress(OSError):  # not empty
        note.parent.rmdir()
        note.parent.parent.rmdir()
