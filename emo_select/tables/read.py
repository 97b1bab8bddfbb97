"""Read a run tree into plain records: one `Run` per run directory, one `Result` per evaluated checkpoint.

Only the first and the last checkpoint of a run are read. Whatever cannot be used becomes a `Problem` that names the
file, so that a hole in a table always has a reason. Metrics are numbers as written, fractions of 1.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic_core import from_json  # several times faster than json.loads, and accepts NaN as well

from emo_select.errors import SpecError, UnknownNameError, UsageError, keywords_checked
from emo_select.faults import translated
from emo_select.names import absolute
from emo_select.spec import RunName, RunSpec, parse_directory_name
from emo_select.tables import evaluations
from emo_select.tables.cache import FileCache
from emo_select.tables.predictions import SUFFIX as PREDICTIONS
from emo_select.tables.predictions import predictions_file
from emo_select.tables.words import other_settings
from emo_select.tree import RunPaths, Tree

if TYPE_CHECKING:
    import pandas as pd

# The published scripts spell a seed into the middle of the shots part; read it as what was meant.
_ODD_SEED = re.compile(r"_(pshots|eshots)_pseed-(\d+)-(\d+)")
_NOT_RUNS = ("activations", evaluations.FOLDER)
RECORD, RESULTS = RunPaths(Path()).record.name, RunPaths(Path()).results.name
_CHECKPOINT = re.compile(RunPaths(Path()).result(0).name.replace("0", r"(\d+)"))
_HEADLINES = ("primary_score", "acc_raw", "acc_per_char", "exact_match", "f1", "recall")


@dataclass(frozen=True, slots=True)
class Problem:
    """Something in the tree that a table could not use."""

    kind: str
    path: str
    message: str


@dataclass(frozen=True, slots=True)
class Result:
    """The metrics of one checkpoint: name -> mean over `count` documents; `errors`: standard errors where known."""

    metrics: dict[str, float]
    count: int | None = None
    errors: dict[str, float] = field(default_factory=dict)
    primary: str | None = None
    """The metric that primary_score repeats."""


@dataclass(frozen=True, slots=True)
class Setting:
    """All that tells two rows apart, once seeds are pooled."""

    model: str
    keep_k: int | None
    """Experts kept per layer; None for a model that skips selection or a run folder named by its task alone."""
    method: str
    examples: int | None = None
    shots: int | None = None
    eval_shots: int | None = None
    batch_size: int = 32
    learning_rate: str = "5e-5"
    epochs: float = 1.0
    variant: str | None = None
    """Every other setting that is not the default, in words from run.json, else as the hash in the folder's name."""

    @property
    def default_calibration(self) -> bool:
        """All examples, the task's own shots."""
        return self.examples is None and self.shots is None and self.eval_shots is None

    def note(self) -> str:
        """What differs from the published default, in words; empty where nothing does."""
        parts = [
            f"{self.examples} example{'s' * (self.examples != 1)}" if self.examples is not None else "",
            f"{self.shots}-shot selection" if self.shots is not None else "",
            f"{self.eval_shots}-shot eval" if self.eval_shots is not None else "",
            f"batch {self.batch_size}" if self.batch_size != 32 else "",
            f"lr {self.learning_rate}" if self.learning_rate != "5e-5" else "",
            f"{self.epochs:g} epochs" if self.epochs != 1 else "",
            self.variant or "",
        ]
        return ", ".join(part for part in parts if part)


@dataclass(frozen=True, slots=True)
class Run:
    """One run directory."""

    directory: str
    """Path below the tree's root."""
    task: str
    setting: Setting
    seed: int
    results: dict[int, Result | None]
    """First and last checkpoint step -> metrics; None where the metrics cannot be had."""
    record: dict[str, Any] = field(default_factory=dict)
    """Of run.json, where there is one: model, selects, seed, variant; of each stage time, memory and weight bytes."""
    odd_name: bool = False
    metrics_file: str | None = None
    """Of an evaluation outside any run: its file below the tree's root."""

    def predictions(self, root: Path, step: int) -> Path | None:
        """The predictions of a checkpoint, where there are any."""
        if self.metrics_file is None:
            return predictions_file(RunPaths(root / self.directory).result(step))
        file = root / self.metrics_file.replace("-metrics.json", PREDICTIONS)
        return file if file.is_file() else None

    @property
    def first(self) -> Result | None:
        """The lowest-numbered checkpoint: before finetuning where it is checkpoint-0."""
        return self.results[min(self.results)] if self.results else None

    @property
    def last(self) -> Result | None:
        """The highest-numbered checkpoint."""
        return self.results[max(self.results)] if self.results else None

    @property
    def before(self) -> Result | None:
        """checkpoint-0: the pruned model before finetuning."""
        return self.results.get(0)

    @property
    def after(self) -> Result | None:
        """The last checkpoint after finetuning; None for a run that was not finetuned."""
        return self.last if self.results and max(self.results) > 0 else None

    def stage(self, name: str) -> dict[str, Any]:
        """The completion record of a stage; empty where there is none."""
        return dict(self.record.get("stages", {}).get(name, {}))

    @property
    def disk_bytes(self) -> int | None:
        """Size of the pruned checkpoint's weight files, also after they were dropped."""
        return self.stage("prune").get("weight_bytes")

    @property
    def seconds(self) -> float | None:
        """Time spent in all stages."""
        return sum(done.get("seconds") or 0 for done in self.record.get("stages", {}).values()) or None

    @property
    def peak_memory(self) -> int | None:
        """Peak bytes of the evaluation: of the GPU where one was used, else resident."""
        done = [self.stage(f"eval/checkpoint-{step}") for step in self.results]
        peaks = [d.get("peak_gpu_memory") or d.get("peak_memory") for d in done]
        return max((peak for peak in peaks if isinstance(peak, int)), default=None)


@dataclass(frozen=True)
class Records:
    """A tree's content."""

    root: Path
    runs: list[Run]
    problems: list[Problem]
    context: list[Run] = field(default_factory=list)
    """Once filtered: the runs of the same models and tasks whatever their keep-k and method, among them the full
    models that the runs are measured against."""

    def to_pandas(self) -> pd.DataFrame:
        """One row per evaluated checkpoint: the run's settings, the headline score with its standard error and number
        of documents, and every metric under its own name (fractions of 1)."""
        import pandas as pd

        rows = [{"directory": run.directory, "task": run.task, **asdict(run.setting), "seed": run.seed,
                 "checkpoint": step, "metric": result.primary, "score": result.metrics.get("primary_score"),
                 "error": result.errors.get("primary_score"), "documents": result.count, **result.metrics}
                for run in self.runs for step, result in sorted(run.results.items()) if result is not None]
        return pd.DataFrame(rows)

    @property
    def beside(self) -> list[Run]:
        """The runs to look for full models in."""
        return self.context or self.runs

    @property
    def models(self) -> dict[str, str]:
        """Model folder -> the model's id, where a run's record says it."""
        found = {run.setting.model: run.record for run in self.runs if run.record.get("model")}
        ids = Counter(record["model"] for record in found.values())
        return {folder: str(record["path"] if ids[record["model"]] > 1 and record.get("path") else record["model"])
                for folder, record in found.items()}


    def folder_of(self, name: str) -> str | None:
        """The folder of a model that is called by its id, its path, its label here or its folder; None if unknown.

        What records say comes first: the folder that a name would come to may belong to another model.
        """
        ids: dict[str, list[str]] = {}
        for run in self.runs:
            for known in (run.record.get("model"), run.record.get("path")):
                if known and run.setting.model not in ids.setdefault(known, []):
                    ids[known].append(run.setting.model)
        given = ids.get(absolute(name) or "") or ids.get(name) or []
        if len(given) > 1:
            raise UsageError(f"{name} is the name of several models in {self.root}; give one by its folder: "
                             f"{', '.join(sorted(given))}.")
        if given:
            return given[0]
        folders = {run.setting.model for run in self.runs}
        unrecorded = {run.setting.model for run in self.runs if not run.record}
        published = re.sub(r"[^A-Za-z0-9_-]", "", name)
        return name if name in folders else published if published in unrecorded else None


@keywords_checked
@translated()
def load_tree(root: str | Path | None = None, *, cached: bool = True) -> Records:
    """Read every run below `root` (default: EMO_SELECT_OUTPUT_DIR, else ./selective_evals_final).

    Files that did not change since the last call (same size and time stamp) come from a cache below
    $XDG_CACHE_HOME/emo-select. Raises `UsageError` where the root does not exist.
    """
    tree = Tree.at(root)
    if not tree.root.is_dir():
        raise UsageError(f"There is no run tree at {tree.root}; name one with --output-dir or start `emo-select run`.")
    with FileCache.of(tree.root, enabled=cached) as cache:
        reader = _Reader(tree.root, cache)
        runs = [reader.run(model, name) for model, name in _directories(tree.root)]
        runs += [run for model in _folders(tree.root) for run in reader.evaluations(model)]
    found = _by_model([run for run in runs if run is not None])
    return Records(tree.root, _without_doubles(found), reader.problems)


def _directories(root: Path) -> Iterator[tuple[str, str]]:
    for model in _folders(root):
        for name in _folders(root / model):
            if name not in _NOT_RUNS:
                yield model, name


def _folders(path: Path) -> list[str]:
    with os.scandir(path) as entries:
        return sorted(e.name for e in entries if not e.name.startswith(".") and e.is_dir())


def _by_model(runs: list[Run]) -> list[Run]:
    """Runs of several models in one folder, as there were before models had folders of their own, told apart."""
    ids: dict[str, set[str]] = {}
    for run in runs:
        if run.record:
            ids.setdefault(run.setting.model, set()).add(run.record["model"])
    return [replace(run, setting=replace(run.setting, model=run.record["model"]))
            if run.record and len(ids[run.setting.model]) > 1 else run for run in runs]


def _without_doubles(runs: list[Run]) -> list[Run]:
    """Drop an oddly spelled run where one of the same meaning has the proper name."""
    proper = {(run.task, run.setting, run.seed) for run in runs if not run.odd_name}
    return [run for run in runs if not run.odd_name or (run.task, run.setting, run.seed) not in proper]


@dataclass
class _Reader:
    """Works with names below the root: a Path object per file is what a large tree would wait for."""

    root: Path
    cache: FileCache
    problems: list[Problem] = field(default_factory=list)

    def run(self, model: str, name: str) -> Run | None:
        directory = f"{model}/{name}"
        record = self.record(f"{directory}/{RECORD}")
        parsed = _parse(record.get("name", name)) or _parse(name)  # what the record says, whatever the folder is called
        results = _entries(f"{self.root}/{directory}/{RESULTS}")
        if parsed is None and results is None:
            self.problem("not a run", directory, "The folder's name is not a run name; it is left out.")
            return None
        setting, seed, task = _bare(model, name) if parsed is None else _named(model, parsed)
        if record:
            keep_k = setting.keep_k if record["selects"] else None
            setting, seed = replace(setting, keep_k=keep_k, variant=record["variant"]), record["seed"]
        return Run(
            directory=directory, task=task, setting=setting, seed=seed, record=record,
            results=self.results(directory, results or []), odd_name=bool(_ODD_SEED.search(name)),
        )

    def evaluations(self, model: str) -> Iterator[Run]:
        """What `eval --model` wrote about a model."""
        folder = f"{model}/{evaluations.FOLDER}"
        for name in evaluations.metrics_files(f"{self.root}/{folder}"):
            run = self.evaluation(model, folder, name)
            if run is not None:
                yield run

    def evaluation(self, model: str, folder: str, name: str) -> Run | None:
        file = f"{folder}/{name}"
        value = self.cache.read(file, lambda data: _parse_evaluation(data, name)) or {"error": "It was removed."}
        if "error" in value or not (value["about"] and value["about"]["whole"]):
            reason = "It is of a --keep-set" if value.get("about") else "It does not say of which model and task it is"
            self.problem("evaluation", file, value.get("error") or f"{reason}; it has no row.")
            return None
        for message in value["notes"]:
            self.problem("metrics", file, message)
        known = value["about"]
        setting = Setting(model=model, **{name: known[name] for name in ("keep_k", "method", "eval_shots", "variant")})
        return Run(directory=file.rpartition("/")[0], task=known["task"], setting=setting, seed=0,
                   results={0: Result(**value["result"])}, record={"model": known["model"]}, metrics_file=file)

    def record(self, name: str) -> dict[str, Any]:
        value = self.cache.read(name, _parse_record)
        if value is not None and "error" in value:
            self.problem("run.json", name, value["error"])
        return dict((value or {}).get("record", {}))

    def results(self, directory: str, entries: Sequence[os.DirEntry[str]]) -> dict[int, Result | None]:
        found = [(match, entry) for entry in entries if (match := _CHECKPOINT.fullmatch(entry.name))]
        steps = sorted(int(match[1]) for match, entry in found if entry.is_dir())
        if not steps:
            self.problem("no results", directory, "The run has no evaluated checkpoint.")
        wanted = dict.fromkeys((*steps[:1], *steps[-1:]))
        return {step: self.result(f"{directory}/{RESULTS}/checkpoint-{step}") for step in wanted}

    def result(self, folder: str) -> Result | None:
        names = [entry.name for entry in _entries(f"{self.root}/{folder}") or ()]
        name = min((n for n in names if n.startswith("task-") and n.endswith("-metrics.json")), default=None)
        if name is None:
            self.problem("no metrics", folder, "The checkpoint has no task-*-metrics.json.")
            return None
        value = self.cache.read(f"{folder}/{name}", _parse_metrics) or {"error": "It was removed while being read."}
        for message in [value["error"]] if "error" in value else value["notes"]:
            self.problem("metrics", f"{folder}/{name}", message)
        return None if "error" in value else Result(**value["result"])

    def problem(self, kind: str, where: str, message: str) -> None:
        self.problems.append(Problem(kind, where, message))


def _entries(folder: str) -> list[os.DirEntry[str]] | None:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except (FileNotFoundError, NotADirectoryError):
        return None


def _parse(name: str) -> RunName | None:
    return parse_directory_name(_ODD_SEED.sub(r"_pseed-\2_\1-\3", name))


def _named(model: str, name: RunName) -> tuple[Setting, int, str]:
    setting = Setting(
        model=model, keep_k=name.keep_k, method=name.method, examples=name.num_examples, shots=name.num_shots,
        eval_shots=name.eval_shots, batch_size=name.batch_size, learning_rate=name.learning_rate,
        epochs=name.epochs, variant=f"variant {name.variant}" if name.variant else None,
    )
    return setting, name.seed, name.task


def _bare(model: str, task: str) -> tuple[Setting, int, str]:
    return Setting(model=model, keep_k=None, method="layerwise"), 0, task


def _parse_json(data: bytes) -> dict[str, Any]:
    try:
        return {"value": from_json(data)}
    except ValueError as error:
        return {"error": f"It is not JSON ({error})."}


def _parse_record(data: bytes) -> dict[str, Any]:
    """What tables need of run.json; stage notes can hold a whole training history.

    It also says what the folder's name does not: whether the model skips selection, and the seed of a random draw,
    which a name only holds as part of its variant.
    """
    parsed = _parse_json(data)
    if "error" in parsed:
        return parsed
    content = parsed["value"]
    try:
        spec = RunSpec.parse(content["spec"])
        stages = {name: _stage(stage) for name, stage in content["stages"].items()}
    except (SpecError, UnknownNameError, KeyError, TypeError, AttributeError) as error:
        return {"error": f"It is not a run record ({error}); the folder's name is used."}
    return {"record": {"model": spec.model, "path": spec.model_path, "name": spec.directory_name,
                       "selects": spec.selects, "seed": spec.calibration.seed, "variant": other_settings(spec),
                       "stages": stages}}


def _stage(stage: dict[str, Any]) -> dict[str, Any]:
    sizes = stage["outputs"]
    kept = {name: value for name, value in stage.items() if name not in ("notes", "outputs", "versions")}
    return kept | {"weight_bytes": sum(sizes[name] for name in sizes if name.endswith(".safetensors")) or None}


def _parse_metrics(data: bytes) -> dict[str, Any]:
    """The numbers of one metrics file, as plain data that the cache can hold."""
    parsed = _parse_json(data)
    if "error" in parsed:
        return parsed
    content = parsed["value"]
    if not isinstance(content, dict) or not isinstance(content.get("metrics"), dict):
        return {"error": "It has no `metrics` object."}
    metrics, notes = _numbers(content["metrics"])
    count = content.get("num_instances")
    errors = content.get("standard_errors")
    errors = _numbers(errors)[0] if isinstance(errors, dict) else {}
    config = content.get("task_config")
    primary = config.get("primary_metric") if isinstance(config, dict) else None
    result = {"metrics": metrics, "count": count if isinstance(count, int) else None, "errors": errors,
              "primary": primary if isinstance(primary, str) else None}
    return {"result": result, "notes": notes}


def _parse_evaluation(data: bytes, path: str) -> dict[str, Any]:
    found = _parse_metrics(data)
    return found if "error" in found else {**found, "about": evaluations.about(from_json(data), path)}


def _numbers(values: dict[str, Any]) -> tuple[dict[str, float], list[str]]:
    """Numbers, booleans and numeric strings as floats; nested objects are skipped, anything else is noted.

    null is an ordinary value of metrics that do not apply, so it is noted for those that tables are made of only.
    """
    numbers: dict[str, float] = {}
    notes: list[str] = []
    for name, value in values.items():
        if isinstance(value, dict | list) or (value is None and name not in _HEADLINES):
            continue
        try:
            numbers[name] = float(value)
        except (TypeError, ValueError):
            notes.append(f"{name} is {json.dumps(value)}, not a number.")
            continue
        if not math.isfinite(numbers[name]):
            notes.append(f"{name} is {json.dumps(numbers[name])}: it has no value.")
    return numbers, notes
