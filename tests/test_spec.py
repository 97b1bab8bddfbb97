"""Specs and directory names: a round trip for every published name, and one sentence for every mistake."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emo_select.errors import KeepKError, SpecError, UnknownNameError
from emo_select.spec import (
    METHODS,
    Calibration,
    Evaluation,
    RunSpec,
    Training,
    keep_ks_in,
    model_directory,
    parse_directory_name,
    parse_keep_k,
)

rates = st.sampled_from(["5e-5", "1e-4", "0.0001", "2.5e-5", "3e-05"])
shots = st.none() | st.integers(0, 25)
tasks = st.sampled_from(["arc_easy_merged", "mmlu_merged_biology", "gsm8k_generation_8shot_merged", "demo_keepk_like"])


@given(
    task=tasks, keep_k=st.integers(1, 512), method=st.sampled_from(METHODS), batch=st.integers(1, 4096), rate=rates,
    epochs=st.sampled_from([1, 2, 0.5, 10]), examples=st.none() | st.integers(1, 10**6), seed=st.integers(0, 99),
    num_shots=shots, eval_shots=shots,
)
def test_a_name_says_again_what_it_was_made_from(task, keep_k, method, batch, rate, epochs, examples, seed, num_shots,
                                                 eval_shots):
    spec = RunSpec(
        model="allenai/Emo_1b14b_1T", task=task, keep_k=keep_k, method=method,
        calibration=Calibration(num_examples=examples, seed=seed, num_shots=num_shots),
        training=Training(batch_size=batch, learning_rate=rate, epochs=epochs),
        evaluation=Evaluation(num_shots=eval_shots),
    )
    name = parse_directory_name(spec.directory_name)
    assert name is not None
    assert (name.task, name.keep_k, name.method, name.batch_size) == (task, keep_k, method, batch)
    assert (name.learning_rate, name.epochs, name.eval_shots) == (rate, epochs, eval_shots)
    calibrated = (examples, seed, num_shots) if method != "random" else (None, 0, None)
    assert (name.num_examples, name.seed, name.num_shots) == calibrated
    assert (name.variant is not None) == (method == "random" and seed != 0)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({}, "arc_easy_merged_keepk_16_bs-32_lr-5e-5_epoch-1_selectivemode-layerwise"),
        (
            {"calibration": {"num_examples": 5, "seed": 2, "num_shots": 0}, "evaluation": {"num_shots": 0}},
            "arc_easy_merged_keepk_16_bs-32_lr-5e-5_epoch-1_selectivemode-layerwise"
            "_nselective-5_pseed-2_pshots-0_eshots-0",
        ),
        (
            {"method": "random", "calibration": {"num_examples": 5, "num_shots": 0}},
            "arc_easy_merged_keepk_16_bs-32_lr-5e-5_epoch-1_selectivemode-random",
        ),
        (
            {"selects": False, "calibration": {"num_shots": 0}},
            "arc_easy_merged_keepk_16_bs-32_lr-5e-5_epoch-1_selectivemode-layerwise",
        ),
    ],
)
def test_published_names(change, name):
    spec = RunSpec.parse({"model": "demo/emo", "task": "arc_easy_merged", "keep_k": 16, **change})
    assert spec.directory_name == name


def test_settings_without_a_published_name_never_share_a_directory():
    def name(**change):
        return RunSpec.parse({"model": "m", "task": "t", "keep_k": 4, **change}).directory_name

    names = [
        name(), name(score="reap"), name(num_shared=0), name(training={"freeze": "routed"}),
        name(training={"weight_decay": 0.1}), name(training={"packing": True}), name(training={"lora": {}}),
        name(training={"lora": {"rank": 4}}), name(training={"lora": {"merge": True}}),
        name(calibration={"max_length": 9}), name(evaluation={"limit": 3}),
    ]
    assert len(set(names)) == len(names)
    assert name(training={"freeze": "none"}) == name()


def test_serialising_a_spec_loses_nothing():
    spec = RunSpec.parse({"model": "m", "task": "t", "keep_k": 4, "training": {"lora": {"rank": 4}}})
    assert RunSpec.model_validate_json(spec.model_dump_json()) == spec


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"training": {"learnin_rate": "1"}}, SpecError, "did you mean 'training.learning_rate'"),
        ({"keep_k": 0}, SpecError, "keep_k"),
        ({"method": "layerwsie"}, UnknownNameError, "did you mean 'layerwise'"),
        ({"training": {"learning_rate": "fast"}}, SpecError, "not a positive number"),
    ],
)
def test_mistakes_are_named(change, error, words):
    with pytest.raises(error, match=words):
        RunSpec.parse({"model": "m", "task": "t", "keep_k": 4, **change})


def test_model_directory_drops_what_published_names_drop():
    assert model_directory("allenai/Emo_1b14b_1T") == "allenaiEmo_1b14b_1T"
    assert model_directory("../../etc/x") == "etcx"
    with pytest.raises(SpecError, match="no letter"):
        model_directory("///")


def test_names_that_are_not_runs():
    for name in ("activations", "x_keepk_a_bs-1_lr-1_epoch-1_selectivemode-random", "t_keepk_4", ""):
        assert parse_directory_name(name) is None


def test_keep_k_as_number_share_or_full():
    assert [parse_keep_k(text, 32) for text in ("16", "12.5%", "50%", "full")] == [16, 4, 16, 32]
    for text in ("half", "x%", "0%", "200%"):
        with pytest.raises(KeepKError):
            parse_keep_k(text, 32)


def test_a_spec_takes_what_the_command_line_takes():
    for keep_k, number in (("16", 16), ("50%", 16), ("full", 32), (4, 4)):
        assert RunSpec(model="demo/emo", task="t", keep_k=keep_k).keep_k == number
    assert RunSpec(model="allenai/Emo_1b14b_1T", task="t", keep_k="12.5%").keep_k == 16
    with pytest.raises(KeepKError, match="how many experts some/model has"):
        RunSpec(model="some/model", task="t", keep_k="50%")
    with pytest.raises(KeepKError, match="neither a number"):
        RunSpec(model="demo/emo", task="t", keep_k="half")


@pytest.mark.parametrize(("given", "name"), [(0.001, "0.001"), (5e-5, "5e-5"), (5.0e-05, "5e-5"), (1e-10, "1e-10"),
                                             (1, "1"), ("1e-3", "1e-3")])
def test_a_learning_rate_may_be_a_number(given, name):
    spec = RunSpec(model="m", task="t", keep_k=4, training={"learning_rate": given})
    assert spec.training.learning_rate == name
    assert f"_lr-{name}_" in spec.directory_name


def test_a_decimal_comma_is_not_taken_for_two_numbers(capsys):
    assert keep_ks_in(["full,50%", "25%, 12.5%", "8,16"]) == ["full", "50%", "25%", "12.5%", "8", "16"]
    assert keep_ks_in("12, 5%") == ["12", "5%"]
    with pytest.raises(KeepKError, match=r"12\.5% for a share, or --keep-k 12 --keep-k 5%"):
        keep_ks_in(["12,5%"])
    for text in ("6,25%", "full,12,50%", "3,125%,8"):
        with pytest.raises(KeepKError, match="two ways"):
            keep_ks_in(text)
    for text in ("4,50%", "4,25%,full", "2,5%"):
        assert keep_ks_in(text) == text.split(",")
        assert f"is read as {text.replace(',', ', ')}; shares" in " ".join(capsys.readouterr().err.split())


def test_a_call_with_a_wrong_keyword_names_the_near_match():
    with pytest.raises(SpecError, match="did you mean 'num_examples'"):
        Calibration(num_exampels=5)
    with pytest.raises(SpecError, match=r"did you mean 'training\.epochs'"):
        RunSpec(model="m", task="t", keep_k=4, training={"epoch": 1})
    with pytest.raises(SpecError, match="did you mean 'keep_k'"):
        RunSpec(model="m", task="t", keepk=4)
