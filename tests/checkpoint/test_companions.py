"""What belongs to a checkpoint is carried along, from subfolders, too; links out of it are refused by name."""

from pathlib import Path

import pytest

from emo_select.checkpoint.companions import companions, copy_companions
from emo_select.errors import CheckpointError

OWN = {"config.json", "tokenizer.json", "chat_template.jinja", "additional_chat_templates/tools.jinja", "README.md",
       "assets/spm/source.spm", "assets/notes.txt", "LICENSE", "modeling_own.py", "vocab"}
OTHER = {"model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "trainer_state.json", ".hidden.json",
         ".git/config.json", "checkpoint-5/config.json", "adapter/adapter_config.json",
         "adapter/adapter_model.safetensors", "pruned/.emo-select.json", "pruned/config.json", "picture.png"}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    for name in OWN | OTHER:
        path = tmp_path / "model" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return tmp_path / "model"


def test_what_belongs_to_it(model, tmp_path):
    assert set(map(str, companions(model))) == OWN
    copy_companions(model, tmp_path / "copy", without=frozenset({"config.json"}))
    copied = {str(path.relative_to(tmp_path / "copy")): path.read_text()
              for path in (tmp_path / "copy").rglob("*") if path.is_file()}
    assert copied == {name: name for name in OWN - {"config.json"}}


@pytest.mark.parametrize("name", ["vocab.txt", "additional_chat_templates/secret.jinja"])
def test_links_out_of_it_are_refused_by_name(model, tmp_path, name):
    (tmp_path / "secret").write_text("password")
    (model / name).symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match=f"{name} is a symbolic link to .*secret"):
        companions(model)
    (model / name).unlink()
    (model / name).symlink_to(model / "tokenizer.json")
    assert Path(name) in companions(model)


def test_the_hub_s_cache_may_link_to_its_own_blobs(tmp_path):
    home = tmp_path / "models--a--b"
    (home / "blobs").mkdir(parents=True)
    (home / "blobs" / "abc").write_text("{}")
    (home / "snapshots" / "main").mkdir(parents=True)
    (home / "snapshots" / "main" / "config.json").symlink_to("../../blobs/abc")
    assert companions(home / "snapshots" / "main") == [Path("config.json")]
    (tmp_path / "models--c--d" / "blobs").mkdir(parents=True)
    (tmp_path / "models--c--d" / "blobs" / "abc").write_text("{}")
    (home / "snapshots" / "main" / "other.json").symlink_to(tmp_path / "models--c--d" / "blobs" / "abc")
    with pytest.raises(CheckpointError, match=r"other\.json is a symbolic link"):
        companions(home / "snapshots" / "main")
