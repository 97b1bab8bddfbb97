"""Pruning on disk against the published results, and against everything that can go wrong on the way."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from safetensors.torch import load_file, save_file
from torch.overrides import TorchFunctionMode
from typer.testing import CliRunner

from emo_select.checkpoint import Checkpoint, ShardedWriter, open_checkpoint
from emo_select.cli.prune import register
from emo_select.errors import (
    CheckpointError,
    DiskSpaceError,
    EmoSelectError,
    KeepKError,
    ModelError,
    NumericError,
    SpecError,
    StorageError,
)
from emo_select.experts.keepset import KeepSet, check_keep_k, expert_mask, keep_everything
from emo_select.experts.prune import parse_size, plan_prune, prune_checkpoint
from emo_select.models import load_model
from emo_select.models.families import always_active_per_layer, experts_per_layer
from emo_select.ownership import MARKER

CASES = sorted((Path(__file__).parents[1] / "golden" / "selection").glob("*/pruned/*.json"))


def golden_case(path: Path) -> tuple[Path, dict[str, Any], KeepSet]:
    """(unpruned model, what the reference wrote, its keep set)."""
    expected = json.loads(path.read_text())
    case = json.loads((path.parents[1] / "case.json").read_text())
    model, meta = path.parents[2].parent / case["model"], expected["pruning_metadata"]
    kept = [tuple(range(count)) if ids is None and count else ids
            for ids, count in zip(meta["experts_kept_per_layer"], case["experts_per_layer"], strict=True)]
    schedule = meta.get("keep_k_per_layer")
    method = "variable" if schedule else path.stem.split("_k")[0].removesuffix("_seed1")
    keep_set = KeepSet(experts=kept, method=method, keep_k=meta.get("prune_keep_k") or min(schedule), schedule=schedule,
                       num_shared=meta["num_shared_experts"], model="<original_model>", task="t", split="validation",
                       seed=meta.get("seed", 0))
    return model, expected, keep_set


def sha(checkpoint: Checkpoint, name: str) -> str:
    return hashlib.sha256(b"".join(map(bytes, checkpoint.pieces(name)))).hexdigest()[:16]


@pytest.mark.parametrize("path", CASES, ids=lambda path: f"{path.parents[1].name}-{path.stem}")
def test_golden(path: Path, tmp_path: Path) -> None:
    model, expected, keep_set = golden_case(path)
    prune_checkpoint(model, keep_set, tmp_path / "pruned", allow_nonuniform=True)
    pruned = open_checkpoint(tmp_path / "pruned")
    assert pruned.config == expected["config"]
    assert {n: [list(i.shape), "float32"] for n, i in pruned.tensors.items()} == expected["tensors"]
    assert {name: sha(pruned, name) for name in pruned.tensors} == expected["sha256_16"]
    published = {name for name in expected["files"] if "token" not in name}  # the golden models have no tokenizer
    assert published <= {file.name for file in (tmp_path / "pruned").iterdir()}
    metadata = json.loads((tmp_path / "pruned" / "pruning_metadata.json").read_text())
    reference = expected["pruning_metadata"]
    if "activation_file" not in reference:  # the published one-pass script names no method
        untouched = [i for i, ids in enumerate(reference["experts_kept_per_layer"]) if ids is None]
        for layer in untouched:
            metadata["experts_kept_per_layer"][layer] = None
        assert metadata.keys() == {*reference, "pruned_from"}
        assert {key: metadata[key] for key in reference} == reference
    difference = logits_difference(path, tmp_path / "pruned")
    print(f"{path.parents[1].name}/{path.stem}: logits differ by {difference:.1e}")
    assert difference < 3e-4


def logits_difference(path: Path, pruned: Path) -> float:
    """Largest difference of the pruned model's logits from the reference's."""
    expected = load_file(path.parents[1] / "pruned_logits.safetensors")
    with torch.no_grad():
        logits = load_model(str(pruned))(expected["prompt_ids"].reshape(1, -1)).logits
    return float((logits.flatten() - expected[path.stem].flatten()).abs().max())


class Masked(TorchFunctionMode):
    """While active, (…, E) router logits are minus infinity for the dropped experts."""

    def __init__(self, dropped: list[int]) -> None:
        super().__init__()
        self.dropped = torch.tensor(dropped, dtype=torch.long)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return result.index_fill(-1, self.dropped, -torch.inf) if func is torch.nn.functional.linear else result


def masked_model(source: Path, keep_set: KeepSet) -> Any:
    """The unpruned model, which can no longer route to the dropped experts."""
    model = load_model(str(source))
    for layer, kept in zip(model.model.layers, keep_set.experts, strict=True):
        router, plain = layer.mlp.gate, layer.mlp.gate.forward
        dropped = [e for e in range(router.num_experts) if e not in (kept or ())]

        def forward(hidden: torch.Tensor, plain: Any = plain, dropped: list[int] = dropped) -> Any:
            with Masked(dropped):
                return plain(hidden)

        router.forward = forward
    return model


@pytest.mark.parametrize(("name", "keep_k"), [("emo_alwaysactive", 6), ("emo_alwaysactive_perlayer", 5),
                                              ("emo_alwaysactive", 16), ("emo_minimal_config", 5),
                                              ("emo_biasattn_tied_headdim", 6)])
def test_always_active_experts_are_renumbered(golden: Path, tmp_path: Path, name: str, keep_k: int) -> None:
    source = golden / "models" / name
    config = open_checkpoint(source).config
    kept = []
    counts = experts_per_layer(config)
    for layer, (count, active) in enumerate(zip(counts, always_active_per_layer(config), strict=True)):
        order = torch.randperm(count - 1, generator=torch.Generator().manual_seed(layer)).tolist()
        chosen = list(dict.fromkeys([count - 1, *active, *order]))[:keep_k]  # the last one is the shared one, if any
        kept.append(tuple(sorted(chosen)))
    keep_set = KeepSet(experts=tuple(kept), method="random", keep_k=keep_k)
    prune_checkpoint(source, keep_set, tmp_path / "pruned")
    ids = torch.arange(3, 40)[None] % config["vocab_size"]
    with torch.no_grad():
        found, expected = load_model(str(tmp_path / "pruned"))(ids).logits, masked_model(source, keep_set)(ids).logits
    assert (found - expected).abs().max() < 2e-5


def test_dropping_an_always_active_expert_is_refused(golden: Path) -> None:
    checkpoint = open_checkpoint(golden / "models" / "emo_alwaysactive")
    keep_set = KeepSet(experts=((0, 1, 2, 4, 5),) * 3, method="random", keep_k=5)
    with pytest.raises(KeepKError, match="expert 3 of layer 0, which is always active"):
        plan_prune(checkpoint, keep_set)


@pytest.fixture
def source(golden: Path, tmp_path: Path) -> Path:
    """A copy of a sharded checkpoint that a test may break."""
    shutil.copytree(golden / "models" / "emo_sharded", tmp_path / "source", ignore=shutil.ignore_patterns("expected*"))
    return tmp_path / "source"


@pytest.fixture
def some() -> KeepSet:
    """Six experts of every layer of `source`."""
    experts = ((0, 3, 4, 5, 9, 15), (1, 2, 3, 7, 8, 15), (0, 6, 7, 11, 14, 15))
    return KeepSet(experts=experts, method="layerwise", keep_k=6, num_shared=1, model="some/model")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_keeping_everything_links_the_shards(source: Path, tmp_path: Path) -> None:
    everything = keep_everything(open_checkpoint(source).config)
    prune_checkpoint(source, everything, tmp_path / "linked")
    prune_checkpoint(source, everything, tmp_path / "copied", max_shard_size="1GB")
    for shard in source.glob("model-*"):
        assert (tmp_path / "linked" / shard.name).samefile(shard)
    linked, copied = open_checkpoint(tmp_path / "linked"), open_checkpoint(tmp_path / "copied")
    assert linked.config == copied.config and linked.config["output_router_logits"] is True
    assert copied.shards == ["model.safetensors"]
    assert all(torch.equal(linked.read(name), copied.read(name)) for name in linked.tensors)


def test_shards_and_dtype(source: Path, some: KeepSet, tmp_path: Path) -> None:
    prune_checkpoint(source, some, tmp_path / "whole")
    prune_checkpoint(source, some, tmp_path / "parts", max_shard_size="20KB", dtype="bfloat16")
    whole, parts = open_checkpoint(tmp_path / "whole"), open_checkpoint(tmp_path / "parts")
    assert len(parts.shards) > 1 and all((tmp_path / "parts" / s).stat().st_size < 25_000 for s in parts.shards)
    assert parts.config == whole.config | {"dtype": "bfloat16"}
    assert all(torch.equal(parts.read(n), whole.read(n).bfloat16()) for n in whole.tensors)


def test_companion_files(source: Path, some: KeepSet, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "chat_template.jinja", "modeling_emo.py", "pytorch_model.bin", "README.md"):
        (source / name).write_text(name)
    prune_checkpoint(source, some, tmp_path / "pruned", metadata={"task": "mine"})
    assert contents(tmp_path / "pruned").keys() == {
        "model.safetensors", "config.json", "generation_config.json", "pruning_metadata.json", "experts.json",
        "expert_mask.json", "tokenizer.json", "chat_template.jinja", "modeling_emo.py", "README.md", MARKER}
    assert json.loads((tmp_path / "pruned/experts.json").read_text())["1"] == [1, 2, 3, 7, 8, 15]
    assert json.loads((tmp_path / "pruned/pruning_metadata.json").read_text())["task"] == "mine"
    mask = json.loads((tmp_path / "pruned/expert_mask.json").read_text())
    assert mask == expert_mask(open_checkpoint(source).config, some) and mask[2] == [1, 0, 0, 0, 0, 0, 1, 1, 0, 0, 0, 1,
                                                                                    0, 0, 1, 1]


def test_a_crash_keeps_finished_shards_and_the_result_is_the_same(source: Path, some: KeepSet, tmp_path: Path,
                                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    prune_checkpoint(source, some, tmp_path / "undisturbed", max_shard_size="20KB")
    write, calls, budget = ShardedWriter.write_bytes, [0], [10]

    def failing(self: ShardedWriter, name: str, pieces: Any) -> None:
        calls[0] += 1
        if calls[0] > budget[0]:
            raise OSError("the disk went away")
        write(self, name, pieces)

    monkeypatch.setattr(ShardedWriter, "write_bytes", failing)
    total = 0
    for _ in range(40):
        calls[0] = 0
        budget[0] += 6
        try:
            prune_checkpoint(source, some, tmp_path / "resumed", max_shard_size="20KB")
            break
        except StorageError:
            total += budget[0]
            assert not (tmp_path / "resumed").exists()
    assert 0 < calls[0] < len(plan_prune(open_checkpoint(source), some).copies)  # the last call did only the rest
    assert contents(tmp_path / "resumed") == contents(tmp_path / "undisturbed")
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


def test_another_keep_set_never_continues_the_old_one(source: Path, some: KeepSet, tmp_path: Path,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    other = some.model_copy(update={"experts": ((1, 3, 4, 5, 9, 15), *some.experts[1:])})
    with monkeypatch.context() as patch:
        patch.setattr("emo_select.experts.prune.write_card", lambda *a: (_ for _ in ()).throw(OSError("full")))
        with pytest.raises(StorageError, match="full"):
            prune_checkpoint(source, some, tmp_path / "pruned")  # all shards are there, the end is missing
    prune_checkpoint(source, other, tmp_path / "pruned")
    prune_checkpoint(source, other, tmp_path / "fresh")
    assert contents(tmp_path / "pruned") == contents(tmp_path / "fresh")


KILLED = """
import os, signal, sys
from pathlib import Path
from emo_select.checkpoint import ShardedWriter
from emo_select.experts.keepset import KeepSet
from emo_select.experts.prune import prune_checkpoint
write, left = ShardedWriter.write_bytes, [int(sys.argv[4])]
def dying(self, name, pieces):
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    write(self, name, pieces)
ShardedWriter.write_bytes = dying
prune_checkpoint(sys.argv[1], KeepSet.load(Path(sys.argv[2])), Path(sys.argv[3]), max_shard_size="20KB")
"""


@pytest.mark.parametrize("at", [1, 40, 71])
def test_kill_9(source: Path, some: KeepSet, tmp_path: Path, at: int) -> None:
    some.save(tmp_path / "selection.json")
    command = [sys.executable, "-c", KILLED, str(source), str(tmp_path / "selection.json"), str(tmp_path / "pruned")]
    killed = subprocess.run([*command, str(at)], check=False)
    assert killed.returncode == -signal.SIGKILL and not (tmp_path / "pruned").exists()
    prune_checkpoint(source, some, tmp_path / "pruned", max_shard_size="20KB")
    prune_checkpoint(source, some, tmp_path / "fresh", max_shard_size="20KB")
    assert contents(tmp_path / "pruned") == contents(tmp_path / "fresh")


def test_nan_is_named_with_layer_and_expert(source: Path, some: KeepSet, tmp_path: Path) -> None:
    for name, value, says in (("model.layers.1.mlp.experts.7.up_proj.weight", torch.nan, "layer 1, expert 7"),
                              ("model.layers.2.mlp.gate.weight", torch.inf, r"gate\.weight \(layer 2\)"),
                              ("lm_head.weight", -torch.inf, r"lm_head\.weight in")):
        shard = source / open_checkpoint(source).tensors[name].shard
        whole = shard.read_bytes()
        tensors = load_file(shard)
        tensors[name][0, 1] = value
        save_file(tensors, shard, {"format": "pt"})
        for dtype in (None, "bfloat16"):
            with pytest.raises(NumericError, match=says):
                prune_checkpoint(source, some, tmp_path / "pruned", dtype=dtype)
        assert not (tmp_path / "pruned").exists()
        shard.write_bytes(whole)


def test_a_dropped_expert_may_be_broken(source: Path, some: KeepSet, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.experts.0.up_proj.weight"
    shard = source / open_checkpoint(source).tensors[name].shard
    tensors = load_file(shard)
    tensors[name][0, 0] = torch.nan
    save_file(tensors, shard, {"format": "pt"})
    prune_checkpoint(source, some, tmp_path / "pruned")


def test_values_that_float16_cannot_hold(source: Path, some: KeepSet, tmp_path: Path) -> None:
    shard = source / open_checkpoint(source).tensors["model.norm.weight"].shard
    tensors = load_file(shard)
    tensors["model.norm.weight"][0] = 1e6
    save_file(tensors, shard, {"format": "pt"})
    with pytest.raises(NumericError, match=r"model\.norm\.weight has values that torch\.float16 cannot hold"):
        prune_checkpoint(source, some, tmp_path / "pruned", dtype="float16")


def test_a_selection_of_another_model_is_refused(source: Path, some: KeepSet) -> None:
    checkpoint = open_checkpoint(source)
    for experts, says in (((*some.experts, (0,)), "4 layers, the model 3"),
                          (((0, 16), *some.experts[1:]), "layer 0, which has 16"),
                          ((None, *some.experts[1:]), "layer 0, which has 16")):
        with pytest.raises(KeepKError, match=says):
            plan_prune(checkpoint, some.model_copy(update={"experts": experts}))


def test_layers_of_different_size(source: Path, some: KeepSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
                                  ) -> None:
    uneven = KeepSet(experts=((0, 15), *some.experts[1:]), method="variable", keep_k=2, schedule=(2, 6, 6))
    with pytest.raises(KeepKError, match="2 to 6 experts per layer; pass --allow-nonuniform"):
        prune_checkpoint(source, uneven, tmp_path / "pruned")
    prune_checkpoint(source, uneven, tmp_path / "pruned", allow_nonuniform=True)
    assert "stock" in capsys.readouterr().err
    assert open_checkpoint(tmp_path / "pruned").config["num_experts_per_layer"] == [2, 6, 6]


def test_too_little_disk(source: Path, some: KeepSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(DiskSpaceError, match="free"):
        prune_checkpoint(source, some, tmp_path / "pruned")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]
    prune_checkpoint(source, keep_everything(open_checkpoint(source).config), tmp_path / "linked")  # needs none


def test_nothing_is_written_when_the_source_is_broken(source: Path, some: KeepSet, tmp_path: Path) -> None:
    shard = source / "model-00002-of-00004.safetensors"
    os.truncate(shard, shard.stat().st_size - 1)
    with pytest.raises(CheckpointError, match=r"model-00002-of-00004\.safetensors .* is truncated"):
        prune_checkpoint(source, some, tmp_path / "pruned")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_one_expert_of_another_shape_is_named(source: Path, some: KeepSet) -> None:
    name = "model.layers.0.mlp.experts.2.down_proj.weight"
    shard = source / open_checkpoint(source).tensors[name].shard
    tensors = load_file(shard)
    tensors[name] = torch.zeros(tensors[name].shape[0], 3)
    save_file(tensors, shard, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"experts\.2\.down_proj\.weight has shape"):
        plan_prune(open_checkpoint(source), some)


def test_a_selection_made_on_other_weights_is_mentioned(source: Path, some: KeepSet, tmp_path: Path,
                                                        capsys: pytest.CaptureFixture[str]) -> None:
    same = some.model_copy(update={"fingerprint": open_checkpoint(source).forward_fingerprint})
    prune_checkpoint(source, same, tmp_path / "pruned")
    assert "other weights" not in capsys.readouterr().err
    prune_checkpoint(source, some.model_copy(update={"fingerprint": "0" * 64}), tmp_path / "pruned")
    assert "other weights" in capsys.readouterr().err


def test_keep_k(golden: Path) -> None:
    config = open_checkpoint(golden / "models" / "emo_shared1").config
    assert check_keep_k(config, 32) is None and check_keep_k(config, 4) is None
    notice = check_keep_k(config, 3)
    assert notice == "With 3 experts per layer the model uses 3 experts per token instead of 4."
    for keep_k, shared, says in ((33, None, "the model has 32; choose 2 to 32"), (1, None, "counts the 1 shared"),
                                 (0, 0, "counts the 0 shared"), (4, 2, "the model has 1")):
        with pytest.raises(KeepKError, match=says):
            check_keep_k(config, keep_k, shared)
    assert check_keep_k(config, 4, 0) is None
    always = open_checkpoint(golden / "models" / "emo_alwaysactive").config
    with pytest.raises(KeepKError, match="2 are always active; choose at least 3"):
        check_keep_k(always, 2)
    with pytest.raises(ModelError, match="dense"):
        check_keep_k(open_checkpoint(golden / "models" / "dense_olmo2").config, 4)


def test_parse_size() -> None:
    assert [parse_size(s) for s in (None, 7, "5GB", " 1.5mb ", "300")] == [None, 7, 5 * 10**9, 1_500_000, 300]
    for wrong in ("", "GB", "-1GB", "5 apples", "0", "inf"):
        with pytest.raises(SpecError, match="not a size"):
            parse_size(wrong)


def test_selection_file_round_trip_and_damage(some: KeepSet, tmp_path: Path) -> None:
    path = tmp_path / "selection.json"
    some.save(path)
    assert KeepSet.load(path) == some
    data = json.loads(path.read_text())
    for change, says in (({"extra": 1}, "extra"), ({"experts": [[1, 1]]}, "ascending"), ({"keep_k": "x"}, "keep_k"),
                         ({"experts": [[]]}, "ascending")):
        path.write_text(json.dumps({**data, **change}))
        with pytest.raises(CheckpointError, match=says):
            KeepSet.load(path)
    path.write_text("{")
    with pytest.raises(CheckpointError, match=r"selection\.json"):
        KeepSet.load(path)


@pytest.fixture
def command() -> typer.Typer:
    app = typer.Typer()
    register(app)
    app.command("other")(lambda: None)  # with one command alone, its name would not be part of the line
    return app


def test_command(command: typer.Typer, source: Path, some: KeepSet, tmp_path: Path) -> None:
    run = CliRunner()
    some.save(tmp_path / "run" / "selection.json")
    line = ["prune", str(tmp_path / "run"), "--model", str(source), "--json"]
    dry = json.loads(run.invoke(command, [*line, "--dry-run"], catch_exceptions=False).stdout)
    assert not (tmp_path / "run" / "selected_model").exists()
    done = json.loads(run.invoke(command, line, catch_exceptions=False).stdout)
    assert dry == {**done, "written": False} and done["experts"] == 6 and done["experts_before"] == 16
    assert done["bytes"] == open_checkpoint(tmp_path / "run" / "selected_model").total_bytes
    half = json.loads(run.invoke(command, [*line, "--dry-run", "--dtype", "float16"], catch_exceptions=False).stdout)
    assert half["bytes"] * 2 == done["bytes"]
    with pytest.raises(EmoSelectError, match="--force"):
        run.invoke(command, line, catch_exceptions=False)
    run.invoke(command, [*line, "--force", "--out", str(tmp_path / "else")], catch_exceptions=False)
    assert contents(tmp_path / "else") == contents(tmp_path / "run" / "selected_model")


def test_command_names_what_is_missing(command: typer.Typer, tmp_path: Path, some: KeepSet) -> None:
    with pytest.raises(CheckpointError, match=r"selection\.json does not exist"):
        CliRunner().invoke(command, ["prune", str(tmp_path)], catch_exceptions=False)
    some.model_copy(update={"model": None}).save(tmp_path / "selection.json")
    with pytest.raises(SpecError, match="--model"):
        CliRunner().invoke(command, ["prune", str(tmp_path)], catch_exceptions=False)


def test_a_hub_model_in_the_cache(source: Path, some: KeepSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = tmp_path / "hub" / "models--some--model"
    snapshot = repository / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123abc")
    shutil.copytree(source, repository / "blobs")
    for blob in (repository / "blobs").iterdir():  # the Hub's cache holds links
        (snapshot / blob.name).symlink_to(blob)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert open_checkpoint("some/model").fingerprint == open_checkpoint(source).fingerprint
    prune_checkpoint("some/model", keep_everything(open_checkpoint(source).config), tmp_path / "linked")
    shard = tmp_path / "linked" / "model-00001-of-00004.safetensors"
    assert not shard.is_symlink() and shard.samefile(repository / "blobs" / shard.name)
