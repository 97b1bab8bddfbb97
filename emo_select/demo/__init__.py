"""Two tiny models and eight tasks that show modularity in a minute. Importing this imports neither torch nor tasks."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from emo_select.errors import UnknownNameError

DEMO_MODELS = ("emo", "stdmoe")
DEMO_TASKS = ("demo_railway", "demo_theater")  # what `make demo` runs: one by choice, one by generation


def demo_path(name: str) -> Path:
    """Folder of a shipped checkpoint, by its name with or without `demo/`. Raises `UnknownNameError`."""
    return _folder("models", name)


def demo_config(name: str) -> Path:
    """The pretraining configuration that made a shipped checkpoint. Raises `UnknownNameError`."""
    return _folder("configs", name).with_suffix(".yaml")


def demo_task_names() -> list[str]:
    """Names of all demo tasks."""
    from emo_select.demo.domains import DOMAINS

    return [f"demo_{domain}" for domain in DOMAINS]


def _folder(kind: str, name: str) -> Path:
    if name.removeprefix("demo/") not in DEMO_MODELS:
        raise UnknownNameError("demo model", name, DEMO_MODELS)
    return Path(str(files(__name__))) / kind / name.removeprefix("demo/")
