"""Damaged files end in one of our sentences: no traceback, no hang, and no number that changed in silence.

Every example damages one file of a small checkpoint, task, sweep or run: bytes flipped, cut or doubled, a JSON value
replaced by another. Reading it again must raise an `EmoSelectError`, or give exactly what the undamaged file gives.
"""

import copy
import json
import shutil
import signal
from contextlib import contextmanager

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from emo_select import record
from emo_select.checkpoint import open_checkpoint, resolve
from emo_select.errors import EmoSelectError
from emo_select.experts.keepset import KeepSet, check_keep_set, keep_everything
from emo_select.models.families import always_active_per_layer, experts_per_layer, top_k
from emo_select.models.preflight import check_weights
from emo_select.spec import RunSpec
from emo_select.sweeps.spec import expand_sweep, read_sweep
from emo_select.tasks.userfile import load_task_file
from emo_select.tree import RunPaths

SECONDS = 5  # for what takes milliseconds
FUZZ = settings(max_examples=120, deadline=None, derandomize=True, database=None,
                suppress_health_check=list(HealthCheck))
ODD = st.sampled_from([
    None, True, False, 0, -1, 1, 2, 7, 31, 33, 10**9, 2**63, 2**64, 1e308, -0.5, float("nan"), float("inf"), "", "x",
    "3", "..", "/etc/passwd", "../model.safetensors", "\x00", "\ud800", "é" * 10, [], [1], ["a", None], {}, {"a": 1},
    [[[]]], "a" * 1000, "2024-02-30",
])


@contextmanager
def time_limit():
    """Fail what takes far longer than it may."""
    def late(*_):
        raise AssertionError(f"took more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def places(value, at=()):
    """Every place in a JSON value, as keys and indices from the outside in."""
    yield at
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in list(items)[:40]:
        yield from places(item, (*at, key))


@st.composite
def damaged_bytes(draw, data):
    """A few bytes changed, a piece cut out or doubled, or an end cut off."""
    changed = bytearray(data)
    for _ in range(draw(st.integers(1, 3))):
        at, size = draw(st.integers(0, max(0, len(changed) - 1))), draw(st.integers(1, 40))
        kind = draw(st.sampled_from(["flip", "cut", "double", "end"]))
        if kind == "flip" and changed:
            changed[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "cut":
            del changed[at:at + size]
        elif kind == "double":
            changed[at:at] = changed[at:at + size]
        else:
            del changed[at:]
    return bytes(changed)


@st.composite
def damaged_json(draw, data):
    """A value somewhere replaced by an odd one, removed, or given under another name."""
    value = copy.deepcopy(data)
    *path, last = draw(st.sampled_from([place for place in places(data) if place]))
    inner = value
    for step in path:
        inner = inner[step]
    kind = draw(st.sampled_from(["replace", "replace", "remove", "rename"]))
    if kind == "replace":
        inner[last] = draw(ODD)
    elif kind == "rename" and isinstance(inner, dict):
        inner[f"{last}_"] = inner.pop(last)
    else:
        del inner[last]
    return value


def outcome(read):
    """What reading gives, or the sentence of ours that it ends in; anything else fails the test."""
    try:
        with time_limit():
            return read()
    except EmoSelectError as error:
        assert str(error) and "\n" not in str(error).strip()
        return None


# ---- checkpoints


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz") / "model"
    shutil.copytree(resolve("demo/emo"), folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps(
        {"weight_map": dict.fromkeys(open_checkpoint(folder).tensors, "all.safetensors")}))
    (folder / "model.safetensors").rename(folder / "all.safetensors")
    return folder


def meaning(folder):
    """All that decides numbers: the configuration, and where every weight lies."""
    with open_checkpoint(folder) as checkpoint:
        check_weights(checkpoint)
        return {"config": checkpoint.config, "tensors": dict(checkpoint.tensors), "top_k": top_k(checkpoint.config),
                "experts": experts_per_layer(checkpoint.config), "active": always_active_per_layer(checkpoint.config)}


@contextmanager
def damaged(path, data):
    """The file with other content for a while."""
    before = path.read_bytes()
    path.write_bytes(data)
    try:
        yield
    finally:
        path.write_bytes(before)


@FUZZ
@given(st.data())
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_bytes_of_json_files(name, model, data):
    whole = meaning(model)
    with damaged(model / name, data.draw(damaged_bytes((model / name).read_bytes()))):
        found = outcome(lambda: meaning(model))
    require_same(found, whole)


@FUZZ
@given(st.data())
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_values_of_json_files(name, model, data):
    whole = meaning(model)
    changed = data.draw(damaged_json(json.loads((model / name).read_text())))
    with damaged(model / name, json.dumps(changed).encode()):
        found = outcome(lambda: meaning(model))
    require_same(found, whole)


# What a checkpoint of this architecture is made of beyond its weights' shapes: settings that any value may be true of.
FREE = {"architectures", "auto_map", "transformers_version", "torch_dtype", "dtype", "use_cache", "initializer_range",
        "pad_token_id", "bos_token_id", "eos_token_id", "output_router_logits", "router_aux_loss_coef", "model_type",
        "max_position_embeddings", "rms_norm_eps", "rope_theta", "rope_scaling", "rope_parameters", "hidden_act",
        "attention_bias", "attention_dropout", "norm_topk_prob", "num_experts_per_tok", "num_shared_experts",
        "always_active_experts", "always_active_experts_per_layer", "num_experts_per_layer", "dense_mlp_bias",
        "num_shared_experts_per_layer", "dense_intermediate_size", "tie_word_embeddings"}


def require_same(found, whole):
    """Weights are where they were, and sizes what they were; other settings are the user's own."""
    if found is None:
        return
    assert found["tensors"] == whole["tensors"]
    for key in whole["config"].keys() - FREE:
        assert found["config"].get(key, whole["config"][key]) == whole["config"][key], key


@FUZZ
@given(st.data())
def test_headers_of_weights(model, data):
    path = model / "all.safetensors"
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    whole = meaning(model)
    with damaged(path, data.draw(damaged_bytes(content[:end])) + content[end:]):
        found = outcome(lambda: meaning(model))
    if found is not None:  # a name that is metadata, or white space
        assert found["tensors"] == whole["tensors"]


# ---- tasks and sweeps

TASK = {"name": "mine", "kind": "multiple_choice", "data": "rows.jsonl",
        "splits": {"train": 0.5, "validation": 0.25, "test": 0.25}, "text": "{{q}} Answer:", "choices": "options",
        "gold": "{{gold}}", "shots": 1, "id": "id"}
ROWS = [{"q": f"question {i}", "options": ["a", "b"], "gold": i % 2, "id": f"n{i}"} for i in range(8)]
SWEEP = {"name": "test", "models": ["demo/emo", {"id": "demo/stdmoe"}], "tasks": ["demo_harbor", "demo_railway"],
         "keep_k": [4, "50%", "full"], "methods": ["layerwise", "random"],
         "settings": {"training": {"epochs": 1, "learning_rate": "1e-3"}, "calibration": {"num_examples": 5}},
         "exclude": [{"method": "random", "keep_k": 4}]}


def requests(folder):
    """Everything that a model is asked by a task."""
    task = load_task_file(folder / "task.yaml")
    return [(doc["native_id"], task.requests(doc), task.answer(doc)) for doc in task.docs("test")]


@pytest.fixture
def task(tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "task.yaml").write_text(yaml.safe_dump(TASK))
    return tmp_path


@FUZZ
@given(st.data())
def test_task_files(task, data):
    changed = data.draw(damaged_json(TASK))
    with damaged(task / "task.yaml", yaml.safe_dump(changed, allow_unicode=False).encode("utf-8", "replace")):
        outcome(lambda: requests(task))
    with damaged(task / "task.yaml", data.draw(damaged_bytes((task / "task.yaml").read_bytes()))):
        outcome(lambda: requests(task))


@FUZZ
@given(st.data())
def test_rows_of_tasks(task, data):
    changed = data.draw(damaged_json(ROWS))
    lines = "".join(json.dumps(row) + "\n" for row in changed)
    with damaged(task / "rows.jsonl", lines.encode()):
        outcome(lambda: requests(task))
    with damaged(task / "rows.jsonl", data.draw(damaged_bytes((task / "rows.jsonl").read_bytes()))):
        outcome(lambda: requests(task))


@FUZZ
@given(st.data())
def test_sweep_files(tmp_path, data):
    path = tmp_path / "sweep.yaml"
    changed = data.draw(damaged_json(SWEEP))
    path.write_bytes(yaml.safe_dump(changed).encode("utf-8", "replace"))
    outcome(lambda: expand_sweep(read_sweep(path)))
    path.write_bytes(data.draw(damaged_bytes(yaml.safe_dump(SWEEP).encode())))
    outcome(lambda: expand_sweep(read_sweep(path)))


# ---- what runs leave


@FUZZ
@given(st.data())
def test_selections(tmp_path, data):
    config = json.loads((resolve("demo/emo") / "config.json").read_text())
    whole, path = keep_everything(config), tmp_path / "selection.json"
    whole.save(path)

    def read():
        found = KeepSet.load(path)
        check_keep_set(config, found)
        return found

    for content in (json.dumps(data.draw(damaged_json(json.loads(path.read_text())))).encode(),
                    data.draw(damaged_bytes(path.read_bytes()))):
        with damaged(path, content):
            outcome(read)


@FUZZ
@given(st.data())
def test_run_records(tmp_path, data):
    paths = RunPaths(tmp_path)
    spec = RunSpec(model="demo/emo", task="demo_harbor", keep_k=4)
    done = record.RunRecord(spec=spec, stages={"select": record.StageRecord(fingerprint="x", started="", seconds=1)})
    record.save(paths, done)
    for content in (json.dumps(data.draw(damaged_json(json.loads(paths.record.read_text())))).encode(),
                    data.draw(damaged_bytes(paths.record.read_bytes()))):
        with damaged(paths.record, content):
            outcome(lambda: record.load(paths))
