"""What is written reads in torch's own reader and in ai2-olmo-core, and what stops goes on where it was."""

from __future__ import annotations

import json

import pytest
import torch

from emo_select.convert import CoreOptions, HfOptions, dcp_write, hf, to_hf, to_olmo_core
from emo_select.convert.dcp import TrainingTensors


def test_torch_reads_what_is_written(cases, tmp_path):
    import torch.distributed.checkpoint as dcp

    to_olmo_core(str(cases / "std" / "hf"), tmp_path / "step0", CoreOptions(max_part_bytes=50_000))
    folder = tmp_path / "step0" / "model_and_optim"
    assert len(list(folder.glob("*.distcp"))) > 3
    assert {path.name for path in folder.glob(".*")} == {".metadata"}
    ours = TrainingTensors(folder)
    state = {name: torch.empty(info.shape) for name, info in ours.tensors.items()}
    dcp.load(state, storage_reader=dcp.FileSystemReader(folder), no_dist=True)
    assert [name for name, value in state.items() if not torch.equal(value, ours.read(name))] == []


@pytest.mark.parametrize("case", ["std_no_shared", "dense", "emo_dense_first"])
def test_the_engine_builds_the_model_from_config_and_loads_its_weights(cases, tmp_path, case):
    """Its own router and dense layers; models with shared experts need the router of emo_select.pretrain."""
    pytest.importorskip("olmo_core")
    from olmo_core.distributed.checkpoint import load_model_and_optim_state
    from olmo_core.nn.transformer import TransformerConfig

    to_hf(cases / case / "checkpoint", tmp_path / "hf", HfOptions(max_length=64))
    to_olmo_core(str(tmp_path / "hf"), tmp_path / "step0")
    config = json.loads((tmp_path / "step0" / "config.json").read_text())["model"]
    if case == "emo_dense_first":
        router = config["block"]["feed_forward_moe"]["router"]
        assert router["_CLASS_"].startswith("emo_select.pretrain")
        kept = {key: router[key] for key in ("name", "top_k", "gating_function")}
        config["block"]["feed_forward_moe"]["router"] = {**kept, "_CLASS_": "olmo_core.nn.moe.router.MoERouterConfig"}
    model = TransformerConfig.from_dict(config).build(init_device="cpu")
    load_model_and_optim_state(tmp_path / "step0" / "model_and_optim", model)
    original = TrainingTensors(cases / case / "checkpoint" / "model_and_optim")
    wrong = [name for name, value in model.state_dict().items()
             if not torch.equal(value, original.read(f"model.{name}"))]
    assert wrong == []


class Killed(BaseException):
    """The process ends here."""


def test_a_killed_conversion_to_hf_goes_on_with_the_file_it_was_in(cases, tmp_path, monkeypatch):
    step, options = cases / "emo" / "checkpoint", HfOptions(max_shard_bytes=40_000)
    to_hf(step, tmp_path / "whole", options)
    read: list[str] = []
    real = TrainingTensors.read

    def counted(self, name):
        if len(read) == 12:
            raise Killed
        read.append(name)
        return real(self, name)

    monkeypatch.setattr(TrainingTensors, "read", counted)
    with pytest.raises(Killed):
        to_hf(step, tmp_path / "out", options)
    assert not (tmp_path / "out").exists()
    first = list(read)
    read.clear()
    monkeypatch.setattr(TrainingTensors, "read", lambda self, name: read.append(name) or real(self, name))
    to_hf(step, tmp_path / "out", options)
    assert set(first[:4]).isdisjoint(read)  # their files were finished
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "out").iterdir())
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_a_killed_conversion_to_the_trainer_goes_on_with_the_file_it_was_in(cases, tmp_path, monkeypatch):
    source, options = str(cases / "emo" / "hf"), CoreOptions(max_part_bytes=50_000)
    written: list[str] = []
    real = dcp_write._write_part

    def counted(path, groups, tensor_of):
        if len(written) == 3:
            raise Killed
        written.append(path.name)
        return real(path, groups, tensor_of)

    monkeypatch.setattr(dcp_write, "_write_part", counted)
    with pytest.raises(Killed):
        to_olmo_core(source, tmp_path / "step0", options)
    first = list(written)
    written[:] = [""] * -100  # count again, without an end
    monkeypatch.setattr(dcp_write, "_write_part", lambda path, *rest: written.append(path.name) or real(path, *rest))
    to_olmo_core(source, tmp_path / "step0", options)
    assert first == ["__0_0.distcp", "__0_1.distcp", "__0_2.distcp"] and set(first).isdisjoint(written)
    to_olmo_core(source, tmp_path / "whole", options)
    ours, whole = (TrainingTensors(tmp_path / name / "model_and_optim") for name in ("step0", "whole"))
    assert [name for name in whole.tensors if not torch.equal(ours.read(name), whole.read(name))] == []


def test_one_training_tensor_is_in_memory_at_a_time(cases, tmp_path, monkeypatch):
    """Every tensor that was read is gone before the next one is."""
    import weakref

    alive: list[weakref.ref] = []
    real = TrainingTensors.read

    def watched(self, name):
        assert [ref for ref in alive if ref() is not None] == []
        tensor = real(self, name)
        alive.append(weakref.ref(tensor.untyped_storage()))
        return tensor

    monkeypatch.setattr(TrainingTensors, "read", watched)
    to_hf(cases / "emo" / "checkpoint", tmp_path / "out", hf.HfOptions())
    assert len(alive) == 23
