"""One small world and one warm process for all tests of kills and faults."""

import pytest
from moment_cases import CASES, WARM, Warm, copy, make_world


@pytest.fixture(scope="package")
def warm():
    process = Warm(*WARM)
    yield process
    process.close()


@pytest.fixture(scope="package")
def starts(warm, tmp_path_factory):
    """`starts(name)`: the world before a case's command, made once."""
    base = tmp_path_factory.mktemp("worlds")
    make_world(base / "world")
    made = {}

    def start(name):
        if name not in made:
            world = made[name] = copy(base / "world", base / name.replace(" ", "-"))
            for words in CASES[name].before:
                code, _, log = warm(words, world)
                assert code == 0, log
        return made[name]

    return start
