"""The same graph on this machine: N workers, each with its share of the GPUs and processors."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from queue import SimpleQueue

from emo_select.errors import SpecError
from emo_select.sweeps.graph import Unit
from emo_select.sweeps.profile import Profile
from emo_select.sweeps.work import LOG_VARIABLE
from emo_select.tree import SweepPaths

STOP_S = 20  # for a worker to record its attempt and leave


def run(paths: SweepPaths, units: Mapping[str, Unit], profile: Profile,
        changed: Callable[[Unit, str], None] = lambda unit, outcome: None) -> dict[str, str]:
    """Do units (by name, each after those it needs) and return `done`, `failed` or `blocked` for each.

    What a failed unit blocks is not begun; everything else is. Needs that are not among `units` are done already.
    """
    paths.logs.mkdir(parents=True, exist_ok=True)
    crew = _Crew(paths, environments(profile))
    threads = ThreadPoolExecutor(profile.workers)
    try:
        return _schedule(units, threads, crew, changed)
    finally:
        crew.stop()  # before the threads, which wait for their workers
        threads.shutdown(cancel_futures=True)


def environments(profile: Profile) -> list[dict[str, str]]:
    """What each worker has in its environment: its GPUs, and its share of the processors.

    Raises `SpecError` where the units at work would need more GPUs than there are.
    """
    gpus, workers = visible_gpus(), profile.workers
    if profile.gpus * workers > len(gpus):
        raise SpecError(f"{workers} workers with {profile.gpus} GPUs each need {profile.gpus * workers}, and this "
                        f"machine has {len(gpus)}; lower --workers or --gpus.")
    threads = {} if "OMP_NUM_THREADS" in os.environ else {
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // workers))}
    return [{**threads, **_share_of(gpus, profile.gpus, worker)} for worker in range(workers)]


def visible_gpus() -> list[str]:
    """GPUs of this machine as CUDA_VISIBLE_DEVICES names them, found without torch."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [name for name in chosen.split(",") if name not in ("", "-1")]
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, timeout=60)
    return done.stdout.split() if done.returncode == 0 else []


def _share_of(gpus: Sequence[str], count: int, worker: int) -> dict[str, str]:
    if not gpus:
        return {}
    mine = gpus[worker * count:(worker + 1) * count] or [gpus[worker % len(gpus)]]
    return {"CUDA_VISIBLE_DEVICES": ",".join(mine)}


def _schedule(units: Mapping[str, Unit], threads: ThreadPoolExecutor, crew: _Crew,
              changed: Callable[[Unit, str], None]) -> dict[str, str]:
    outcomes: dict[str, str] = {}
    waiting, at_work = dict(units), dict[Future[str], Unit]()
    while waiting or at_work:
        for unit in list(waiting.values()):
            needs = [outcomes.get(name) for name in unit.needs if name in units]
            if any(outcome in ("failed", "blocked") for outcome in needs):
                outcomes[unit.name] = "blocked"
                changed(waiting.pop(unit.name), "blocked")
            elif all(outcome == "done" for outcome in needs):
                at_work[threads.submit(crew.perform, waiting.pop(unit.name))] = unit
        ready, _ = wait(at_work, return_when=FIRST_COMPLETED)
        for future in ready:
            unit = at_work.pop(future)
            outcomes[unit.name] = future.result()
            changed(unit, outcomes[unit.name])
    return outcomes


@dataclass
class _Crew:
    """Worker processes; a thread takes one that is free, and replaces it where it died."""

    paths: SweepPaths
    environments: Sequence[Mapping[str, str]]
    _free: SimpleQueue[int] = field(default_factory=SimpleQueue)
    _processes: dict[int, subprocess.Popen[str]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _stopping: bool = False

    def __post_init__(self) -> None:
        for number in range(len(self.environments)):
            self._free.put(number)

    def perform(self, unit: Unit) -> str:
        """Have a free worker do the unit; `failed` also where the worker dies over it."""
        number = self._free.get()
        try:
            process = self._process(number)
            if process is None or process.stdin is None or process.stdout is None:
                return "failed"
            log = self.paths.logs / f"{unit.name}.log"
            process.stdin.write(f"{self.paths.unit(unit.name).absolute()}\t{log.absolute()}\n")
            process.stdin.flush()
            return process.stdout.readline().strip() or "failed"
        except BrokenPipeError:
            return "failed"
        finally:
            self._free.put(number)

    def stop(self) -> None:
        """End all workers; one that is at work records that it was interrupted."""
        with self._lock:
            self._stopping = True
            processes = list(self._processes.values())
        for process in processes:
            process.terminate()
        for process in processes:
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()

    def _process(self, number: int) -> subprocess.Popen[str] | None:
        with self._lock:
            if self._stopping:
                return None
            process = self._processes.get(number)
            if process is None or process.poll() is not None:
                environment = {**os.environ, **self.environments[number]}
                environment.pop(LOG_VARIABLE, None)
                process = self._processes[number] = subprocess.Popen(
                    [sys.executable, "-m", "emo_select.sweeps.worker"], env=environment, text=True,
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            return process
