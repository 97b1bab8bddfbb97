"""Damaged, incomplete, malicious and impossible checkpoints: one sentence, nothing written, nothing run."""

from __future__ import annotations

import dataclasses
import io
import json
import pickle
import shutil

import pytest
import torch

from emo_select.convert import CoreOptions, HfOptions, to_hf, to_olmo_core
from emo_select.convert.dcp import TrainingTensors
from emo_select.convert.experiment import Pools
from emo_select.convert.pickles import check_pickle
from emo_select.errors import CheckpointError, DiskSpaceError, EmoSelectError, ModelError, NumericError, SpecError

WEIGHTS = "model_and_optim"


class Malicious:
    """What an attacker puts into a pickle."""

    def __reduce__(self):
        import os

        return os.system, ("touch /tmp/emo-select-was-here",)


def edit(folder, change):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def refused(step, out, words, kind=CheckpointError, options=None):
    with pytest.raises(kind, match=words) as caught:
        to_hf(step, out, options)
    assert not out.exists()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_pickle_that_asks_for_a_forbidden_class_is_refused_by_name(copied, tmp_path):
    step = copied("emo")
    (step / WEIGHTS / ".metadata").write_bytes(pickle.dumps(Malicious()))
    refused(step, tmp_path / "out", r"posix\.system")
    with pytest.raises(CheckpointError, match=r"posix\.system"):
        check_pickle(step / WEIGHTS / ".metadata")


def test_a_forbidden_class_in_a_part_is_refused_by_name(copied, tmp_path):
    step = copied("dense")
    tensors = TrainingTensors(step / WEIGHTS)
    piece = tensors.tensors["model.lm_head.norm.weight"].pieces[0]
    path = step / WEIGHTS / piece.file
    data = path.read_bytes()
    archive = data[piece.offset:piece.offset + piece.length]
    assert b"_rebuild_tensor_v2" in archive
    changed = archive.replace(b"_rebuild_tensor_v2", b"_rebuild_xensor_v2")
    path.write_bytes(data[:piece.offset] + changed + data[piece.offset + piece.length:])
    with pytest.raises(CheckpointError, match=r"damaged|_rebuild_xensor"):
        to_hf(step, tmp_path / "out")


def test_the_state_of_a_trainer_passes_and_a_malicious_one_does_not(cases, tmp_path):
    for path in cases.glob("*/checkpoint/train/*.pt"):
        check_pickle(path)
    torch.save({"rng": Malicious()}, tmp_path / "rank0.pt")
    with pytest.raises(CheckpointError, match=r"posix\.system"):
        check_pickle(tmp_path / "rank0.pt")


def test_a_second_pickle_behind_a_harmless_first_one_is_not_missed(cases, tmp_path):
    """torch reads a file that is no archive as several pickles, one after the other."""
    path = tmp_path / "rank0.pt"
    path.write_bytes(pickle.dumps(1) + pickle.dumps(Malicious()))
    with pytest.raises(CheckpointError, match="behind its end"):
        check_pickle(path)
    whole = (cases / "emo" / "checkpoint" / "train" / "rank0.pt").read_bytes()
    path.write_bytes(pickle.dumps(Malicious()) + whole)  # an archive for readers that look at the end
    with pytest.raises(CheckpointError, match=r"posix\.system"):
        check_pickle(path)


def test_settings_of_the_optimiser_are_read_and_a_malicious_one_is_refused(copied):
    folder = copied("emo") / WEIGHTS
    tensors = TrainingTensors(folder)
    assert tensors.read_value("optim.param_groups.embeddings.weight.weight_decay") == 0
    assert tensors.read_value("optim.param_groups.embeddings.weight.lr") == pytest.approx(4e-4)
    tensors.check_pickles()
    place = tensors.values["optim.param_groups.embeddings.weight.foreach"]
    stream = io.BytesIO()
    torch.save(Malicious(), stream)
    path = folder / place.file
    data = path.read_bytes()
    room = stream.getvalue()
    path.write_bytes(data[:place.offset] + room + data[place.offset + len(room):])
    metadata = (folder / ".metadata").read_bytes()
    assert metadata and len(room) >= place.length
    tensors.values = {**tensors.values, "optim.param_groups.embeddings.weight.foreach":
                      dataclasses.replace(place, length=len(room))}
    with pytest.raises(CheckpointError, match=r"posix\.system"):
        tensors.check_pickles()


def test_one_flipped_bit_in_the_values_is_noticed(copied, tmp_path):
    step = copied("emo_two_processes")
    piece = TrainingTensors(step / WEIGHTS).tensors["model.blocks.1.feed_forward_moe.experts.mlp.w2"].pieces[1]
    path = step / WEIGHTS / piece.file
    data = bytearray(path.read_bytes())
    data[piece.offset + piece.length // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=f"w2 in .*{piece.file} is damaged"):
        to_hf(step, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_missing_and_truncated_parts_are_noticed_before_anything_is_written(copied, tmp_path, damage):
    step = copied("emo_two_processes")
    piece = TrainingTensors(step / WEIGHTS).tensors["model.lm_head.w_out.weight"].pieces[1]
    path = step / WEIGHTS / piece.file
    path.unlink() if damage == "missing" else path.write_bytes(path.read_bytes()[:piece.offset + piece.length - 1])
    refused(step, tmp_path / "out", f"lacks {piece.file}" if damage == "missing" else f"{piece.file} is truncated")
    assert list(tmp_path.glob(".out*")) == []


def test_a_damaged_or_missing_table_of_contents_is_noticed(copied, tmp_path):
    step = copied("emo")
    path = step / WEIGHTS / ".metadata"
    path.write_bytes(path.read_bytes()[:500])
    refused(step, tmp_path / "out", "is damaged")
    path.unlink()
    refused(step, tmp_path / "out", "has no .metadata")


def test_parts_of_another_rank_may_not_lie_outside_the_folder(copied, tmp_path):
    step = copied("dense")
    path = step / WEIGHTS / ".metadata"
    path.write_bytes(path.read_bytes().replace(b"__0_0.distcp", b"../x0.distcp"))
    refused(step, tmp_path / "out", "not laid out")


@pytest.mark.parametrize("change, words, kind", [
    (lambda c: c["model"]["block"]["feed_forward_moe"]["router"].update(_CLASS_="os.system"), "os.system", ModelError),
    (lambda c: c["model"]["block"].update(name="moe_reordered_norm"), "moe_reordered_norm", ModelError),
    (lambda c: c["model"]["block"]["sequence_mixer"].update(qk_norm={"name": "rms"}), "qk_norm", ModelError),
    (lambda c: c["model"]["block"]["feed_forward_moe"]["router"].update(gating_function="sigmoid"), "sigmoid",
     ModelError),
    (lambda c: c["model"].update(n_layers=3), r"no tensor model\.blocks\.2", CheckpointError),
    (lambda c: c["model"]["block"]["feed_forward_moe"].update(num_experts=8), "should be", CheckpointError),
    (lambda c: c.pop("model"), "no entry 'model'", CheckpointError),
    (lambda c: c["model"].pop("d_model"), "does not describe", CheckpointError),
    (lambda c: c["dataset"]["tokenizer"].update(eos_token_id=500), "does not fit", CheckpointError),
])
def test_a_config_that_does_not_fit_is_refused_with_the_reason(copied, tmp_path, change, words, kind):
    step = copied("emo")
    edit(step, change)
    refused(step, tmp_path / "out", words, kind)


def test_two_shared_experts_are_refused_with_the_reason(cases, tmp_path):
    message = refused(cases / "emo_two_shared" / "checkpoint", tmp_path / "out", "2 shared experts", ModelError)
    assert "softmax" in message and "weight 1" in message


def test_a_folder_of_steps_names_the_last_one(copied, tmp_path):
    step = copied("dense")
    refused(step.parent, tmp_path / "out", "such as .*step20")


def test_nan_is_not_converted(copied, tmp_path):
    step = copied("dense")
    piece = TrainingTensors(step / WEIGHTS).tensors["model.lm_head.norm.weight"].pieces[0]
    path = step / WEIGHTS / piece.file
    with path.open("r+b") as file:
        file.seek(piece.offset)
        buffer = torch.full((32,), float("nan"))
        stream = io.BytesIO()
        torch.save(buffer, stream)
        assert len(stream.getvalue()) == piece.length
        file.write(stream.getvalue())
    with pytest.raises(NumericError, match=r"lm_head\.norm\.weight"):
        to_hf(step, tmp_path / "out")


def test_nothing_that_is_there_is_replaced_and_the_same_command_again_does_nothing(cases, tmp_path, capsys):
    step = cases / "dense" / "checkpoint"
    to_hf(step, tmp_path / "out")
    before = (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns
    to_hf(step, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns == before
    assert "nothing to do" in capsys.readouterr().err
    with pytest.raises(SpecError, match="already there"):
        to_hf(step, tmp_path / "out", HfOptions(dtype="bfloat16"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    for call in (lambda: to_hf(step, tmp_path / "mine"),
                 lambda: to_olmo_core(str(tmp_path / "out"), tmp_path / "mine")):
        with pytest.raises(SpecError, match="already there"):
            call()
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


def test_a_full_disk_is_noticed_before_the_first_byte(cases, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 1000))
    refused(cases / "dense" / "checkpoint", tmp_path / "out", "GB", DiskSpaceError)


@pytest.mark.parametrize("source, options, words", [
    ("dense", CoreOptions(pools=Pools(4, 8)), "dense model"),
    ("emo", CoreOptions(pools=Pools(2, 8)), "too small"),
    ("emo", CoreOptions(dtype="int8"), "int8"),
])
def test_requests_that_a_training_cannot_go_on_with_are_refused(cases, tmp_path, source, options, words):
    with pytest.raises(EmoSelectError, match=words):
        to_olmo_core(str(cases / source / "hf"), tmp_path / "step0", options)
    assert not (tmp_path / "step0").exists()


def test_a_two_shared_released_model_cannot_become_a_training(cases, tmp_path):
    with pytest.raises(ModelError, match="2 shared experts"):
        to_olmo_core(str(cases / "emo_two_shared" / "hf"), tmp_path / "step0")


def test_a_part_that_only_ends_as_an_archive_is_refused(copied):
    """torch reads by the first bytes, and would take this for a pickle."""
    folder = copied("emo") / WEIGHTS
    tensors = TrainingTensors(folder)
    place = tensors.values["optim.param_groups.embeddings.weight.foreach"]
    path = folder / place.file
    data, attack = path.read_bytes(), pickle.dumps(Malicious())
    part = attack + data[place.offset:place.offset + place.length]
    path.write_bytes(data[:place.offset] + part + data[place.offset + len(part):])
    tensors.values = {**tensors.values, "optim.param_groups.embeddings.weight.foreach":
                      dataclasses.replace(place, length=len(part))}
    with pytest.raises(CheckpointError, match="is damaged"):
        tensors.check_pickles()
