"""Where and how a sweep runs: Slurm's options or workers on this machine, described once per site in a YAML file.

    cluster: {partition: gpu, account: lab, time: "12:00:00", gpus: 1, cpus: 8, memory: 64GB, max_parallel: 32,
              setup: ["module load cuda"], extra: {exclude: node7}}
    here:    {executor: local, workers: 2}
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from emo_select.errors import SpecError, UnknownNameError
from emo_select.spec import Frozen, checked
from emo_select.textfile import read_yaml_mapping

FILE_VARIABLE = "EMO_SELECT_PROFILES"
_UNITS = {"K": 1 / 1024**2, "M": 1 / 1024, "G": 1.0, "T": 1024.0}
_CLOCK = re.compile(r"(?:(?P<days>\d+)-)?(?P<hours>\d+):(?P<minutes>\d+)(?::(?P<seconds>\d+))?")


class Profile(Frozen):
    """How units are carried out. Nothing here changes what is computed."""

    executor: Literal["slurm", "local"] = "slurm"
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    time: str = "12:00:00"
    """Limit of one job, as Slurm writes it; a job that reaches it is requeued and goes on where it was."""
    gpus: Annotated[int, Field(ge=0)] = 0
    """GPUs of one unit."""
    cpus: Annotated[int, Field(ge=1)] = 2
    memory: str | None = None
    """Host memory of one unit, such as 64GB; None is the site's default."""
    max_parallel: Annotated[int, Field(ge=1)] | None = None
    """Units that run at the same time, over all arrays of the sweep."""
    array_size: Annotated[int, Field(ge=1)] | None = None
    """Longest array; None asks Slurm for its MaxArraySize."""
    signal_before: Annotated[int, Field(ge=1)] = 120
    """Seconds before the time limit at which a job is told to stop."""
    max_requeues: Annotated[int, Field(ge=0)] = 20
    """How often one job may reach its time limit."""
    setup: tuple[str, ...] = ()
    """Shell lines before the work."""
    extra: dict[str, str | int | bool] = {}
    """Further sbatch parameters."""
    python: str | None = None
    """Command that starts Python on a node; None is the one that submits."""
    workers: Annotated[int, Field(ge=1)] = 1
    """Units at the same time under the local executor."""

    @field_validator("*")
    @classmethod
    def _one_line_each(cls, value: Any) -> Any:
        """Values become lines of a batch script, so none may hold the end of one."""
        parts = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, tuple) else [value]
        if any(isinstance(part, str) and not part.isprintable() for part in parts):
            raise ValueError("a value may not hold line breaks or other control characters")
        return value

    @field_validator("time", mode="before")
    @classmethod
    def _readable_time(cls, value: Any) -> str:
        minutes_of(str(value))
        return str(value)

    @field_validator("memory")
    @classmethod
    def _readable_memory(cls, value: str | None) -> str | None:
        if value is not None:
            gigabytes(value)
        return value

    @property
    def minutes(self) -> int:
        """`time` in minutes."""
        return minutes_of(self.time)


def load_profile(name: str | None, file: Path | None, options: dict[str, Any]) -> Profile:
    """The profile `name` of the profiles file (or defaults), with `options` that are not None on top.

    Raises `SpecError` or `UnknownNameError` for a name or key that does not exist.
    """
    base = _named(name, file) if name else {}
    given = {key: value for key, value in options.items() if value is not None and value != {}}
    extra = {**base.get("extra", {}), **given.pop("extra", {})}
    return checked(Profile, {**base, **given, **({"extra": extra} if extra else {})})


def minutes_of(text: str) -> int:
    """`90` (minutes), `1:30:00`, `2-00:00:00` or `45m`, `12h`, `2d` in whole minutes, at least one."""
    if re.fullmatch(r"\d+[mhd]?", text):
        scale = {"h": 60, "d": 1440}.get(text[-1], 1)
        return max(1, int(text.rstrip("mhd")) * scale)
    found = _CLOCK.fullmatch(text)
    if found is None:
        raise ValueError(f"time {text!r} is not one of 90, 1:30:00, 2-00:00:00 or 12h")
    part = {key: int(value or 0) for key, value in found.groupdict().items()}
    if found["seconds"] is None and found["days"] is None:  # Slurm reads a:b as minutes and seconds
        return max(1, part["hours"] + (part["minutes"] > 0))
    return max(1, part["days"] * 1440 + part["hours"] * 60 + part["minutes"] + (part["seconds"] > 0))


def gigabytes(text: str) -> float:
    """`64GB`, `64G` or `500MB` as a number of gigabytes."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT])i?B?", text.strip(), re.IGNORECASE)
    if found is None:
        raise ValueError(f"memory {text!r} is not a size such as 64GB")
    return float(found[1]) * _UNITS[found[2].upper()]


def profiles_file(file: Path | None) -> Path:
    """The file given, else that of EMO_SELECT_PROFILES, else the user's own."""
    chosen = file or os.environ.get(FILE_VARIABLE)
    return Path(chosen) if chosen else Path.home() / ".config" / "emo-select" / "profiles.yaml"


def _named(name: str, file: Path | None) -> dict[str, Any]:
    path = profiles_file(file)
    if not path.exists():
        raise SpecError(f"There is no profiles file {path}; give one with --profiles.")
    found = read_yaml_mapping(path, SpecError, "it must map names to options")
    if not isinstance(found.get(name, {}), dict):
        raise SpecError(f"{path} is not a profiles file: it must map names to options.")
    if name not in found:
        raise UnknownNameError("profile", name, map(str, found))
    checked(Profile, found[name])
    return dict(found[name])
