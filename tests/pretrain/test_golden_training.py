"""Whole trainings by the engine against those of the published trainer: one process, two, and the two resumed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

pytest.importorskip("olmo_core", reason="needs the extra pretrain: pip install emo-select[pretrain]")

from golden_runs import GoldenRun, Recorder, check

from emo_select.pretrain.engine.build import build_trainer
from emo_select.pretrain.objective import PoolSizes

ROOT = Path(__file__).resolve().parents[2]
KEPT = ROOT / "tests/golden/pretraining/training"
SHARED = ROOT.parent / "shared/golden/pretraining/training"


def golden_run(name: str) -> GoldenRun:
    """From the repository, else from the data beside it."""
    folder = KEPT if (KEPT / name).is_dir() else SHARED
    if not (folder / name).is_dir():
        pytest.skip(f"needs the reference data in {SHARED}, which is not part of the repository")
    return GoldenRun(folder / name, KEPT / "data")


@pytest.mark.parametrize("name", ["emo", "std", "dense"])
def test_twenty_steps_are_those_of_the_published_trainer(name, tmp_path):
    run, recorder = golden_run(name), Recorder()
    trainer = build_trainer(run.recipe(), run.data(), tmp_path, draws=run.draws(), callbacks={"recorder": recorder})
    model = trainer.train_module.model
    start = run.start
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, start[key]), f"{key} starts otherwise"  # the same draws in the same order
    trainer.fit()
    check(run, recorder.steps, start, model.state_dict())


def test_batches_are_the_published_ones(tmp_path):
    """Cutting, order and the filter of repeated sequences."""
    run = golden_run("emo")
    loader = build_trainer(run.recipe(), run.data(), tmp_path, draws=run.draws()).data_loader
    loader.reshuffle(epoch=1)
    order = torch.frombuffer(bytearray((run.data_folder / "global_indices.npy").read_bytes()), dtype=torch.int32)
    assert torch.equal(torch.from_numpy(loader.get_global_indices().astype("int32"))[:len(order)], order)
    for step, batch in zip(range(20), loader, strict=False):
        assert torch.equal(batch["index"], run.tensors["index"][step])
        assert torch.equal(batch["input_ids"], run.tensors["input_ids"][step])
        assert torch.equal(batch["instance_mask"], run.tensors["instance_mask"][step].bool())


class Kept:
    """Our draws from the published stream, with what they gave in each step."""

    def __init__(self, smallest: int, largest: int) -> None:
        self.draws, self.given = PoolSizes(smallest, largest, published=True), {}

    def draw(self, documents, layers: int, **place: int) -> torch.Tensor:
        sizes = self.draws.draw(documents, layers, **place)
        self.given.setdefault(place["step"], []).append(sizes.flatten())
        return sizes


def test_published_draws_are_the_stream_of_the_published_trainer(tmp_path):
    """From the same seed, the rehearsal before the first step included."""
    run = golden_run("emo")
    pool = run.recipe().objective.pool
    kept = Kept(pool.smallest, pool.largest)
    build_trainer(run.recipe(), run.data(), tmp_path, draws=kept, stop_at=2).fit()
    want = torch.split(run.tensors["pool_sizes"], run.tensors["pool_sizes_per_step"].tolist())
    for step in (1, 2):
        assert torch.equal(torch.cat(kept.given[step]), want[step - 1])


TWO = ("emo_2", "std_2", "emo_2_local")


def _rank(rank: int, folder: str, names: tuple[str, ...]) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2",
                   "NUM_NODES": "1", "OLMO_SHARED_FS": "1", "FS_LOCAL_RANK": str(rank)}
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    from olmo_core.distributed import parallel
    from torch.distributed.checkpoint import state_dict

    for name in names:
        parallel._WORLD_MESH = None  # the engine thinks of one training per process
        run, recorder = golden_run(name), Recorder()
        work = Path(folder) / name
        trainer = build_trainer(run.recipe(), run.data(), work, draws=run.draws(f"rank{rank}."),
                                callbacks={"recorder": recorder})
        start = golden_run(name.split("_")[0]).start
        whole = state_dict.StateDictOptions(full_state_dict=True)
        state_dict.set_model_state_dict(trainer.train_module.model, start, options=whole)
        trainer.fit()
        final = state_dict.get_model_state_dict(trainer.train_module.model, options=whole)
        if rank == 0:
            torch.save((recorder.steps, final), f"{folder}/{name}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> Path:
    names = tuple(name for name in TWO if (SHARED / name).is_dir())
    folder = tmp_path_factory.mktemp("two")
    if names:
        mp.spawn(_rank, (str(folder), names), nprocs=2)
    return folder


@pytest.mark.parametrize("name", TWO)
def test_two_processes_are_those_of_the_published_trainer(name, two_processes):
    run = golden_run(name)
    steps, final = torch.load(two_processes / f"{name}.pt", weights_only=True)
    check(run, steps, golden_run(name.split("_")[0]).start, final)
