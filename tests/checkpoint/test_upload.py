"""What `hf upload` would send of a model of ours: all of it, with its card, and nothing of this machine."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi, metadata_load
from transformers import AutoTokenizer

import emo_select
from emo_select.checkpoint.sources import name_of, passed_on
from emo_select.experts.keepset import KeepSet
from emo_select.experts.prune import prune_checkpoint
from emo_select.finetune.examples import from_lists
from emo_select.finetune.merge import MergeOptions, merge_back
from emo_select.finetune.run import finetune_tokens
from emo_select.models import load_model
from emo_select.spec import Execution, Lora, Training

EMO = Path(emo_select.__file__).parent / "demo" / "models" / "emo"
MACHINE = Execution(device="cpu", micro_batch_size=4, gradient_checkpointing=False)


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Hub itself is asked whether a card's head is valid; the rest of an upload is prepared here."""
    monkeypatch.setattr(HfApi, "_validate_yaml", lambda *_, **__: None)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A pruned model, finetuned ones, and an adapter, all made from a model that was given by its path."""
    root = tmp_path_factory.mktemp("place-on-this-machine")
    source = shutil.copytree(EMO, root / "my-model")
    keep = KeepSet(experts=tuple((*range(7), 31) for _ in range(3)), method="layerwise", keep_k=8, num_shared=1,
                   model=str(source), task="demo_railway", split="validation")
    prune_checkpoint(source, keep, root / "run" / "selected_model")
    rows = [{"input_ids": [5, 6, 7, 8, 9 + row], "labels": [-100, -100, 7, 8, 9 + row]} for row in range(8)]
    for name, lora in {"tuned": None, "merged": Lora(rank=2, merge=True), "adapter": Lora(rank=2)}.items():
        finetune_tokens(root / "run" / "selected_model", from_lists(rows), root / name,
                        Training(epochs=1, batch_size=4, learning_rate="1e-3", lora=lora), MACHINE, pad_token=1)
    merge_back(root / "tuned" / "checkpoint-2", str(source), root / "put_back", MergeOptions(router=True))
    return {"put_back": root / "put_back", "pruned": root / "run" / "selected_model",
            "start": root / "tuned" / "checkpoint-0",
            **{name: root / name / "checkpoint-2" for name in ("tuned", "merged", "adapter")}}


def uploaded(folder: Path) -> dict[str, bytes]:
    """Path → content of all that huggingface_hub would send."""
    additions = HfApi()._prepare_upload_folder_additions(folder, path_in_repo="")
    return {addition.path_in_repo: Path(addition.path_or_fileobj).read_bytes() for addition in additions}


@pytest.mark.parametrize("name", ["pruned", "start", "tuned", "merged", "adapter", "put_back"])
def test_an_upload_is_whole_and_says_nothing_about_this_machine(folders: dict[str, Path], name: str) -> None:
    sent = uploaded(folders[name])
    weights = {"adapter": "adapter_model.safetensors"}.get(name, "model.safetensors")
    settings = {"adapter": "adapter_config.json"}.get(name, "config.json")
    assert sent.keys() >= {"README.md", weights, settings, "tokenizer.json", "tokenizer_config.json"}
    for path, content in sent.items():
        assert b"place-on-this-machine" not in content and str(Path.home()).encode() not in content, path
    card: Any = metadata_load(folders[name] / "README.md")
    assert card["license"] == "apache-2.0"
    assert "base_model" not in card  # it was a folder, not an id
    assert "my-model" in sent["README.md"].decode() or name == "put_back"


@pytest.mark.parametrize("name", ["pruned", "start", "tuned", "merged"])
def test_what_was_sent_is_the_same_model_elsewhere(folders: dict[str, Path], tmp_path: Path, name: str) -> None:
    for path, content in uploaded(folders[name]).items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(content)
    ids = torch.tensor([AutoTokenizer.from_pretrained(tmp_path)("Question: What?")["input_ids"]])
    with torch.no_grad():
        here, there = (load_model(str(folder))(ids).logits for folder in (folders[name], tmp_path))
    assert here.equal(there)


def test_names_that_travel(tmp_path: Path) -> None:
    assert passed_on("allenai/Emo@v1") == "allenai/Emo@v1"
    assert passed_on("demo/emo") == "demo/emo"
    assert passed_on("models/emo") == "models/emo"
    assert passed_on("/data/of/somebody/emo") == "emo"
    assert passed_on("~/models/emo") == "emo"
    assert name_of(tmp_path / "models--allenai--Emo" / "snapshots" / "x") == "allenai/Emo"
    assert passed_on("/tree/run/finetuned_model/checkpoint-4") == "checkpoint-4 of run"
    assert passed_on("/selected_model") == "selected_model"


def test_an_adapter_says_which_model_it_is_for_by_the_way_from_it(folders: dict[str, Path]) -> None:
    for folder, way in ((folders["adapter"], "../checkpoint-0"), (folders["merged"] / "adapter", "../../checkpoint-0")):
        told = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
        assert told == way and (folder / told / "config.json").is_file()
