"""One small world and one warm process for all tests of kills and faults."""

import pytest
from hub_server import serve
from moment_cases import CASES, WARM, Warm, copy, make_hub, make_world


@pytest.fixture(scope="package")
def warm(tmp_path_factory):
    hub = tmp_path_factory.mktemp("hub")
    make_hub(hub)
    with serve(hub) as (endpoint, _):
        process = Warm(*WARM, HF_ENDPOINT=endpoint, HF_HUB_OFFLINE="0", HF_HUB_DISABLE_XET="1",
                       HF_HOME=str(tmp_path_factory.mktemp("home")))
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
