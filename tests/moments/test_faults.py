"""A disk that fills up, and folders that may not be written: one sentence each, and the same command goes on later."""

import pytest
from moment_cases import CASES, contents, copy, differences

from emo_select import faults
from emo_select.errors import StorageError
from emo_select.faults import sentence, translated
from emo_select.storage import require_space

MOMENTS = 4  # of each command, evenly spread
LONG = ("run twins",)


def errors(log):
    return [line for line in log.splitlines() if line.startswith(("Error:", "Failed:"))]


@pytest.mark.parametrize("name", [name for name in CASES if name not in LONG])
def test_a_full_disk(name, warm, starts, tmp_path):
    words, wrong = CASES[name].words, []
    world = copy(starts(name), tmp_path / "world")
    _, seen, _ = warm(words, world)
    expected = contents(world)
    for at in range(1, len(seen) + 1, max(1, len(seen) // MOMENTS)):
        copy(starts(name), world)
        code, _, log = warm(words, world, "full", at)
        said = " ".join(log.split())
        told = "is full (" in said and (" needed, " in said or seen[at - 1][0] == "mkdir")
        if code not in (0, 1, 2) or "Traceback" in log or (code and not told):
            wrong.append((at, seen[at - 1], code, log[-600:]))
            continue
        again, _, log = warm(words, world) if code else (0, [], "")  # what was finished is not done again
        if again or differences(contents(world), expected):
            wrong.append((at, seen[at - 1], again, log[-300:], differences(contents(world), expected)))
    assert not wrong, wrong[:3]


@pytest.mark.parametrize("name", CASES)
def test_a_read_only_disk_is_found_before_any_work(name, warm, starts, tmp_path):
    world = copy(starts(name), tmp_path / "world")
    before = contents(world)
    code, seen, log = warm(CASES[name].words, world, "readonly")
    assert code == 2 and len(errors(log)) == 1, log
    assert "Traceback" not in log and str(world) in log.replace("\n", "")
    assert [moment for moment in seen if not moment[1].startswith(("cache", "tmp"))] == []
    assert contents(world) == before


def test_what_a_full_disk_says(tmp_path):
    (tmp_path / ".big.partial").mkdir()
    with pytest.raises(StorageError) as caught, translated("Writing the model", tmp_path / "big", 3_000_000_000):
        raise OSError(28, "No space left on device")
    said = str(caught.value)
    assert "3.00 GB needed" in said and "GB free" in said
    assert str(tmp_path / ".big.partial") in said and said.startswith("Writing the model: ")


def test_what_was_needed_is_known_from_the_check_of_the_disk_before_or_from_the_file(tmp_path):
    with pytest.raises(StorageError, match=r"5\.00 MB needed"), translated():
        require_space(tmp_path, 5_000_000, "It")
        with faults.at(tmp_path / "part", 7):
            raise OSError(28, "No space left on device")
    with pytest.raises(StorageError, match=r"0\.0 kB needed"), translated(), faults.at(tmp_path / "small", 7):
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize("fault, said", [
    (PermissionError(13, "Permission denied", "/a/b"), "/a/b cannot be used (Permission denied)."),
    (NotADirectoryError(20, "Not a directory", "/a/b"), "/a/b cannot be used (Not a directory)."),
    (OSError(36, "File name too long", "x" * 300), "x" * 300 + " cannot be used (File name too long)."),
    (OSError(5, "Input/output error"), "A file cannot be used (Input/output error)."),
])
def test_other_faults_name_path_and_reason(fault, said):
    assert sentence(fault) == said
