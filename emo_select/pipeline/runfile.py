"""One run as a YAML file: what `run --config` reads, and what every run directory keeps as `config.yaml`.

    model: allenai/Emo_1b14b_1T
    task: gsm8k
    keep_k: 12.5%
    calibration: {num_examples: 256}
    training: {epochs: 2, packing: true, lora: {rank: 8, targets: [attention]}}
    evaluation: {limit: 500}
    execution: {device: cuda, micro_batch_size: 4}

The parts have the keys of `RunSpec` and `Execution`; models, tasks, keep-k and methods may be lists.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import field_validator

from emo_select.errors import SpecError
from emo_select.spec import Calibration, Evaluation, Execution, Frozen, Training, checked, keep_ks_in, listed
from emo_select.storage import write_bytes
from emo_select.textfile import read_yaml_mapping

if TYPE_CHECKING:
    from emo_select.pipeline.runs import Run

LISTS = ("model", "task", "keep_k", "method")


class RunFile(Frozen):
    """The content of such a file; None and what is left out mean the default."""

    model: tuple[str, ...] = ()
    task: tuple[str, ...] = ()
    keep_k: tuple[str, ...] = ()
    method: tuple[str, ...] = ()
    score: str | None = None
    num_shared: int | None = None
    calibration: Calibration = Calibration()
    training: Training = Training()
    evaluation: Evaluation = Evaluation()
    execution: Execution = Execution()
    output_dir: str | None = None

    @field_validator(*LISTS, mode="before")
    @classmethod
    def _several(cls, value: Any, info: Any) -> Any:
        items = value if isinstance(value, list | tuple) else [value]
        texts = [str(item) for item in items if item is not None]
        return keep_ks_in(texts) if info.field_name == "keep_k" else listed(texts)

    def given(self) -> dict[str, Any]:
        """What the file says, and nothing else."""
        return self.model_dump(exclude_unset=True)


def read_run_file(path: Path) -> RunFile:
    """Read such a file. Files that it names are looked for beside it, then in the current directory.

    Raises `SpecError` naming the wrong key with its near match.
    """
    data = read_yaml_mapping(path, SpecError, "a run file has `model`, `task`, `keep_k`, `training`, …")
    for part in ("calibration", "training"):
        own = data.get(part)
        if isinstance(own, dict) and isinstance(own.get("file"), str):
            data = {**data, part: {**own, "file": _beside(path, own["file"])}}
    found = checked(RunFile, data)
    tasks = tuple(_beside(path, task) if task.endswith((".yaml", ".yml")) else task for task in found.task)
    return found.model_copy(update={"task": tasks}) if tasks else found


def store(run: Run) -> None:
    """Keep beside a run what it was started with, everything resolved; `run --config` takes it again."""
    import yaml

    execution = run.execution.model_dump(mode="json", exclude={"task_file"})
    resolved = run.spec.model_dump(mode="json", exclude={"selects", "model_path", "model_folder"})
    resolved |= {"model": run.spec.source, "task": run.task.file or run.spec.task, "execution": execution}
    text = yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True, width=120)
    file = run.paths.config
    if not file.exists() or file.read_text(encoding="utf-8") != text:
        write_bytes(file, text.encode())


def _beside(path: Path, name: str) -> str:
    beside = path.parent / name
    return str(beside) if beside.exists() else name
