"""One pretraining run as a folder: what it is, whether it may go on, and the processes that carry it out.

    <out>/pretraining.json     the recipe, the data's fingerprint, the number of processes, where it started
    <out>/step<N>/             checkpoints in the published layout, complete once .metadata.json is there
    <out>/watch/               metrics.jsonl, loads.jsonl and plots
    <out>/.job/                how it is carried out; the engine's cache of instance numbers

Importing this imports no torch.
"""

from __future__ import annotations

import netrc
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict

from emo_select import ownership
from emo_select.demo import demo_path
from emo_select.errors import EmoSelectError, SpecError
from emo_select.pretrain.recipe import Recipe, Tokenizer
from emo_select.pretrain.tokens import TokenData, read_mix
from emo_select.storage import drop_unfinished, partial_directory, read_json, staged_directory, write_json

RECORD, SETTINGS, ERROR = "pretraining.json", ".job/settings.json", ".job/error.json"
RUN = "pretraining run"


class Started(BaseModel):
    """The training checkpoint that annealing starts from: its step, its last rate, and whether it has moments."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    checkpoint: str
    step: int
    rate: float | None
    optimiser: bool
    same_data: bool

    @property
    def first_step(self) -> int:
        """Steps that count as done: those of the checkpoint where its place in the data goes on, else none."""
        return self.step if self.same_data else 0


class RunRecord(BaseModel):
    """What a run is. The same command goes on only where all of it is the same."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    recipe: Recipe
    data_fingerprint: str
    processes: int
    started: Started | None = None


class RunSettings(BaseModel):
    """How a run is carried out; changes nothing of what is computed."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: str
    data_root: str | None = None
    tokenizer: str | None = None
    device: str = "auto"
    compile: bool = True
    threads: int = 1
    stop_at: int | None = None
    spike: float = 2.0
    tensorboard: bool = False
    wandb: str | None = None
    evaluate: bool = True


def with_tokenizer_of(recipe: Recipe, data: TokenData) -> Recipe:
    """The recipe as it is for this data: one that takes any tokenizer takes the data's."""
    if not recipe.any_tokenizer:
        return recipe
    pad = data.eos_token_id if data.pad_token_id is None else data.pad_token_id
    mine = Tokenizer(vocab_size=data.vocab_size, eos_token_id=data.eos_token_id, pad_token_id=pad,
                     identifier=data.tokenizer)
    return recipe.model_copy(update={"tokenizer": mine})


def check_data(recipe: Recipe, data: TokenData) -> None:
    """Raise `SpecError` where the tokens are not those that the model is made for."""
    tokenizer = recipe.tokenizer
    pairs = (("vocab_size", "vocabulary", data.vocab_size), ("eos_token_id", "EOS", data.eos_token_id),
             ("pad_token_id", "padding", data.pad_token_id))
    for key, name, found in pairs:
        wanted = getattr(tokenizer, key)
        if found is not None and found != wanted:
            raise SpecError(f"The data has another {name} ({found}) than the recipe ({wanted}); choose other data, or "
                            f"--set tokenizer.{key}={found}.")


def require_same(out: Path, now: RunRecord, *, other_ranks: bool = False) -> RunRecord:
    """The record of the run in `out`, made if the folder is free.

    Raises `SpecError` where the folder holds something else, or a run of another recipe, of other data, from another
    checkpoint or on another number of processes (unless `other_ranks`).
    """
    file = out / RECORD
    if not file.is_file():
        if out.exists() and {path.name for path in out.iterdir()} - {".job", partial_directory(file).name}:
            raise SpecError(f"{out} holds something else; choose another --out.")
        return now
    before = _read(file)
    _same_recipe(out, before.recipe, now.recipe)
    if before.data_fingerprint != now.data_fingerprint:
        raise SpecError(f"{out} was trained on other data (fingerprint {before.data_fingerprint[:12]}, now "
                        f"{now.data_fingerprint[:12]}); give the same --data, or choose another --out.")
    if before.started != now.started:
        raise SpecError(f"{out} started from another checkpoint; give the same --from, or choose another --out.")
    if before.processes != now.processes and not other_ranks:
        raise SpecError(
            f"{out} runs on {before.processes} processes; {now.processes} would change over how many sequences experts "
            f"are balanced, and so the loss: use --gpus {before.processes}, or --allow-other-ranks.")
    return now


def open_data(settings: RunSettings) -> TokenData:
    """The token files of the run, checked. Raises `TokenDataError`."""
    root = Path(settings.data_root) if settings.data_root else None
    return read_mix(Path(settings.data), root, settings.tokenizer)


def write_record(out: Path, record: RunRecord, settings: RunSettings) -> None:
    """Say in the folder what it is, first of all: by that it is known when this is interrupted. Then make it ours."""
    write_json(out / RECORD, record.model_dump(mode="json"))
    ownership.mark(out, RUN)
    write_json(out / SETTINGS, settings.model_dump())
    _keep_tokenizer(out, record.recipe.tokenizer.identifier)


def _keep_tokenizer(out: Path, identifier: str | None) -> None:
    """A tokenizer that is a folder is copied to where the converter looks first."""
    target = out / "tokenizer"
    if identifier is None:
        return
    if target.exists():
        drop_unfinished(target)
        return
    source = demo_path(identifier) if identifier.startswith("demo/") else Path(identifier)
    if not (source / "tokenizer.json").is_file():
        return
    with staged_directory(target, identifier) as folder:
        for path in source.iterdir():
            if path.is_file() and path.suffix != ".safetensors" and not path.name.startswith("."):
                shutil.copy(path, folder)


def give_wandb_its_key() -> None:
    """Put the key of W&B into WANDB_API_KEY, where alone the engine looks: from ~/.netrc, as `wandb login` leaves it.

    Raises `SpecError` where there is none and W&B is not offline.
    """
    if os.environ.get("WANDB_API_KEY"):
        return
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname or ""
    try:
        known = netrc.netrc(os.environ.get("NETRC")).authenticators(host)
    except (OSError, netrc.NetrcParseError):
        known = None
    if known is None and os.environ.get("WANDB_MODE") not in ("offline", "disabled"):
        raise SpecError(f"There is no key for W&B at {host}; run `wandb login`, or set WANDB_API_KEY or "
                        "WANDB_MODE=offline.")
    os.environ["WANDB_API_KEY"] = known[2] if known else "offline"


def read_record(out: Path) -> RunRecord:
    """The record of a run. Raises `SpecError` where there is none."""
    if not (out / RECORD).is_file():
        raise SpecError(f"{out} is not a pretraining run (no {RECORD}).")
    return _read(out / RECORD)


def read_settings(out: Path) -> RunSettings:
    """How the run is carried out."""
    return RunSettings.model_validate(read_json(out / SETTINGS))


def _read(file: Path) -> RunRecord:
    try:
        return RunRecord.model_validate_json(file.read_bytes())
    except ValueError as error:
        raise SpecError(f"{file} is damaged ({str(error).splitlines()[0]}).") from None


def _same_recipe(out: Path, before: Recipe, now: Recipe) -> None:
    old, new = _flat(before.model_dump(mode="json")), _flat(now.model_dump(mode="json"))
    for key in old.keys() | new.keys():
        if old.get(key) != new.get(key) and key.split(".")[0] not in ("about", "evaluate", "save"):
            raise SpecError(f"{out} holds a run of another recipe ({key} was {old.get(key)}, now {new.get(key)}); "
                            "choose another --out.")


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def launch(out: Path, processes: int) -> None:
    """Carry the run out in `processes` processes of this machine; raises what the first that failed reported."""
    error = out / ERROR
    error.unlink(missing_ok=True)
    child = subprocess.Popen([
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}",
        "-m", "emo_select.pretrain.engine", str(out)])
    try:
        code = child.wait()
    except BaseException:
        child.terminate()  # the processes save a checkpoint and end
        child.wait()
        raise
    if code:
        told = read_json(error)["message"] if error.exists() else f"a training process ended with status {code}."
        raise EmoSelectError(str(told))
