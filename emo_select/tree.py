"""Where everything lies in a run tree. No other module knows a file name of it; `storage.py` says how files get there.

    <root>/<model>/activations/<task>…/       scores.safetensors, scores.json
    <root>/<model>/<run>/                     run.json, selection.json, selected_model/,
                                              finetuned_model/checkpoint-N/, results/checkpoint-N/
    <root>/.sweeps/<name>/                    sweep.json, units/, attempts/, arrays/, logs/
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from emo_select.faults import require_writable
from emo_select.ownership import CHECKPOINT
from emo_select.spec import RunSpec, parse_directory_name

DEFAULT_ROOT = "selective_evals_final"
SWEEPS = ".sweeps"
ROOT_VARIABLE = "EMO_SELECT_OUTPUT_DIR"


@dataclass(frozen=True)
class RunPaths:
    """The files of one run directory."""

    directory: Path

    @property
    def record(self) -> Path:
        """The resolved spec and one completion record per stage."""
        return self.directory / "run.json"

    @property
    def config(self) -> Path:
        """What the run was started with, everything resolved, as a file for `run --config`."""
        return self.directory / "config.yaml"

    @property
    def lock(self) -> Path:
        """Held by the one process that works on the run."""
        return self.directory / ".lock"

    @property
    def selection(self) -> Path:
        """The keep set."""
        return self.directory / "selection.json"

    @property
    def selection_work(self) -> Path:
        """Snapshots of a selection that is under way."""
        return self.directory / ".selection.partial"

    @property
    def selected_model(self) -> Path:
        """The pruned checkpoint."""
        return self.directory / "selected_model"

    @property
    def finetuned_model(self) -> Path:
        """Parent of the finetuned checkpoints."""
        return self.directory / "finetuned_model"

    @property
    def results(self) -> Path:
        """Parent of the result files, one folder per checkpoint."""
        return self.directory / "results"

    def checkpoint(self, step: int) -> Path:
        """Finetuned checkpoint after `step` optimiser steps; 0 is the pruned model."""
        return self.finetuned_model / f"checkpoint-{step}"

    def result(self, step: int) -> Path:
        """Result files of one checkpoint."""
        return self.results / f"checkpoint-{step}"

    def checkpoint_steps(self) -> list[int]:
        """Steps of the finetuned checkpoints that exist, ascending."""
        return numbered_checkpoints(self.finetuned_model)

    def result_steps(self) -> list[int]:
        """Steps of the checkpoints that have a results folder, ascending."""
        return numbered_checkpoints(self.results)


@dataclass(frozen=True)
class SweepPaths:
    """The files of one sweep: what was submitted and what came of it, never what is computed."""

    directory: Path

    @property
    def record(self) -> Path:
        """The sweep as it was submitted last."""
        return self.directory / "sweep.json"

    @property
    def lock(self) -> Path:
        """Held by the one process that submits, or runs the sweep here."""
        return self.directory / ".lock"

    @property
    def logs(self) -> Path:
        """Output of the units, and what submitit keeps."""
        return self.directory / "logs"

    def unit(self, name: str) -> Path:
        """One unit of work, resolved: all that a worker needs to know."""
        return self.directory / "units" / f"{name}.json"

    def unit_lock(self, name: str) -> Path:
        """Held by the one process that works on the unit."""
        return self.directory / "units" / f".{name}.lock"

    @property
    def attempts(self) -> Path:
        """Parent of the records of all attempts."""
        return self.directory / "attempts"

    def attempt(self, name: str, number: int) -> Path:
        """What came of one attempt at a unit."""
        return self.attempts / f"{name}.{number}.json"

    @property
    def arrays(self) -> Path:
        """Parent of the records of what was handed to Slurm."""
        return self.directory / "arrays"

    def array(self, name: str) -> Path:
        """One array that was handed to Slurm."""
        return self.arrays / f"{name}.json"


@dataclass(frozen=True)
class Tree:
    """A root that holds one folder per model."""

    root: Path

    @classmethod
    def at(cls, root: str | Path | None = None) -> Tree:
        """The tree at `root`, else at EMO_SELECT_OUTPUT_DIR, else at ./selective_evals_final."""
        return cls(Path(root or os.environ.get(ROOT_VARIABLE) or DEFAULT_ROOT))

    def run(self, spec: RunSpec) -> RunPaths:
        """Paths of the run that `spec` names."""
        return RunPaths(self.root / spec.model_directory / spec.directory_name)

    def activations(self, spec: RunSpec) -> Path:
        """Folder of the calibration statistics that `spec` uses."""
        return self.root / spec.model_directory / "activations" / spec.activations_name

    def activations_record(self, spec: RunSpec) -> Path:
        """Their description, which says what they were made from."""
        return self.activations(spec) / "scores.json"

    def activations_lock(self, spec: RunSpec) -> Path:
        """Held by the one process that collects those statistics."""
        folder = self.activations(spec)
        return folder.with_name(f".{folder.name}.lock")

    def runs(self, model: str | None = None) -> Iterator[RunPaths]:
        """Every run directory below the root (or one model folder), by model and name."""
        models = [self.root / model] if model else sorted(self.root.glob("*"))
        for folder in (path for parent in models if parent.is_dir() for path in sorted(parent.iterdir())):
            if folder.is_dir() and parse_directory_name(folder.name):
                yield RunPaths(folder)

    def sweep(self, name: str) -> SweepPaths:
        """Paths of the state of the sweep `name`."""
        return SweepPaths(self.root / SWEEPS / name)

    def sweeps(self) -> list[SweepPaths]:
        """Every sweep that was submitted in this tree, by name."""
        return [SweepPaths(file.parent) for file in sorted((self.root / SWEEPS).glob("*/sweep.json"))]

    def require_writable(self) -> None:
        """Raise `SpecError` where the root could not be created or written."""
        require_writable(self.root, f"--output-dir or {ROOT_VARIABLE}")


def numbered_checkpoints(folder: Path) -> list[int]:
    """The N of every `checkpoint-N` folder in `folder`, ascending."""
    if not folder.is_dir():
        return []
    found = (CHECKPOINT.fullmatch(path.name) for path in folder.iterdir() if path.is_dir())
    return sorted(int(match[1]) for match in found if match)
