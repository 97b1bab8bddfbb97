"""Checkpoints that training starts from or goes on from: found, checked, and read before the engine touches them."""

from __future__ import annotations

import re
from pathlib import Path

from emo_select.convert.dcp import TrainingTensors
from emo_select.convert.pickles import check_pickle
from emo_select.errors import CheckpointError
from emo_select.pretrain.recipe import Recipe
from emo_select.pretrain.run import Started
from emo_select.storage import discard
from emo_select.textfile import read_json_object

STEP, SAVED = re.compile(r"step(\d+)"), re.compile(r"step\d+(-tmp)?")
LAST_FILES = (".metadata.json", "config.json", "data_paths.txt")
RATE = "optim.param_groups.embeddings.weight.lr"


def saved_steps(out: Path) -> list[int]:
    """Steps of the complete checkpoints in a run, ascending."""
    found = (STEP.fullmatch(path.name) for path in out.iterdir()) if out.is_dir() else ()
    return sorted(int(match[1]) for match in found if match and (out / match[0] / ".metadata.json").is_file())


def tidy(out: Path, last: int) -> None:
    """Remove what a killed run left in `out`: checkpoints half written or half removed.

    When step `last`, its end, is saved, temporary checkpoints go, too.
    """
    saved = [path for path in out.iterdir() if SAVED.fullmatch(path.name)]
    finished = (out / f"step{last}").is_dir() and _is_whole(out / f"step{last}")
    for path in saved:
        if not _is_whole(path) or (finished and path.name != f"step{last}" and _is_temporary(path)):
            discard(path)
    for left in out.glob(".step*.old"):
        discard(left.with_name(left.stem.lstrip(".")))
    for left in out.glob("cache/*.tmp"):  # the engine's, of instance numbers
        left.unlink()


def _is_whole(folder: Path) -> bool:
    """Whether all of it was written: the configuration and the names of the data files come last."""
    return STEP.fullmatch(folder.name) is not None and all((folder / name).is_file() for name in LAST_FILES)


def _is_temporary(folder: Path) -> bool:
    return bool(read_json_object(folder / ".metadata.json").get("ephemeral"))


def check(folder: Path) -> None:
    """Refuse a damaged checkpoint, and pickles that name anything but what a checkpoint holds.

    The engine reads pickles freely, so this comes first. Raises `CheckpointError`.
    """
    state = folder / "model_and_optim"
    check_pickle(state / ".metadata")
    tensors = TrainingTensors(state)
    tensors.check(tensors.tensors)
    tensors.check_pickles()
    for path in sorted((folder / "train").glob("rank*.pt")):
        check_pickle(path)


def step_folder(path: Path) -> Path:
    """A checkpoint: the folder itself, or the last step of a run."""
    if (path / "model_and_optim").is_dir():
        return path
    steps = saved_steps(path)
    if not steps:
        raise CheckpointError(f"{path} holds no training checkpoint (step<N>/model_and_optim); a released model "
                              "becomes one by `emo-select convert MODEL --to olmo-core --out DIR`.")
    return path / f"step{steps[-1]}"


def describe(path: Path, recipe: Recipe, same_data: bool) -> Started:
    """What annealing from a checkpoint starts with. Raises `CheckpointError` where the model is another."""
    folder = step_folder(path)
    check(folder)
    _require_shapes(folder, recipe)
    optimiser = any(name.startswith("optim.state.") for name in TrainingTensors(folder / "model_and_optim").tensors)
    trained = (folder / "train" / "rank0.pt").is_file()
    return Started(checkpoint=str(folder.resolve()), step=_step(folder) if trained else 0,
                   rate=_rate(folder) if optimiser else None, optimiser=optimiser, same_data=same_data and trained)


def _require_shapes(folder: Path, recipe: Recipe) -> None:
    from emo_select.pretrain.engine.model import transformer

    stored = TrainingTensors(folder / "model_and_optim").tensors
    for name, parameter in transformer(recipe).build(init_device="meta").named_parameters():
        entry = stored.get(f"model.{name}")
        if entry is None or tuple(entry.shape) != tuple(parameter.shape):
            found = "is missing" if entry is None else f"has shape {tuple(entry.shape)}"
            raise CheckpointError(f"{folder} is not of recipe {recipe.name}: {name} {found}, not "
                                  f"{tuple(parameter.shape)}.")


def _step(folder: Path) -> int:
    """The step in train/rank0.pt, whose pickle has been checked."""
    import torch

    return int(torch.load(folder / "train" / "rank0.pt", weights_only=False, map_location="cpu")["global_step"])


def _rate(folder: Path) -> float | None:
    """The rate of the checkpoint's last step, as it is stored for the embedding."""
    tensors = TrainingTensors(folder / "model_and_optim")
    if RATE in tensors.values:
        return float(tensors.read_value(RATE))
    return float(tensors.read(RATE)) if RATE in tensors.tensors else None
