"""Values that no run can have are one sentence and exit code 2, before anything is opened or written."""

import datetime
import decimal

import pytest

from emo_select.errors import KeepKError, SpecError, TaskError
from emo_select.experts import StreamOptions
from emo_select.spec import Calibration, Execution, Training, checked, parse_bytes, parse_keep_k
from emo_select.sweeps.spec import SweepSpec, expand_sweep
from emo_select.tasks.base import _plain_id

WRONG = [
    (Training, {"epochs": float("inf")}), (Training, {"epochs": float("nan")}), (Training, {"clip": float("inf")}),
    (Training, {"learning_rate": "9e999"}), (Training, {"seed": 2**64}), (Calibration, {"seed": 2**64}),
    (Training, {"loss_limit": float("inf")}), (Execution, {"memory_budget": "abc"}),
    (Execution, {"memory_budget": "-1"}),
]


@pytest.mark.parametrize("kind, values", WRONG)
def test_settings_out_of_range(kind, values):
    with pytest.raises(SpecError) as caught:
        checked(kind, values)
    assert caught.value.exit_code == 2


@pytest.mark.timeout(10)
@pytest.mark.parametrize("text", ["1/0%", "1/3%", "1e9%", "1e999999999%", "-5%", "%", "nan%", "inf%", "1_0%", "x",
                                  "9" * 5000, "9" * 5000 + "%"])
def test_shares_of_experts_that_are_none(text):
    with pytest.raises(KeepKError):
        parse_keep_k(text, 32)


@pytest.mark.parametrize("text", ["abc", "", "GB", "1e3", "1..2GB", "9" * 400, "1KIB2"])
def test_sizes_that_are_none(text):
    with pytest.raises(SpecError, match="not a size"):
        parse_bytes(text)
    with pytest.raises(SpecError, match="not a size"):
        StreamOptions(memory_budget=text)


def test_a_sweep_that_keeps_more_experts_than_there_are():
    sweep = SweepSpec(name="test", models=["demo/emo"], tasks=["demo_harbor"], keep_k=[64])
    with pytest.raises(KeepKError, match="64 is more than the 32 experts"):
        expand_sweep(sweep)


def test_ids_are_what_result_files_can_hold():
    assert [_plain_id(found) for found in ("a", 3, None, 1.5)] == ["a", 3, None, 1.5]
    assert _plain_id(datetime.datetime(2026, 1, 2, 3)) == "2026-01-02 03:00:00"
    assert _plain_id(datetime.date(2026, 1, 2)) == "2026-01-02" and _plain_id(decimal.Decimal("1.50")) == "1.50"
    for wrong in (float("nan"), b"x", [1], {"a": 1}):
        with pytest.raises(TaskError, match="neither a text nor a number"):
            _plain_id(wrong)
