"""Fill a folder with data sets (as parquet) and models (safetensors), for machines without network.

Every file is downloaded by huggingface_hub, which resumes a partial one, and is then moved to its place, so that a
file in its place is complete. Running again fetches what is missing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from emo_select.checkpoint.sources import HUB_FILES, MODELS, split_revision
from emo_select.errors import DataMissingError, UsageError
from emo_select.ownership import require_own_files
from emo_select.progress import track
from emo_select.storage import discard, move_output, require_space
from emo_select.tasks.base import Task
from emo_select.tasks.hub import HubFile, HubUnreachable, hub_clauses, list_files
from emo_select.tasks.registry import get_tasks
from emo_select.tasks.sources import HubRows

PARTIAL = ".partial"  # where downloads grow before they are moved


@dataclass(frozen=True)
class Plan:
    """What to fetch into `folder`: `missing` files, and how many are there already."""

    folder: Path
    missing: list[HubFile]
    present: int
    models: list[str]

    @property
    def bytes(self) -> int:
        return sum(file.size for file in self.missing)

    def summary(self) -> Iterator[str]:
        """A line per repository with its size, and the total."""
        totals: dict[str, list[int]] = {}
        for file in self.missing:
            totals.setdefault(file.repository, []).append(file.size)
        for repository, sizes in totals.items():
            yield f"{repository}: {len(sizes)} file{'s' * (len(sizes) > 1)}, {megabytes(sum(sizes))}"
        yield f"to fetch: {megabytes(self.bytes)} in {len(self.missing)} files; already there: {self.present} files"

    def how_to_use(self) -> Iterator[str]:
        """How the folder is given to the other commands."""
        yield f"done; use it with --data-dir {self.folder}"
        for model in self.models:
            yield f"there, --model {model} is found under this name"


def megabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def make_plan(tasks: Sequence[str], models: Sequence[str], folder: Path) -> Plan:
    """Ask the Hub for files and sizes.

    Raises `DataMissingError` if it cannot be asked, `OwnershipError` where a file of another size is there that we did
    not fetch, `DiskSpaceError`.
    """
    if not tasks and not models:
        raise UsageError("Nothing to fetch; name tasks with --task or models with --model.")
    wanted: dict[str, HubFile] = {}
    try:
        with track("Asking the Hub", total=None) as bar:
            for source in _sources(get_tasks(tasks, folder)):
                bar.advance(note=source.label)
                if not _present(source, folder):
                    wanted |= {file.target: file for file in list_files(source.paths, source.config, source.splits)}
            for model in models:
                wanted |= {file.target: file for file in model_files(model)}
    except HubUnreachable as error:
        raise DataMissingError(f"Nothing was fetched: {error}.") from error
    missing = [file for file in wanted.values() if not _complete(folder / file.target, file.size)]
    require_own_files(*(folder / file.target for file in missing))
    plan = Plan(folder, missing, len(wanted) - len(missing), list(models))
    require_space(folder, plan.bytes, "The download")
    return plan


def _sources(tasks: Sequence[Task]) -> list[HubRows]:
    """The data sets of the tasks that come from the Hub, each once."""
    found = {source: None for task in tasks for source in task.sources if isinstance(source, HubRows)}
    return list(found)


def _present(source: HubRows, folder: Path) -> bool:
    return all(
        any(folder in file.parents for file in source.locate(split)) for split in source.splits
    )


def model_files(model: str) -> list[HubFile]:
    """Configuration, weights, tokenizer and, as text, code of a model (what a checkpoint needs); never pickles."""
    if model.startswith("demo/") or Path(model).exists():
        raise UsageError(f"The model {model} is on this machine already; --model takes a Hub id here.")
    from huggingface_hub import HfApi

    name, revision = split_revision(model)
    with hub_clauses(name):
        info = HfApi().model_info(name, revision=revision, files_metadata=True)
    return [
        HubFile(name, info.sha or "main", sibling.rfilename, sibling.size or 0,
                f"{MODELS}/{model}/{sibling.rfilename}", "model")
        for sibling in info.siblings or ()
        if any(fnmatch(sibling.rfilename, pattern) for pattern in HUB_FILES)
    ]


def _complete(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def carry_out(plan: Plan) -> None:
    """Download the missing files, and tidy. Raises `DataMissingError`; what was fetched stays, not fetched again."""
    with track("Fetching", total=plan.bytes) as bar:
        for file in plan.missing:
            try:
                _download(file, plan.folder)
            except HubUnreachable as error:
                raise DataMissingError(f"Stopped at {file.target}: {error}; run the same command to go on.") from error
            bar.advance(file.size, note=file.target)
    discard(plan.folder / PARTIAL)


def _download(file: HubFile, folder: Path) -> None:
    from huggingface_hub import hf_hub_download

    growing = folder / PARTIAL / file.kind / file.repository / file.revision
    with hub_clauses(file.repository):
        path = hf_hub_download(file.repository, file.name, repo_type=file.kind, revision=file.revision,
                               local_dir=growing)
    move_output(Path(path), folder / file.target)
