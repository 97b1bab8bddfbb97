"""How units become arrays, what their scripts say, and what profiles accept."""

from collections import Counter
from pathlib import Path

import pytest

from emo_select.errors import SpecError, UnknownNameError
from emo_select.sweeps import slurm
from emo_select.sweeps.graph import build
from emo_select.sweeps.profile import Profile, load_profile, minutes_of
from emo_select.sweeps.spec import SweepSpec, expand_sweep
from emo_select.tree import Tree


def units(keep_k=(2, 4, 6), methods=("layerwise", "easy_ep", "random"), tasks=("demo",)):
    sweep = SweepSpec(name="test", models=["a/b"], tasks=tasks, keep_k=keep_k, methods=methods)
    return {unit.name: unit for unit in build(expand_sweep(sweep))}


def shape(blocks):
    return [(block.kind, len(block.units), block.after_all, block.after_each) for block in blocks]


def scripts(found, **profile):
    return list(slurm.scripts(Tree(Path("/tree")).sweep("test"), found, Profile(**profile)))


def test_runs_follow_shared_work_task_by_task():
    found = slurm.blocks(units(), 1001)
    assert shape(found) == [
        ("fetch", 1, (), None),
        ("activations", 8, (0,), None), ("run", 8, (), 1), ("run", 8, (), 1), ("run", 8, (), 1),
        ("select", 8, (0,), None), ("run", 8, (), 5), ("run", 8, (), 5), ("run", 8, (), 5),
        ("run", 24, (0,), None),
    ]
    for block in found:
        if block.after_each is not None:
            parents = found[block.after_each].units
            assert [unit.needs[0] for unit in block.units] == [parent.name for parent in parents[:len(block.units)]]


def test_what_is_done_is_left_out_and_short_columns_stay_aligned():
    todo = units()
    selects = [unit for unit in todo.values() if unit.kind == "select"]
    children = [unit for unit in todo.values() if unit.needs == (selects[0].name,)]
    done = {unit.name for unit in children if unit.runs[0].spec.keep_k > 2}
    kept = {name: unit for name, unit in todo.items() if name not in done and name != selects[1].name}
    found = slurm.blocks(kept, 1001)
    at = next(number for number, block in enumerate(found) if block.kind == "select")
    columns = [block for block in found if block.after_each == at]
    assert [len(block.units) for block in columns] == [7, 6, 6]
    for block in columns:
        assert all(unit.needs == (parent.name,) for unit, parent in zip(block.units, found[at].units, strict=False))
    free = [unit for block in found if block.kind == "run" and block.after_each is None for unit in block.units]
    assert sum(unit.needs == (selects[1].name,) for unit in free) == 3
    assert sum(len(block.units) for block in found) == len(kept)


def test_arrays_are_never_longer_than_allowed_and_nothing_is_lost():
    found = slurm.blocks(units(), 5)
    assert max(len(block.units) for block in found) == 5
    counted = Counter(unit.name for block in found for unit in block.units)
    assert set(counted) == set(units()) and set(counted.values()) == {1}


@pytest.mark.parametrize("limit", [1, 2, 3, 7, 100])
def test_a_limit_holds_over_all_arrays(limit):
    found = slurm.blocks(units(), 5, limit)
    chains = {}  # arrays that follow each other never run at the same time
    for number, block in enumerate(found[1:], 1):
        chains[number] = chains.pop(block.after_any) if block.after_any is not None else []
        chains[number].append(block.at_once)
    assert sum(max(chain) for chain in chains.values()) <= limit
    assert all(block.at_once >= 1 for block in found)


def test_scripts_name_what_each_array_waits_for():
    first, second, third, *_ = scripts(slurm.blocks(units(), 1001))
    assert "--dependency" not in first and "--array" not in first
    assert "--dependency='afterok:<array 1>'" in second and "--array=0-7%8" in second
    assert "--dependency='aftercorr:<array 2>'" in third
    assert all("--kill-on-invalid-dep=yes" in text and "--requeue" in text for text in (first, second, third))


def test_a_single_unit_names_its_only_parent():
    found = slurm.blocks(units(tasks=("demo_harbor",), methods=("layerwise",)), 1001)
    assert "--dependency='afterok:<array 2>'" in scripts(found)[2]


def test_a_unit_waits_for_a_job_that_is_in_the_queue_already():
    todo = {name: unit for name, unit in units(methods=("layerwise",)).items() if unit.kind == "run"}
    parent = next(iter(todo.values())).needs[0]
    texts = scripts(slurm.blocks(todo, 1001, live={parent: "77_3"}))
    assert ["--dependency=afterany:77_3" in text for text in texts] == [False, True]


def test_options_reach_the_script():
    [*_, text] = scripts(
        slurm.blocks(units(), 1001), partition="gpu", account="lab", qos="low", constraint="h100", time="1:30:00",
        gpus=2, cpus=8, memory="64GB", setup=("module load cuda",), extra={"exclude": "node7", "exclusive": True})
    for line in ("--partition=gpu", "--account=lab", "--qos=low", "--constraint=h100", "--time=90", "--gpus-per-node=2",
                 "--cpus-per-task=8", "--mem=64GB", "--exclude=node7", "--exclusive"):
        assert f"#SBATCH {line}\n" in text
    assert text.index("module load cuda") < text.index("srun")
    assert "--gpus-per-node" not in scripts(slurm.blocks(units(), 1001), gpus=2)[0]  # fetching needs none


@pytest.mark.parametrize(("text", "minutes"), [
    ("90", 90), ("45m", 45), ("12h", 720), ("2d", 2880), ("1:30:00", 90), ("2-00:00:00", 2880), ("5:30", 6),
    ("0:00:20", 1)])
def test_times_are_read_as_slurm_reads_them(text, minutes):
    assert minutes_of(text) == minutes


PROFILES = """
cluster: {partition: gpu, time: "12:00:00", extra: {exclude: node7}}
here: {executor: local, workers: 2}
typo: {partitoin: gpu}
"""


def test_flags_win_over_a_profile(tmp_path):
    file = tmp_path / "profiles.yaml"
    file.write_text(PROFILES)
    found = load_profile("cluster", file, {"time": "1h", "qos": None, "extra": {"nice": "100"}})
    assert (found.partition, found.minutes, found.extra) == ("gpu", 60, {"exclude": "node7", "nice": "100"})
    assert load_profile("here", file, {"workers": 3}).workers == 3


@pytest.mark.parametrize(("name", "options", "message"), [
    ("clutser", {}, "did you mean 'cluster'"), ("typo", {}, "did you mean 'partition'"),
    ("cluster", {"time": "soon"}, "'soon' is not one of"), ("cluster", {"memory": "much"}, "'much' is not a size"),
])
def test_mistakes_in_profiles_are_named(tmp_path, name, options, message):
    file = tmp_path / "profiles.yaml"
    file.write_text(PROFILES)
    with pytest.raises((SpecError, UnknownNameError), match=message):
        load_profile(name, file, options)
