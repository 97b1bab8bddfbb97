"""Finding a task of the installed lm-eval by name, without indexing all of its 14,000 (which takes it 6 to 10 s).

A task or group is found by the text of its file; a group's members are read from its own folder. Only tags need the
whole index.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emo_select.errors import TaskError, UnknownNameError
from emo_select.progress import say

if TYPE_CHECKING:
    from lm_eval.tasks._index import Entry

    Index = dict[str, Entry]


@dataclass(frozen=True)
class Leaf:
    """A task of lm-eval: its settings as far as files say, and what a group changes.

    `name` is `base`, or `GROUP.base` where the group changes something; an `inline` task has no file of its own.
    """

    name: str
    base: str
    config: Mapping[str, Any]
    overrides: Mapping[str, Any]
    inline: bool = False


def find_leaves(name: str) -> tuple[list[Leaf], Index]:
    """The tasks of a task's, group's or tag's name, or of `GROUP.TASK`; and the index to build them with."""
    group, _, member = name.partition(".")
    try:
        index = _index(name)
        return list(_leaves(name, index, {}, name)), index
    except UnknownNameError:
        if not member:
            raise
    index = _index(group)
    leaves = {leaf.base: leaf for leaf in _leaves(group, index, {}, group)}
    if member not in leaves:
        raise UnknownNameError(f"task of lm-eval's group {group}", member, leaves)
    return [leaves[member]], index


@lru_cache(maxsize=8)
def _index(name: str) -> Index:
    """An index of lm-eval's that holds `name` and its members."""
    from lm_eval.tasks._index import TaskIndex

    root = _root()
    file = _file_of(root, name)
    if file is not None:
        for folder in (file.parent, root / file.relative_to(root).parts[0]):
            index: Index = TaskIndex.build([folder])
            if name in index and not _absent_members(name, index):
                return index
    say("Reading all task files of lm-eval, which takes a while …")
    index = TaskIndex.build([root])
    if name not in index:
        raise UnknownNameError("task of lm-eval", name, index)
    return index


def _root() -> Path:
    import importlib.util

    found = importlib.util.find_spec("lm_eval")
    if found is None or found.origin is None:
        raise TaskError("lm-eval is not installed; `pip install lm-eval` brings its tasks.")
    return Path(found.origin).parent / "tasks"


_NAMED = re.compile(rb"^['\"]?(?:task|group)['\"]?\s*:\s*['\"]?([^\s'\"]+)['\"]?\s*$", re.MULTILINE)


def _file_of(root: Path, name: str) -> Path | None:
    """The file that names itself `name`, or None if some file mentions it (a tag). Raises `UnknownNameError`."""
    wanted, names, mentioned = name.encode(), set(), False
    for file in _files(root, name.split("_")[0]):
        content = file.read_bytes()
        found = _NAMED.findall(content)
        if wanted in found:
            return file
        names.update(found)
        mentioned = mentioned or wanted in content
    if not mentioned:
        raise UnknownNameError("task of lm-eval", name, [one.decode(errors="replace") for one in names])
    return None


def _files(root: Path, first: str) -> Iterator[Path]:
    """All task files; those in folders with a similar name come first."""
    for folder in sorted(root.iterdir(), key=lambda folder: (not folder.name.startswith(first), folder.name)):
        yield from sorted(folder.rglob("*.yaml"))


def _leaves(name: str, index: Index, overrides: Mapping[str, Any], top: str) -> Iterator[Leaf]:
    """All tasks under a name, depth first."""
    entry = index[name]
    kind = entry.kind.name
    if kind == "TAG":
        for member in sorted(entry.tags):
            yield from _leaves(member, index, overrides, top)
    elif kind == "GROUP":
        config = entry.cfg or {}
        inherited = {key: value for key, value in config.items() if key not in _group_keys()}
        for item in _members(config):
            yield from _member_leaves(item, index, {**inherited, **overrides}, top)
    else:
        shown = f"{top}.{name}" if overrides else name
        yield Leaf(shown, name, {**(entry.cfg or {}), **overrides}, overrides)


def _member_leaves(item: Any, index: Index, overrides: Mapping[str, Any], top: str) -> Iterator[Leaf]:
    if isinstance(item, str):
        yield from _leaves(item, index, overrides, top)
    elif "group" in item and item["group"] not in index:
        for inner in _members(item):
            yield from _member_leaves(inner, index, overrides, top)
    elif "group" not in item and "task" not in item:
        raise TaskError(f"The group {top} of lm-eval has a member without a name, which lm-eval cannot load either.")
    else:
        name = item.get("group") or item["task"]
        changed = {**overrides, **{key: value for key, value in item.items() if key not in ("group", "task")}}
        if name in index:
            yield from _leaves(name, index, changed, top)
        else:
            yield Leaf(f"{top}.{name}", name, {**changed, "task": name}, changed, inline=True)


def _members(config: Mapping[str, Any]) -> list[Any]:
    members = config.get("task") or []
    return members if isinstance(members, list) else [members]


def _group_keys() -> set[str]:
    from lm_eval.tasks._factory import GROUP_FIELD_NAMES

    return set(GROUP_FIELD_NAMES)


def _absent_members(name: str, index: Index) -> bool:
    try:
        return not list(_leaves(name, index, {}, name))
    except KeyError:
        return True
