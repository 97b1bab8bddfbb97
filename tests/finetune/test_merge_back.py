"""Experts go back to their original places: golden tensors, and the published bugs put right."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from finetune_cases import GOLDEN
from safetensors.torch import load_file, save_file

from emo_select.errors import CheckpointError, ModelError, SpecError
from emo_select.finetune.merge import MergeOptions, merge_back
from emo_select.models import load_model

MODELS = Path(__file__).parents[1] / "golden" / "models"
CASES = ("moe_densefirst_k8", "moe_shared1_k8")
NAMES = {"also_copy_router_rows": "router", "also_copy_shared": "shared", "also_copy_non_moe": "rest"}


def golden_runs() -> list[tuple[str, str]]:
    return [(case, run) for case in CASES for run in expected_of(case)["runs"]]


def expected_of(case: str) -> dict:
    return json.loads((GOLDEN / case / "merge" / "expected.json").read_text())


def options_of(run: dict) -> MergeOptions:
    given = run["options"]
    chosen = {NAMES[name]: True for name in NAMES if given.get(name)}
    average = given.get("average_weight", 0.5) if given.get("average") else None
    return MergeOptions(**chosen, average=average, dtype="bfloat16" if run["dtype"] == ["bfloat16"] else None)


def child_of(case: str, tmp_path: Path) -> Path:
    child = tmp_path / "child"
    shutil.copytree(GOLDEN / case / "merge" / "child", child)
    shutil.copy(GOLDEN / case / "merge" / "child_pruning_metadata.json", child / "pruning_metadata.json")
    return child


def parent_of(case: str) -> str:
    return str(MODELS / expected_of(case)["parent"].removeprefix("models/"))


def hashed(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


@pytest.mark.parametrize(("case", "name"), golden_runs())
def test_golden(case, name, tmp_path):
    run = expected_of(case)["runs"][name]
    record = merge_back(child_of(case, tmp_path), parent_of(case), tmp_path / "out", options_of(run))
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert set(merged) == set(run["sha256_16"])
    forgets_dense = "densefirst" in case and run["options"].get("also_copy_non_moe", False)
    rest_fixed = {tensor for tensor in merged if forgets_dense and ".layers.0.mlp." in tensor}
    exact = not run["options"].get("average")  # averages are compared by value below
    for tensor in merged.keys() - rest_fixed if exact else ():
        assert hashed(merged[tensor]) == run["sha256_16"][tensor], tensor
    for key, count in run["merge_metadata"].items():
        if key.startswith("n_") and not (key == "n_non_moe_copied" and rest_fixed):
            assert record[key] == count, key
    assert record["merge_mode"] == run["merge_metadata"]["merge_mode"]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 1e-2)])
def test_average_values(case, dtype, tolerance, tmp_path):
    cast = None if dtype == "float32" else dtype
    options = MergeOptions(router=True, shared=True, rest=True, average=0.25, dtype=cast)
    merge_back(child_of(case, tmp_path), parent_of(case), tmp_path / "out", options)
    merged = load_file(tmp_path / "out" / "model.safetensors")
    expected = load_file(GOLDEN / case / "merge" / f"expected_average_025_all.{dtype}.safetensors")
    for name, value in expected.items():
        if not ("densefirst" in case and ".layers.0.mlp." in name):
            torch.testing.assert_close(merged[name], value, rtol=tolerance, atol=1e-7)


def test_dense_layers_belong_to_the_rest(tmp_path):
    child = child_of("moe_densefirst_k8", tmp_path)
    merge_back(child, parent_of("moe_densefirst_k8"), tmp_path / "out", MergeOptions(rest=True))
    merged, tuned = load_file(tmp_path / "out" / "model.safetensors"), load_file(child / "model.safetensors")
    dense = [name for name in merged if ".layers.0.mlp." in name]
    assert len(dense) == 3 and all(merged[name].equal(tuned[name]) for name in dense)


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_merged_model_runs_as_golden(case, tmp_path):
    merge_back(child_of(case, tmp_path), parent_of(case), tmp_path / "out")
    expected = load_file(GOLDEN / case / "merge" / "expected_logits.safetensors")
    logits = load_model(str(tmp_path / "out"))(expected["input_ids"]).logits
    torch.testing.assert_close(logits, expected["logits.default"], atol=3e-4, rtol=0)


def test_run_directory_and_untouched_layers(tmp_path):
    """The last checkpoint of a run is taken; null means that a layer was left as it was."""
    child = child_of("moe_shared1_k8", tmp_path)
    metadata = json.loads((child / "pruning_metadata.json").read_text())
    run = tmp_path / "run" / "finetuned_model"
    shutil.copytree(child, run / "checkpoint-2")
    kept = metadata["experts_kept_per_layer"]
    full = load_file(Path(parent_of("moe_shared1_k8")) / "model.safetensors")
    tensors = load_file(child / "model.safetensors")
    tensors = {name: value for name, value in tensors.items() if ".layers.3.mlp." not in name}
    tensors |= {name: value + 1 for name, value in full.items() if ".layers.3.mlp." in name}
    save_file(tensors, run / "checkpoint-2" / "model.safetensors")
    config = json.loads((child / "config.json").read_text())
    config |= {"num_experts_per_layer": [8, 8, 8, 32], "num_shared_experts_per_layer": [1, 1, 1, 1]}
    (run / "checkpoint-2" / "config.json").write_text(json.dumps(config))
    metadata["experts_kept_per_layer"] = [*kept[:3], None]
    (run / "checkpoint-2" / "pruning_metadata.json").write_text(json.dumps(metadata))
    record = merge_back(tmp_path / "run", parent_of("moe_shared1_k8"), tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert record["n_routable_copied"] == 3 * 7 + 31
    name = "model.layers.3.mlp.experts.17.up_proj.weight"
    assert merged[name].equal(full[name] + 1)


def test_wrong_parents_are_refused_before_writing(tmp_path):
    child = child_of("moe_densefirst_k8", tmp_path)
    with pytest.raises(CheckpointError, match=r"give the model that was pruned|in the full model"):
        merge_back(child, parent_of("moe_shared1_k8"), tmp_path / "out")
    with pytest.raises(ModelError, match="dense"):
        merge_back(child, str(GOLDEN / "dense" / "model"), tmp_path / "out")
    with pytest.raises(SpecError, match="between 0 and 1"):
        merge_back(child, parent_of("moe_densefirst_k8"), tmp_path / "out", MergeOptions(average=2))
    (child / "pruning_metadata.json").unlink()
    with pytest.raises(CheckpointError, match=r"no pruning_metadata.json"):
        merge_back(child, parent_of("moe_densefirst_k8"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
