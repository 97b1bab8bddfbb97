"""Where the files of a run tree lie."""

import pytest

from emo_select.errors import SpecError
from emo_select.spec import RunSpec
from emo_select.tree import Tree


def test_a_root_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SpecError, match="--output-dir"):
        Tree(tmp_path / "file").require_writable()


def test_runs_are_found_by_name(tmp_path):
    spec = RunSpec(model="demo/emo", task="t", keep_k=4)
    found = Tree(tmp_path)
    found.run(spec).directory.mkdir(parents=True)
    found.activations(spec).mkdir(parents=True)
    assert [paths.directory for paths in found.runs()] == [tmp_path / "demoemo" / spec.directory_name]
    assert [path.directory.name for path in found.runs("demoemo")] == [spec.directory_name]
    assert list(found.runs("other")) == []


def test_checkpoints_are_numbered_folders_only(tmp_path):
    paths = Tree(tmp_path).run(RunSpec(model="m", task="t", keep_k=4))
    for name in ("checkpoint-0", "checkpoint-12", "checkpoint-3", "checkpoint-final"):
        paths.finetuned_model.joinpath(name).mkdir(parents=True)
    (paths.finetuned_model / "checkpoint-99").touch()
    assert paths.checkpoint_steps() == [0, 3, 12]
