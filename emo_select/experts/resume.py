"""Snapshots between layers, so that a killed pass goes on with the layer after the last one it finished."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from emo_select.experts.states import HiddenStates
from emo_select.experts.team import Team
from emo_select.ownership import STATISTICS
from emo_select.storage import discard, partial_directory, read_json, staged_directory, write_bytes, write_json

SHARE, GRACE_S = 0.1, 2.0  # snapshots may take this share of the time, and this much in any case


@dataclass(frozen=True)
class Snapshot:
    """What had been computed when `layer` was finished. `hidden` are files for `HiddenStates.load`."""

    layer: int
    data: dict[str, Any]
    tensors: dict[str, Tensor]
    hidden: list[Path]


class Snapshots:
    """Snapshots of one process in `folder`; those of another `key` are ignored. None as folder keeps nothing.

    Writing hidden states of a large calibration set takes time, so a layer's snapshot is left out while they have
    taken more than a tenth of it.
    """

    def __init__(self, folder: Path | None, key: str, team: Team) -> None:
        self.folder = folder / f"resume-{team.rank}" if folder else None
        self.key, self.team = key, team
        self._begun, self._spent = time.monotonic(), 0.0

    def latest(self) -> Snapshot | None:
        """The last layer that every process has a snapshot of."""
        found = {int(path.stem): path for path in self.folder.glob("*.json")} if self.folder else {}
        found = {layer: path for layer, path in found.items() if self._is_whole(read_json(path), path)}
        layer = self.team.least(max(found, default=-1))
        return self._load(found[layer]) if layer in found else None

    def _is_whole(self, record: Mapping[str, Any], path: Path) -> bool:
        """Whether a snapshot is of this pass and has all its files."""
        return record["key"] == self.key and all(file.exists() for file in self._files(record, path))

    @staticmethod
    def _files(record: Mapping[str, Any], path: Path) -> list[Path]:
        hidden = [path.with_name(f"{path.stem}-{number}.bin") for number in range(record["hidden"])]
        return [path.with_suffix(".safetensors"), *hidden]

    def save(self, layer: int, data: Mapping[str, Any], tensors: Mapping[str, Tensor],
             hidden: Sequence[HiddenStates]) -> None:
        """Keep the state after `layer`, unless snapshots have taken too much time already."""
        elapsed = time.monotonic() - self._begun
        if self.folder is None or not self.team.least(int(self._spent <= SHARE * elapsed + GRACE_S)):
            return
        begun = time.monotonic()
        self._write(self.folder, layer, data, tensors, hidden)
        self._spent += time.monotonic() - begun

    def _write(self, folder: Path, layer: int, data: Mapping[str, Any], tensors: Mapping[str, Tensor],
               hidden: Sequence[HiddenStates]) -> None:
        from safetensors.torch import save

        folder.mkdir(parents=True, exist_ok=True)
        for number, states in enumerate(hidden):
            states.save(folder / f"{layer}-{number}.bin")
        write_bytes(folder / f"{layer}.safetensors", save(dict(tensors)))
        write_json(folder / f"{layer}.json", {"key": self.key, "hidden": len(hidden), "data": dict(data)})
        self.team.wait()  # nobody drops the layer before, until all have this one
        for path in folder.iterdir():
            if path.name.split(".")[0].split("-")[0] != str(layer):
                path.unlink()

    def _load(self, path: Path) -> Snapshot:
        from safetensors.torch import load_file

        record = read_json(path)
        weights, *hidden = self._files(record, path)
        return Snapshot(int(path.stem), record["data"], load_file(weights), hidden)


@contextmanager
def shared_stage(final: Path, key: str, team: Team) -> Iterator[Path]:
    """`staged_directory` for all processes of a team: the first one makes and publishes it."""
    if not team.leads:
        team.wait()
        yield partial_directory(final)
        team.wait()
        return
    with staged_directory(final, key, STATISTICS) as folder:
        team.wait()
        yield folder
        team.wait()
        for path in folder.glob("resume-*"):  # out of what is published, before a kill can leave half of it there
            aside = final.with_name(f"{final.name}.{path.name}")
            discard(aside)
            path.rename(aside.with_name(f".{aside.name}.old"))
            discard(aside)
