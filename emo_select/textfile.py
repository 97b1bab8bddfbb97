"""Text that comes in: the one place where files written by others, or by an earlier run, are read as text.

UTF-8, with or without a byte-order mark. A line ends at \\n or \\r\\n and nowhere else (a text may hold U+2028, U+0085
or a form feed). Only regular files are opened: a pipe or a device would wait for ever. Whatever is wrong becomes one
sentence that names the file and, where there is one, the line; callers say of which type.
"""

from __future__ import annotations

import csv
import json
import re
import stat
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from emo_select.errors import EmoSelectError, TextError

Kind = type[EmoSelectError]
BOM = b"\xef\xbb\xbf"
MAX_YAML_NODES = 1_000_000  # aliases of aliases can stand for more than any memory holds
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]|[\ud800-\udfff]")


def require_file(path: Path, error: Kind = TextError) -> None:
    """Raise `error` unless `path` is a file whose bytes lie on a disk; looks at it without opening it."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise error(f"{path} does not exist.") from None
    except (OSError, ValueError) as fault:  # a loop of links, a folder that may not be entered, a null character
        raise error(f"{path} cannot be read ({_reason(fault)}).") from None
    if not stat.S_ISREG(mode):
        raise error(f"{path} is {_special(mode)}, not a file; give a file.")


def read_bytes(path: Path, error: Kind = TextError) -> bytes:
    """All bytes of a regular file."""
    require_file(path, error)
    try:
        return path.read_bytes()
    except OSError as fault:
        raise error(f"{path} cannot be read ({_reason(fault)}).") from None


def read_text(path: Path, error: Kind = TextError) -> str:
    """The whole text, without a byte-order mark; line ends are left as they are."""
    data = read_bytes(path, error)
    try:
        return data.removeprefix(BOM).decode()
    except UnicodeDecodeError as fault:
        line = fault.object.count(b"\n", 0, fault.start) + 1
        raise error(_not_utf8(f"{path}, line {line}", data)) from None


def read_lines(path: Path, error: Kind = TextError) -> Iterator[tuple[str, str]]:
    """(place, line) of every line that is not blank, as a stream; `place` is the file and the line's number."""
    require_file(path, error)
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                where = f"{path}, line {number}"
                text = _decoded(line.removeprefix(BOM) if number == 1 else line, where, error)
                if text.strip():
                    yield where, text.removesuffix("\n").removesuffix("\r")
    except OSError as fault:
        raise error(f"{path} cannot be read ({_reason(fault)}).") from None


def read_json(path: Path, error: Kind = TextError) -> Any:
    """The value that a JSON file holds."""
    return parse_json(read_text(path, error), str(path), error)


def read_json_object(path: Path, error: Kind = TextError) -> dict[str, Any]:
    """The JSON object that a file holds."""
    return _object(read_json(path, error), str(path), error)


def read_json_lines(path: Path, error: Kind = TextError) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, object) of every line of a JSON Lines file, as a stream."""
    for where, line in read_lines(path, error):
        yield where, _object(parse_json(line, where, error), where, error)


def parse_json(text: str | bytes, where: str, error: Kind = TextError) -> Any:
    """A JSON value. A key given twice and half a surrogate pair, which no file could hold, are errors, too."""
    try:
        found = json.loads(text, object_pairs_hook=_unique)
        if isinstance(text, str) and _SURROGATE.search(text):
            _require_whole_characters(found)
    except RecursionError:
        raise error(f"{where} is nested too deeply to be read.") from None
    except ValueError as fault:
        raise error(f"{where} is not valid JSON ({fault}).") from None
    return found


def read_table(path: Path, error: Kind = TextError) -> list[dict[str, str]]:
    """Rows of a CSV file (`.tsv`: separated by tabs) whose first line names the columns; cells may be of any size."""
    lines = read_text(path, error).split("\n")
    limit = csv.field_size_limit(sys.maxsize)
    try:
        reader = csv.reader((f"{line}\n" for line in lines), strict=True,
                            delimiter="\t" if path.suffix == ".tsv" else ",")
        (_, names), *rows = list(_placed_rows(reader, path, error)) or [(1, [])]
    finally:
        csv.field_size_limit(limit)
    _require_distinct(names, path, error)
    for number, cells in rows:
        if len(cells) != len(names):
            raise error(f"{path}, line {number} has {len(cells)} cells, but the first line names {len(names)}.")
    return [dict(zip(names, cells, strict=True)) for _, cells in rows]


def read_yaml(path: Path, error: Kind = TextError) -> Any:
    """The value that a YAML file holds: safe types only, no key twice, no date that does not exist."""
    import yaml

    text = read_text(path, error)
    try:
        found = yaml.load(text, Loader=_strict_loader())
        if _SURROGATE.search(text):
            _require_whole_characters(found)
    except RecursionError:
        raise error(f"{path} is nested too deeply to be read.") from None
    except (yaml.YAMLError, ValueError, ArithmeticError, TypeError, AttributeError) as fault:
        raise error(f"{path} is not valid YAML: {' '.join(str(fault).split())}.") from None
    return found


def read_yaml_mapping(path: Path, error: Kind = TextError, hint: str = "") -> dict[str, Any]:
    """The mapping of names that a YAML file holds; `hint` ends the sentence where it holds another thing."""
    found = read_yaml(path, error)
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise error(f"{path} must be a mapping of keys{hint and '; '}{hint}.")
    return found


def _decoded(line: bytes, where: str, error: Kind) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError:
        raise error(_not_utf8(where, line)) from None


def _not_utf8(where: str, data: bytes) -> str:
    found = "UTF-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "not UTF-8"
    return f"{where} is {found} text; convert the file to UTF-8."


def _object(value: Any, where: str, error: Kind) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise error(f"{where} is not a JSON object.")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {twice!r} is given twice")
    return found


def _require_whole_characters(value: Any) -> None:
    """Raise ValueError for a string with half a surrogate pair, wherever it stands."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{value[:40]!a} holds half of a surrogate pair") from None
    elif isinstance(value, dict):
        for item in (*value, *value.values()):
            _require_whole_characters(item)
    elif isinstance(value, list):
        for item in value:
            _require_whole_characters(item)


def _require_distinct(names: Sequence[str], path: Path, error: Kind) -> None:
    twice = next((name for name, count in Counter(names).items() if count > 1), None)
    if twice is not None:
        raise error(f"{path} names the column {twice!r} twice; give each column a name of its own.")


def _placed_rows(reader: Any, path: Path, error: Kind) -> Iterator[tuple[int, list[str]]]:
    """(number of its first line, cells) of every row that is not blank."""
    while True:
        begun = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as fault:
            raise error(f"{path}, line {begun} begins a row that is not valid ({fault}).") from None
        if cells is None:
            return
        if cells:
            yield begun, cells


@cache
def _strict_loader() -> Any:
    import yaml

    class Strict(yaml.SafeLoader):
        """YAML's safe loader; a key given twice and aliases that multiply without end are errors."""

        def get_single_node(self) -> Any:
            node = super().get_single_node()
            _count_nodes(node, {})
            return node

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            names = Counter(key.value for key, _ in node.value if isinstance(key.value, str) and key.value != "<<")
            twice = next((name for name, count in names.items() if count > 1), None)
            if twice is not None:
                raise yaml.YAMLError(f"the key {twice!r} is given twice")
            return super().construct_mapping(node, deep)

    return Strict


def _count_nodes(node: Any, known: dict[int, int]) -> int:
    """How many values a node stands for, each alias counted as what it repeats."""
    if id(node) not in known:
        known[id(node)] = MAX_YAML_NODES + 1  # met again within itself, it has no end
        value = node.value if node is not None else None
        below = [part for item in value for part in (item if isinstance(item, tuple) else (item,))] \
            if isinstance(value, list) else []
        known[id(node)] = 1 + sum(_count_nodes(item, known) for item in below)
    if known[id(node)] > MAX_YAML_NODES:
        raise ValueError("its aliases repeat each other too often")
    return known[id(node)]


def _reason(fault: Exception) -> str:
    return (fault.strerror if isinstance(fault, OSError) else None) or str(fault)


def _special(mode: int) -> str:
    names = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device",
             stat.S_IFBLK: "a device"}
    return names.get(stat.S_IFMT(mode), "no regular file")
