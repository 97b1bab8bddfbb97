"""Experts keep their original numbers through any number of prunings, and go back to nothing else."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from emo_select.checkpoint import open_checkpoint, resolve
from emo_select.errors import CheckpointError, ModelError
from emo_select.experts import prune_checkpoint
from emo_select.experts.methods import select_random
from emo_select.experts.provenance import EXPERTS, MASK, METADATA
from emo_select.finetune.merge import MergeOptions, merge_back
from emo_select.models.families import experts_per_layer

EVERYTHING = MergeOptions(router=True, shared=True, rest=True)


def pruned(source: Path, keep_k: int, out: Path) -> Path:
    with open_checkpoint(source) as checkpoint:
        keep_set = select_random(checkpoint.config, keep_k, seed=keep_k, about={"model": str(source)})
    prune_checkpoint(source, keep_set, out)
    return out


def metadata(folder: Path) -> dict:
    return json.loads((folder / METADATA).read_text())


def same_weights(a: Path, b: Path) -> bool:
    one, other = (load_file(folder / "model.safetensors") for folder in (a, b))
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture
def chain(tmp_path: Path) -> list[Path]:
    """A model, pruned, pruned again, and once more."""
    shutil.copytree(resolve("demo/emo"), tmp_path / "m0")
    models = [tmp_path / "m0"]
    for keep_k in (16, 8, 4):
        models.append(pruned(models[-1], keep_k, tmp_path / f"m{keep_k}"))
    return models


def test_numbers_are_those_of_the_first_original(chain):
    original, last = (load_file(folder / "model.safetensors") for folder in (chain[0], chain[-1]))
    found = metadata(chain[-1])
    assert found["original_model"] == chain[0].name and found["prune_keep_k"] == 4
    assert [one["model"] for one in found["pruned_from"]] == [path.name for path in chain[:-1]]
    with open_checkpoint(chain[0]) as checkpoint:
        counts = experts_per_layer(checkpoint.config)
    for layer, kept in enumerate(found["experts_kept_per_layer"]):
        assert len(kept) == 4
        for place, number in enumerate(kept):
            part = "down_proj.weight"
            assert torch.equal(last[f"model.layers.{layer}.mlp.experts.{place}.{part}"],
                               original[f"model.layers.{layer}.mlp.experts.{number}.{part}"])
        assert json.loads((chain[-1] / EXPERTS).read_text())[str(layer)] == kept
        mask = json.loads((chain[-1] / MASK).read_text())[layer]
        assert [i for i, one in enumerate(mask) if one] == kept and len(mask) == counts[layer]


@pytest.mark.parametrize("into", [0, 1, 2])
def test_experts_go_back_to_their_places_in_every_model_before(chain, into, tmp_path):
    damaged = tmp_path / "changed"
    shutil.copytree(chain[-1], damaged)
    tensors = load_file(damaged / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, damaged / "model.safetensors")
    merge_back(chain[-1], str(chain[into]), tmp_path / "same", EVERYTHING)
    assert same_weights(tmp_path / "same", chain[into])
    record = merge_back(damaged, str(chain[into]), tmp_path / "merged", MergeOptions())
    changed, before = (load_file(folder / "model.safetensors") for folder in (tmp_path / "merged", chain[into]))
    kept = metadata(damaged)["pruned_from"][into]["experts_kept_per_layer"]
    different = {name for name in before if not torch.equal(changed[name], before[name])}
    layers = {(int(name.split(".")[2]), int(name.split(".")[5])) for name in different}
    assert layers <= {(layer, number) for layer, numbers in enumerate(kept) for number in numbers}
    assert len(layers) == record["n_routable_copied"]


def test_a_model_of_the_same_shape_is_refused_by_name(chain, tmp_path):
    with pytest.raises(ModelError) as refused:
        merge_back(chain[-1], "demo/stdmoe", tmp_path / "out")
    assert str(refused.value).startswith(
        f"{chain[3]} was pruned from m8, which was pruned from m16, which was pruned from m0; "
        "demo/stdmoe has other weights")
    assert not (tmp_path / "out").exists()


def test_metadata_from_before_fingerprints_is_taken_at_its_word(chain, tmp_path, capsys):
    for folder in chain[1:3]:
        old = metadata(folder)
        del old["pruned_from"]
        (folder / METADATA).write_text(json.dumps(old))
    again = pruned(chain[2], 4, tmp_path / "again")
    assert metadata(again)["experts_kept_per_layer"] == metadata(chain[3])["experts_kept_per_layer"]
    merge_back(again, str(chain[0]), tmp_path / "same", EVERYTHING)
    assert same_weights(tmp_path / "same", chain[0])
    assert "only shapes can be compared" in " ".join(capsys.readouterr().err.split())
    merge_back(again, str(chain[2]), tmp_path / "known", EVERYTHING)
    assert same_weights(tmp_path / "known", chain[2])


def test_metadata_that_does_not_fit_the_model_is_refused(chain, tmp_path):
    shutil.copy(chain[2] / METADATA, chain[1] / METADATA)
    with pytest.raises(CheckpointError, match="does not fit the experts"):
        pruned(chain[1], 4, tmp_path / "wrong")


def test_subfolders_go_along(tmp_path):
    shutil.copytree(resolve("demo/emo"), tmp_path / "m")
    (tmp_path / "m" / "additional_chat_templates").mkdir()
    (tmp_path / "m" / "additional_chat_templates" / "tools.jinja").write_text("tools")
    child = pruned(tmp_path / "m", 8, tmp_path / "pruned")
    merge_back(child, str(tmp_path / "m"), tmp_path / "merged")
    for folder in (child, tmp_path / "merged"):
        assert (folder / "additional_chat_templates" / "tools.jinja").read_text() == "tools"
    (tmp_path / "m" / "vocab.txt").symlink_to("/etc/hostname")
    with pytest.raises(CheckpointError, match=r"vocab\.txt is a symbolic link"):
        pruned(tmp_path / "m", 8, tmp_path / "again")
