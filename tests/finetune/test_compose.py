"""Several pruned models become one checkpoint that holds the experts of all of them."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from emo_select import Selection, select_experts
from emo_select.checkpoint import open_checkpoint, resolve
from emo_select.errors import KeepKError, ModelError, OwnershipError, SpecError
from emo_select.evaluate import EvalOptions, evaluate_checkpoint
from emo_select.experts import KeepSet, prune_checkpoint
from emo_select.experts.methods import select_random
from emo_select.experts.provenance import METADATA
from emo_select.finetune.compose import ComposeOptions, compose
from emo_select.finetune.merge import merge_back
from emo_select.tasks import get_tasks

DEMO = str(resolve("demo/emo"))
DOWN = "model.layers.{}.mlp.experts.{}.down_proj.weight"


def kept_set(experts: list, num_shared: int = 1, **more) -> KeepSet:
    return KeepSet(experts=tuple(map(tuple, experts)), method="random", keep_k=max(map(len, experts)),
                   num_shared=num_shared, **more)


def pruned(source: str | Path, keep_set: KeepSet, out: Path) -> Path:
    prune_checkpoint(source, keep_set, out, allow_nonuniform=True)
    keep_set.save(out.parent / "selection.json")
    return out


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def change(folder: Path, *parts: str) -> Path:
    """One added to every tensor whose name has one of `parts`, in a copy."""
    tuned = folder.with_name(folder.name + "_tuned")
    shutil.copytree(folder, tuned)
    save_file({name: tensor + 1 if any(part in name for part in parts) else tensor
               for name, tensor in weights(folder).items()}, tuned / "model.safetensors")
    return tuned


def metadata(folder: Path) -> dict:
    return json.loads((folder / METADATA).read_text())


@pytest.fixture
def pair(tmp_path) -> list[Path]:
    """Two prunings of the demo: in every layer each has experts of its own, expert 4 and the shared one in common."""
    mine, other = [[1, 4, 9, 31]] * 3, [[0, 4, 20, 31]] * 3
    return [pruned(DEMO, kept_set(mine), tmp_path / "a" / "selected_model"),
            pruned(DEMO, kept_set(other), tmp_path / "b" / "selected_model")]


def test_the_union_is_the_full_model_pruned_to_it(pair, tmp_path):
    summary = compose(pair, DEMO, tmp_path / "both")
    pruned(DEMO, kept_set([[0, 1, 4, 9, 20, 31]] * 3), tmp_path / "at_once" / "model")
    composed, expected = tmp_path / "both", tmp_path / "at_once" / "model"
    assert (composed / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes()
    for name in ("config.json", "experts.json", "expert_mask.json", "tokenizer.json"):
        assert (composed / name).read_bytes() == (expected / name).read_bytes(), name
    assert summary["smallest_layer"] == summary["largest_layer"] == 6
    assert [one["model"] for one in metadata(composed)["composed_from"]] == ["a/selected_model", "b/selected_model"]
    assert "a/selected_model" in (composed / "README.md").read_text()


def test_composed_models_are_composed_merged_and_pruned_again(pair, tmp_path):
    third = pruned(DEMO, kept_set([[2, 31], [3, 31], [5, 31]]), tmp_path / "c" / "selected_model")
    compose(pair, DEMO, tmp_path / "two")
    compose([tmp_path / "two", third], DEMO, tmp_path / "three")
    assert metadata(tmp_path / "three")["experts_kept_per_layer"][1] == [0, 1, 3, 4, 9, 20, 31]
    with open_checkpoint(tmp_path / "three") as checkpoint:
        again = select_random(checkpoint.config, 3, seed=0, about={"model": "three"})
    pruned(tmp_path / "three", again, tmp_path / "again" / "model")
    merge_back(tmp_path / "again" / "model", DEMO, tmp_path / "merged")
    before, after = weights(Path(DEMO)), weights(tmp_path / "merged")
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_composes_in_the_numbers_of_any_model_before(pair, tmp_path):
    """Both pruned from a model that was pruned itself: the union is one of either."""
    middle = pruned(DEMO, kept_set([[1, 4, 9, 12, 31]] * 3), tmp_path / "m" / "model")
    children = [pruned(middle, kept_set([kept] * 3), tmp_path / str(at) / "model")
                for at, kept in enumerate(([0, 4], [1, 3, 4]))]
    for parent in (str(middle), DEMO):
        compose(children, parent, tmp_path / "out" / Path(parent).name)
        found = tmp_path / "out" / Path(parent).name
        assert metadata(found)["experts_kept_per_layer"] == [[1, 4, 12, 31]] * 3
    one, other = (weights(tmp_path / "out" / Path(parent).name) for parent in (middle, DEMO))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_finetuned_experts_come_from_the_one_that_changed_them(pair, tmp_path, capsys):
    mine = change(pair[0], "experts.0.", "experts.3.", "self_attn")  # 1 and the shared one
    other = change(pair[1], "experts.0.")  # 0
    compose([mine, other], DEMO, tmp_path / "out", ComposeOptions(finetuned=True))
    found, full = weights(tmp_path / "out"), weights(Path(DEMO))
    changed = {0: 1, 1: 1, 5: 0}  # in the union [0, 1, 4, 9, 20, 31]; shared experts were not asked for
    for place, expert in enumerate([0, 1, 4, 9, 20, 31]):
        assert torch.equal(found[DOWN.format(2, place)], full[DOWN.format(2, expert)] + changed.get(place, 0))
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(found[name], full[name])
    said = " ".join(capsys.readouterr().err.split())
    assert "also changed shared experts; attention" in said and "--shared, --rest" in said
    taken = [one["changes_taken"] for one in metadata(tmp_path / "out")["composed_from"]]
    assert taken == [{"routed": 9}, {"routed": 9}]


def test_collisions_are_refused_or_averaged(pair, tmp_path):
    mine, other = change(pair[0], "experts.1.", "norm"), change(pair[1], "experts.1.", "norm")  # 4 in both
    with pytest.raises(SpecError, match="expert 4 of layer 0 and 2 more; pass --collisions average"):
        compose([mine, other], DEMO, tmp_path / "out", ComposeOptions(finetuned=True))
    assert not list(tmp_path.glob("*out*"))
    third = change(change(other, "experts.1."), "experts.1.")  # three more in all
    options = ComposeOptions(finetuned=True, rest=True, collisions="average")
    summary = compose([mine, third], DEMO, tmp_path / "out", options)
    found, full = weights(tmp_path / "out"), weights(Path(DEMO))
    torch.testing.assert_close(found[DOWN.format(0, 2)], full[DOWN.format(0, 4)] + 2)
    torch.testing.assert_close(found["model.norm.weight"], full["model.norm.weight"] + 1)  # as in both
    assert summary["collisions_averaged"] == {"routed": 9, "rest": 7}


def test_router_rows_are_taken_row_by_row(pair, tmp_path):
    mine = change(pair[0], "gate.weight")
    compose([mine, pair[1]], DEMO, tmp_path / "out", ComposeOptions(finetuned=True, router=True))
    found, full = weights(tmp_path / "out"), weights(Path(DEMO))
    name = "model.layers.1.mlp.gate.weight"
    moved = (found[name] - full[name][[0, 1, 4, 9, 20, 31]]).mean(1).round().int().tolist()
    assert moved == [0, 1, 1, 1, 0, 1]


def test_a_cast_is_no_change(pair, tmp_path):
    half = tmp_path / "half"
    prune_checkpoint(DEMO, kept_set([[0, 4, 31]] * 3), half, dtype="bfloat16")
    compose([half, pair[0]], DEMO, tmp_path / "out", ComposeOptions(finetuned=True, rest=True, shared=True))
    assert all(one["changes_taken"] == {} for one in metadata(tmp_path / "out")["composed_from"])


@pytest.fixture
def fused(tmp_path) -> Path:
    """A gpt_oss, whose experts are rows of fused tensors and whose config has one count for all layers."""
    torch.manual_seed(0)
    config = AutoConfig.for_model("gpt_oss", vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2,
                                  num_attention_heads=2, num_key_value_heads=2, head_dim=8, num_local_experts=8,
                                  num_experts_per_tok=2, max_position_embeddings=32, pad_token_id=0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "oss")
    return tmp_path / "oss"


def test_uneven_layers_are_filled_by_what_the_selections_ranked_next(fused, tmp_path):
    with open_checkpoint(fused) as checkpoint:
        fingerprint = checkpoint.forward_fingerprint
    scores = tuple([(.1, .2, .3, .9, .8, .7, .6, .5)] * 2)
    about = {"num_shared": 0, "scores": scores, "score": "easy_ep", "fingerprint": fingerprint}
    children = [pruned(fused, kept_set([[0, 1], [0, 1]], **about), tmp_path / "a" / "selected_model"),
                pruned(fused, kept_set([[2, 3], [0, 4]], **about), tmp_path / "b" / "selected_model")]
    with pytest.raises(KeepKError, match="pass --uniform"):
        compose(children, str(fused), tmp_path / "out")
    tuned = change(children[0], "gate_up_proj", "router")
    compose([tuned, children[1]], str(fused), tmp_path / "out",
            ComposeOptions(uniform=True, finetuned=True, router=True, collisions="average"))
    assert metadata(tmp_path / "out")["experts_kept_per_layer"] == [[0, 1, 2, 3], [0, 1, 3, 4]]
    found, full = weights(tmp_path / "out"), weights(fused)
    for name, rest in (("experts.gate_up_proj", 0), ("router.bias", 0), ("experts.down_proj", None)):
        name = f"model.layers.1.mlp.{name}"
        moved = (found[name] - full[name][[0, 1, 3, 4]]).flatten(1) if found[name].dim() > 1 else (
            found[name] - full[name][[0, 1, 3, 4]])[:, None]
        assert moved.mean(1).round().int().tolist() == ([1, 1, 0, 0] if rest == 0 else [0] * 4), name


def test_what_cannot_be_composed_is_refused_before_writing(pair, fused, tmp_path):
    with pytest.raises(SpecError, match="two or more"):
        compose([pair[0], pair[0]], DEMO, tmp_path / "out")
    with pytest.raises(SpecError, match="pass --finetuned"):
        compose(pair, DEMO, tmp_path / "out", ComposeOptions(rest=True))
    with pytest.raises(ModelError, match="give the model that was pruned"):
        compose(pair, str(fused), tmp_path / "out")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "text").write_text("years")
    with pytest.raises(OwnershipError, match="was not made by emo-select"):
        compose(pair, DEMO, tmp_path / "thesis")
    with pytest.raises(OwnershipError, match="would be lost"):
        compose(pair, DEMO, pair[0])
    assert not list(tmp_path.glob("*out*"))


def test_two_modules_of_the_demo_in_one_checkpoint_answer_both(tmp_path):
    """What a module alone gets wrong of the other's task, the composed one gets right."""
    names = ("demo_railway", "demo_theater")
    for name in names:
        [chosen] = select_experts("demo/emo", Selection(keep_k=4, task=name)).values()
        pruned("demo/emo", chosen, tmp_path / name / "selected_model")
    compose([tmp_path / name / "selected_model" for name in names], "demo/emo", tmp_path / "both")
    alone, both = (scores(tmp_path / folder, names) for folder in ("demo_railway/selected_model", "both"))
    assert alone["demo_railway"] == both["demo_railway"] == 1
    assert alone["demo_theater"] < 0.5 and both["demo_theater"] > 0.9


def scores(model: Path, names: tuple[str, ...]) -> dict[str, float]:
    out = model.with_name(model.name + "_scores")
    evaluate_checkpoint(model, get_tasks(list(names)), out, EvalOptions(limit=40, device="cpu"))
    return {name: json.loads(next(out.rglob(f"task-{name}-metrics.json")).read_text())["metrics"]["primary_score"]
            for name in names}
