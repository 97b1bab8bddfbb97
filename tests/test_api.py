"""The Python API as a notebook uses it: scores come back, trees become frames, models may be in memory."""

import subprocess
import sys

import pytest

import emo_select
from emo_select import Execution, RunSpec, Selection, load_tree, prune_checkpoint, run, select_experts
from emo_select.errors import KeepKError, SpecError
from emo_select.models import load_model, load_tokenizer

SPEC = RunSpec(model="demo/emo", task="demo_railway", keep_k="25%", method="random",
               training={"batch_size": 64}, evaluation={"limit": 10})


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    root = tmp_path_factory.mktemp("tree")
    return root, run(SPEC, root, execution=Execution(device="cpu"))


def test_run_returns_scores(done):
    root, result = done
    assert result.directory == root / "demoemo" / SPEC.directory_name
    assert [score.checkpoint for score in result.scores] == [0, 2]
    first = result.scores[0]
    assert (first.task, first.documents) == ("demo_railway", 10)
    assert 0 <= first.value <= 1 and first.error is not None and first.metrics["primary_score"] == first.value
    assert "(n = 10)" in str(first) and " ± " in str(first) and first.metric in str(first)
    assert set(result.stages) >= {"select", "prune", "finetune"}


def test_a_tree_becomes_a_frame(done):
    root, result = done
    frame = load_tree(root).to_pandas()
    assert list(frame["checkpoint"]) == [0, 2]
    assert set(frame["keep_k"]) == {8} and set(frame["method"]) == {"random"} and set(frame["documents"]) == {10}
    assert list(frame["score"]) == [score.value for score in result.scores]
    assert list(frame["error"]) == [score.error for score in result.scores]


@pytest.mark.parametrize("method", ["layerwise", "reap", "random"])
def test_a_model_in_memory_gives_the_experts_of_the_same_model_on_disk(method):
    wanted = Selection(keep_k=["25%", 4, "full"], task="demo_railway", method=method,
                       calibration={"num_examples": 8})
    model = load_model("demo/emo", dtype="bfloat16")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    in_memory = select_experts(model, wanted, tokenizer=load_tokenizer("demo/emo"))
    on_disk = select_experts("demo/emo", wanted)
    assert list(in_memory) == [8, 4, 32]
    assert {k: found.experts for k, found in in_memory.items()} == {k: found.experts for k, found in on_disk.items()}
    assert all((value == before[name]).all() for name, value in model.state_dict().items())


def test_its_tokenizer_is_looked_for_where_the_model_came_from():
    model = load_model("demo/emo")
    chosen = select_experts(model, Selection(keep_k=4, task="demo_railway", calibration={"num_examples": 4}))
    assert chosen[4].keep_k == 4
    model.config.name_or_path = ""
    with pytest.raises(SpecError, match="tokenizer="):
        select_experts(model, Selection(keep_k=4, task="demo_railway"))


@pytest.mark.parametrize(("call", "said"), [
    (lambda: Selection(keep_ks=4), r"did you mean 'keep_k'"),
    (lambda: Selection(keep_k=4, tasks="demo"), r"did you mean 'task'"),
    (lambda: select_experts("demo/emo", Selection(keep_k=4), outdir="x"),
     r"select_experts\(\) has no 'outdir'; did you mean 'out_dir'"),
    (lambda: run(SPEC, outputdir="x"), "did you mean 'output_dir'"),
    (lambda: prune_checkpoint("demo/emo", None, None, dtyp="x"), "did you mean 'dtype'"),
    (lambda: load_tree(rot="x"), "did you mean 'root'"),
    (lambda: Execution(devise="cpu"), "did you mean 'device'"),
])
def test_wrong_keywords_name_the_near_match(call, said):
    with pytest.raises(SpecError, match=said):
        call()


def test_a_keep_k_that_cannot_be_kept_is_refused():
    with pytest.raises(KeepKError, match="Cannot keep 40"):
        select_experts("demo/emo", Selection(keep_k=40, task="demo_railway"))


def test_the_names_are_shown_and_cost_no_torch():
    code = "import sys, emo_select; names = dir(emo_select); assert 'torch' not in sys.modules; print(*names)"
    shown = subprocess.check_output([sys.executable, "-c", code], text=True).split()
    assert set(emo_select.__all__) <= set(shown)
