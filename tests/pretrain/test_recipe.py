"""Recipes: the released models in every number that the facts state, built on the meta device, and a strict reader."""

from __future__ import annotations

import subprocess
import sys

import pytest

from emo_select.errors import SpecError, UnknownNameError
from emo_select.pretrain.recipe import Recipe, load_recipe, recipe_names

RELEASED = {
    "allenai/Emo_1b14b_1T": ("emo_1b14b_1t_emoanneal", 13_568_641_024, 11_920),
    "allenai/StdMoE_1b14b_1T": ("stdmoe_1b14b_1t_stdanneal", 13_568_641_024, 11_920),
    "allenai/StdMoE_1b14b_1T_Preanneal": ("stdmoe_1b14b_1t", 13_568_641_024, 238_419),
    "allenai/StdMoE_1b14b_1T_EmoAnnealed": ("stdmoe_1b14b_1t_emoanneal", 13_568_641_024, 11_920),
    "allenai/Emo_1b14b_130B": ("emo_1b14b_130b", 13_568_641_024, 30_995),
    "allenai/StdMoE_1b14b_130B": ("stdmoe_1b14b_130b", 13_568_641_024, 30_995),
    "allenai/StdMoE_1b4b_130B": ("stdmoe_1b4b_130b", 3_901_818_880, 30_995),
    "allenai/Dense_1b_130B": ("dense_1b_130b", 1_484_851_200, 30_995),
}


def test_every_released_model_has_a_recipe():
    released = {load_recipe(name).released_as: name for name in recipe_names()}
    assert {model: name for model, name in released.items() if model} == {
        model: name for model, (name, _, _) in RELEASED.items()}


@pytest.mark.parametrize("model", RELEASED)
def test_parameters_and_steps_are_the_published_ones(model):
    name, parameters, steps = RELEASED[model]
    recipe = load_recipe(name)
    assert (recipe.parameters, recipe.steps, recipe.batch_tokens) == (parameters, steps, 4_194_304)
    assert recipe.tokenizer.padded == 100_352


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_builds_with_its_parameter_count(name):
    pytest.importorskip("olmo_core", reason="needs the extra pretrain: pip install emo-select[pretrain]")
    from emo_select.pretrain.engine.model import optimizer, schedule, transformer
    from emo_select.pretrain.plan import parameters

    recipe = load_recipe(name)
    model = transformer(recipe).build(init_device="meta")
    built = sum(parameter.numel() for parameter in model.parameters())
    assert built == parameters(recipe)[0]
    if recipe.parameters is not None:
        assert built == recipe.parameters
    optimizer(recipe, fused=False)
    schedule(recipe)


def test_only_the_emo_scripts_mask_attention_between_documents():
    masked = {name for name in recipe_names() if load_recipe(name).data.mask_documents}
    assert masked == {name for name in recipe_names() if load_recipe(name).objective.pool} | {"laptop_1m_std"}


def test_the_dense_model_has_an_optimiser_of_its_own():
    dense, moe = load_recipe("dense_1b_130b").optimizer, load_recipe("emo_1b14b_130b").optimizer
    assert (dense.skip_spikes, dense.weight_decay) == (True, 0.033)
    assert (moe.skip_spikes, moe.weight_decay) == (False, 0.1)


def test_annealing_names_what_it_starts_from_and_goes_down_to_zero():
    for name in recipe_names():
        recipe = load_recipe(name)
        assert (recipe.schedule.shape == "linear") == (recipe.anneals is not None)
        if recipe.anneals:
            assert load_recipe(recipe.anneals).tokens == 10**12


def test_a_name_that_does_not_exist_is_told_with_the_near_ones():
    with pytest.raises(UnknownNameError, match="emo_1b14b_130b"):
        load_recipe("emo_1b14b_130")


@pytest.mark.parametrize(("changes", "says"), [
    ({"objective.pool.smallest": 6}, "at least the 7 routed experts"),
    ({"objective.pool.evaluation": 3}, "at least the 7 routed experts"),
    ({"objective.pool.smallest": 64, "objective.pool.largest": 32}, "smallest must not lie above largest"),
    ({"model.experts.top_k": 1}, "top_k must lie above shared"),
    ({"batch.micro_batch": 3}, "multiple of batch.micro_batch"),
    ({"batch.sequences": "1024"}, "batch.sequences: "),
    ({"model.heads": 3}, "does not split into 3 heads"),
    ({"tokenizer.eos_token_id": 100_278}, "must lie below vocab_size"),
    ({"optimizer.learning_rte": 1.0}, "optimizer.learning_rte: Extra inputs"),
    ({"batch.sequences": "many"}, "batch.sequences: "),
    ({"save.every": 50}, "temporary_every must lie below every"),
])
def test_what_cannot_work_is_one_sentence(changes, says):
    with pytest.raises(SpecError, match=says) as caught:
        load_recipe("emo_1b14b_130b", changes)
    assert "\n" not in str(caught.value)


def test_annealing_takes_at_least_one_whole_batch():
    with pytest.raises(SpecError, match="less than one batch"):
        load_recipe("emo_1b14b_1t_emoanneal", {"tokens": 10})


def test_a_file_of_ones_own_extends_a_shipped_recipe(tmp_path):
    (tmp_path / "mine.yaml").write_text("extends: laptop_1m\nname: mine\nobjective: {pool: {largest: 16}}\n")
    mine, shipped = load_recipe(str(tmp_path / "mine.yaml")), load_recipe("laptop_1m")
    assert mine.objective.pool is not None and mine.objective.pool.largest == 16
    assert mine.objective.pool.smallest == shipped.objective.pool.smallest
    assert Recipe.model_validate(mine.model_dump()) == mine


@pytest.mark.parametrize(("text", "says"), [
    ("a: [", "not valid YAML"), ("- 1", "keys and values"), ("extends: nothing", "Unknown recipe"),
    ("name: x", "tokens"),
])
def test_files_that_are_no_recipes_are_one_sentence(tmp_path, text, says):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises((SpecError, UnknownNameError), match=says):
        load_recipe(str(tmp_path / "bad.yaml"))


def test_reading_recipes_imports_neither_torch_nor_the_engine():
    code = ("import sys; from emo_select.pretrain.recipe import load_recipe; load_recipe('emo_1b14b_1t');"
            "sys.exit(bool({'torch', 'olmo_core'} & set(sys.modules)))")
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
