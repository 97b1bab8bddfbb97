"""Annealing from checkpoints of the published trainer: the step, rate, moments and place in the data go on."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("olmo_core", reason="needs the extra pretrain: pip install emo-select[pretrain]")

from golden_runs import GoldenRun, Recorder, check

from emo_select.errors import CheckpointError
from emo_select.pretrain.engine.build import Start, build_trainer
from emo_select.pretrain.engine.schedule import LinearToZero
from emo_select.pretrain.engine.starting import describe, step_folder
from emo_select.pretrain.recipe import load_recipe

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def reference(shared_dir) -> Path:
    return shared_dir / "golden"


def run_of(reference: Path, name: str) -> GoldenRun:
    folder = reference / "pretraining/training"
    return GoldenRun(folder / name, folder / "data")


@pytest.mark.parametrize(("name", "source"), [
    ("emo_emoanneal", "emo"), ("std_emoanneal", "std"), ("std_stdanneal", "std"),
])
def test_annealing_is_that_of_the_published_trainer(name, source, reference, tmp_path):
    run, recorder = run_of(reference, name), Recorder()
    checkpoint = reference / "conversion" / source / "checkpoint"
    started = describe(checkpoint, run.recipe(), same_data=True)
    assert (started.step, started.optimiser) == (20, True)
    assert started.rate == pytest.approx(4e-4)
    trainer = build_trainer(run.recipe(), run.data(), tmp_path, start=Start(started.step, started.rate),
                            draws=run.draws(), callbacks={"recorder": recorder})
    trainer.load_checkpoint(str(checkpoint), load_trainer_state=True, load_optim_state=True)
    model = trainer.train_module.model
    start = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    trainer.fit()
    assert trainer.global_step == 26
    assert recorder.steps[26]["optim/LR (group 0)"] == 0
    check(run, recorder.steps, start, model.state_dict())


def test_the_rate_goes_to_zero_and_may_warm_up():
    line = LinearToZero(first_step=20, rate=0.4, steps=4)
    assert [line.get_lr(1.0, step, 99) for step in (21, 22, 23, 24)] == pytest.approx([0.3, 0.2, 0.1, 0.0])
    warm = LinearToZero(rate=0.4, steps=4, warmup=2)
    assert [warm.get_lr(1.0, step, 99) for step in (1, 2, 3, 4)] == pytest.approx([0.15, 0.2, 0.1, 0.0])


def test_a_checkpoint_of_another_model_is_refused(reference):
    with pytest.raises(CheckpointError, match=r"not of recipe laptop_1m"):
        describe(reference / "conversion/emo/checkpoint", load_recipe("laptop_1m"), same_data=True)


def test_a_checkpoint_that_asks_for_a_forbidden_class_is_refused(reference, tmp_path):
    import pickle

    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "run",))

    for name in ("train/rank0.pt", "model_and_optim/.metadata"):
        copy = tmp_path / name.replace("/", "_")
        shutil.copytree(reference / "conversion/emo/checkpoint", copy)
        if name.endswith(".pt"):
            torch.save({"global_step": Evil()}, copy / name)
        else:
            (copy / name).write_bytes(pickle.dumps(Evil()))
        with pytest.raises(CheckpointError) as caught:
            describe(copy, run_of(reference, "emo_emoanneal").recipe(), same_data=True)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_truncated_part_is_refused(reference, tmp_path):
    copy = tmp_path / "checkpoint"
    shutil.copytree(reference / "conversion/emo/checkpoint", copy)
    part = next((copy / "model_and_optim").glob("*.distcp"))
    part.write_bytes(part.read_bytes()[:1000])
    with pytest.raises(CheckpointError):
        describe(copy, run_of(reference, "emo_emoanneal").recipe(), same_data=True)


def test_a_folder_without_checkpoints_says_how_to_make_one(tmp_path):
    with pytest.raises(CheckpointError, match="emo-select convert"):
        step_folder(tmp_path)
