"""Data sets on the Hub: what its cache holds, and downloading the converted parquet files of a split.

Imports huggingface_hub inside functions only. Files come from the branch on which the Hub keeps every data set
as parquet, else from the data set's own parquet files; scripts in a repository are never downloaded.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath

LOCAL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENOTDIR,
         errno.ENAMETOOLONG)  # faults of this machine's disk, not of the Hub
CONVERTED = "refs/convert/parquet"


class HubUnreachable(Exception):
    """The Hub cannot be asked, or does not have the files; the message is a clause."""


@dataclass(frozen=True)
class HubFile:
    """One file on the Hub, its size in bytes, and where it belongs in a data folder."""

    repository: str
    revision: str
    name: str
    size: int
    target: str
    kind: str = "dataset"


def cached_snapshots(repository: str) -> Iterator[Path]:
    """Snapshot folders of a data set in the Hub's cache, newest first."""
    from huggingface_hub.constants import HF_HUB_CACHE

    snapshots = Path(HF_HUB_CACHE) / f"datasets--{repository.replace('/', '--')}" / "snapshots"
    if snapshots.is_dir():
        yield from sorted(snapshots.iterdir(), key=lambda folder: folder.stat().st_mtime, reverse=True)


def choose_files(names: Sequence[str], config: str, split: str) -> list[str]:
    """The parquet files of one split among the names in a repository, in order; empty where there are none."""
    bases = [config] + (["data", ""] if config == "default" else [])
    for base in bases:
        if found := _names_of(names, base, split):
            return found
    if config != "default":
        return []
    others = sorted({name.split("/")[0] for name in names if "/" in name})
    candidates = [found for base in others if (found := _names_of(names, base, split))]
    return candidates[0] if len(candidates) == 1 else []  # the only configuration, whatever its name


def _names_of(names: Sequence[str], base: str, split: str) -> list[str]:
    for pattern in (f"{split}.parquet", f"{split}-*-of-*.parquet", f"{split}/*.parquet"):
        wanted = PurePosixPath(base, pattern).parts
        if found := [name for name in names if _matches(PurePosixPath(name).parts, wanted)]:
            return sorted(found)
    return []


def _matches(parts: Sequence[str], patterns: Sequence[str]) -> bool:
    return len(parts) == len(patterns) and all(
        PurePosixPath(part).match(pattern) for part, pattern in zip(parts, patterns, strict=True)
    )


def list_files(paths: Sequence[str], config: str, splits: Sequence[str]) -> list[HubFile]:
    """The files that hold `splits`, from the first id that has them all. Raises `HubUnreachable`."""
    reasons = []
    for repository in paths:
        for revision in (CONVERTED, "main"):
            try:
                return _list_revision(repository, revision, config, splits)
            except HubUnreachable as error:
                reasons.append(str(error))
    raise HubUnreachable(reasons[0] if len(set(reasons)) == 1 else "; ".join(dict.fromkeys(reasons)))


def _list_revision(repository: str, revision: str, config: str, splits: Sequence[str]) -> list[HubFile]:
    commit, sizes = _tree(repository, revision)
    files = []
    for split in splits:
        names = choose_files(list(sizes), config, split)
        if not names:
            raise HubUnreachable(f"the Hub has no parquet files of {repository} ({config}, {split})")
        files += [HubFile(repository, commit, name, sizes[name], target)
                  for name, target in zip(names, _targets(repository, config, split, len(names)), strict=True)]
    return files


@lru_cache(maxsize=64)
def _tree(repository: str, revision: str) -> tuple[str, dict[str, int]]:
    """The commit of a revision and the sizes of its files; asked once, although MMLU has 57 configurations."""
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    with hub_clauses(repository):
        api = HfApi()
        commit = api.dataset_info(repository, revision=revision).sha or revision
        tree = list(api.list_repo_tree(repository, repo_type="dataset", revision=commit, recursive=True))
    return commit, {entry.path: entry.size for entry in tree if isinstance(entry, RepoFile)}


def _targets(repository: str, config: str, split: str, count: int) -> list[str]:
    """Where the files of a split belong in a data folder."""
    if count == 1:
        return [f"{repository}/{config}/{split}.parquet"]
    return [f"{repository}/{config}/{split}-{index:05d}-of-{count:05d}.parquet" for index in range(count)]


def download_to_cache(paths: Sequence[str], config: str, splits: Sequence[str]) -> None:
    """Download `splits` into the Hub's cache. Raises `HubUnreachable`."""
    from huggingface_hub import hf_hub_download

    for file in reversed(list_files(paths, config, splits)):  # see `sources._from_zero`
        with hub_clauses(file.repository):
            hf_hub_download(file.repository, file.name, repo_type="dataset", revision=file.revision)


@contextmanager
def hub_clauses(repository: str) -> Iterator[None]:
    """Turn whatever a Hub call raises (the HTTP library's errors vary with its version) into `HubUnreachable`.

    Faults of this machine's disk stay what they are.
    """
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        yield
    except OfflineModeIsEnabled as error:
        raise HubUnreachable("the Hub is switched off (HF_HUB_OFFLINE)") from error
    except HfHubHTTPError as error:
        raise HubUnreachable(f"the Hub answers for {repository}: {str(error).splitlines()[0]}") from error
    except Exception as error:
        if isinstance(error, OSError) and error.errno in LOCAL:
            raise
        raise HubUnreachable(f"the Hub cannot be reached ({type(error).__name__})") from error
