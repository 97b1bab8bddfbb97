"""A command that is killed at any change of the disk is finished by the same command, and nothing of the kill is left.

A selection of moments, every one of the shortest commands, is tested here; `make kills` tests all of them.
"""

import os

import pytest
from moment_cases import CASES, contents, copy, differences

EVERY = bool(os.environ.get("EMO_SELECT_EVERY_MOMENT"))
STRIDES = {"run layerwise": 41, "run easy_ep": 41, "run twins": 397, "finetune": 37, "prune": 3, "merge-back": 3,
           "compose": 5, "fetch": 17, "activations": 2, "pretrain": 47}  # others: every moment


def chosen(name, seen):
    """Numbers of the moments to test, from 1. Of many writes into one file the first stands for all."""
    if EVERY:
        return list(range(1, len(seen) + 1))
    stride = STRIDES.get(name, 1)
    different = [at for at in range(1, len(seen) + 1) if seen[at - 1] != seen[at - 2] or seen[at - 1][0] != "pwrite"]
    return different[::stride]


@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", CASES)
def test_killed_at_any_moment(name, warm, starts, tmp_path):
    words = CASES[name].words
    world = copy(starts(name), tmp_path / "world")
    code, seen, log = warm(words, world)
    assert code == 0 and seen, log
    expected, wrong, moments = contents(world), [], chosen(name, seen)
    for at in moments:
        copy(starts(name), world)
        killed, _, _ = warm(words, world, "kill", at)
        code, _, log = warm(words, world)
        different = differences(contents(world), expected)
        if code or different or killed not in (137, 0):
            wrong.append((at, seen[at - 1], killed, code, different, log[-300:] if code else ""))
    print(f"{name}: {len(seen)} moments, killed at {len(moments)}, {len(wrong)} not as undisturbed")
    assert not wrong, wrong[:5]


def test_a_second_kill_changes_nothing(warm, starts, tmp_path):
    """Killed while it takes up what a kill has left."""
    words, wrong = CASES["activations"].words, []
    world = copy(starts("activations"), tmp_path / "world")
    _, seen, _ = warm(words, world)
    expected = contents(world)
    for at in range(1, len(seen), 5):
        copy(starts("activations"), world)
        warm(words, world, "kill", at)
        warm(words, world, "kill", at // 2 + 1)
        code, _, log = warm(words, world)
        if code or differences(contents(world), expected):
            wrong.append((at, code, log[-300:]))
    assert not wrong, wrong


def test_a_run_without_work_tidies_up(warm, starts, tmp_path):
    world = copy(starts("run easy_ep"), tmp_path / "world")
    assert warm(CASES["run easy_ep"].words, world)[0] == 0
    expected = contents(world)
    [run] = world.glob("out/model/words_keepk*")
    for left in (run / ".selection.partial" / "resume-0", run / ".selected_model.partial", run / ".selected_model.old",
                 run / "finetuned_model" / ".checkpoint-1.old", run / "results" / ".checkpoint-9.old",
                 world / "out" / "model" / "activations" / ".words.partial"):
        left.mkdir(parents=True)
        (left / "file").touch()
    (run / ".selected_model.key").write_text("x")
    assert warm(CASES["run easy_ep"].words, world)[0] == 0
    assert differences(contents(world), expected) == {}
