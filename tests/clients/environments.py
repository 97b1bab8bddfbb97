"""Virtual environments of the programs that run our checkpoints, one each, made once and reused.

`python tests/clients/environments.py [NAME …]` makes those that are missing and says which could not be made. They lie
in EMO_SELECT_CLIENTS, else in ~/.cache/emo-select-clients, under a name that changes with their requirements.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

REQUIREMENTS = Path(__file__).parent / "requirements"
ROOT = Path(os.environ.get("EMO_SELECT_CLIENTS") or Path.home() / ".cache" / "emo-select-clients")
UNWANTED = {"vllm": ("torchvision", "torchaudio", "torchcodec")}  # built for another torch than the CPU one


def names() -> list[str]:
    """Every client, by its requirements file."""
    return sorted(file.stem for file in REQUIREMENTS.glob("*.txt"))


def folder_of(name: str) -> Path:
    """Where the environment of `name` lies, made or not."""
    key = hashlib.sha256(f"{sys.version} {(REQUIREMENTS / f'{name}.txt').read_text()}".encode()).hexdigest()[:12]
    return ROOT / f"{name}-{key}"


def python_of(name: str) -> Path | None:
    """The interpreter of an environment that is complete."""
    folder = folder_of(name)
    return folder / "bin" / "python" if (folder / "complete").is_file() else None


def make(name: str) -> Path:
    """Make the environment of `name`; raises `subprocess.CalledProcessError` where a package cannot be had."""
    folder = folder_of(name)
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    pip = [folder / "bin" / "python", "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "--no-compile", "-r", REQUIREMENTS / f"{name}.txt"], check=True)
    if name in UNWANTED:
        subprocess.run([*pip, "uninstall", "--yes", *UNWANTED[name]], check=True)
    (folder / "complete").touch()
    return folder


def main(wanted: list[str]) -> None:
    """Make what is missing."""
    for name in wanted or names():
        if python_of(name) is not None:
            print(f"{name}: there already")
            continue
        try:
            print(f"{name}: {make(name)}")
        except (subprocess.CalledProcessError, OSError) as error:
            print(f"{name}: left out, cannot be made here ({error})")


if __name__ == "__main__":
    main(sys.argv[1:])
