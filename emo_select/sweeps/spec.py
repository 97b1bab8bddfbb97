"""What a sweep file says, and the runs it stands for.

    name: main
    models: [{id: allenai/Emo_1b14b_1T, experts: 128}, {id: allenai/Dense_1b_130B, selects: false, keep_k: 32}]
    tasks: [mc9, mmlu]
    keep_k: [8, 16, 32]
    methods: [layerwise]
    settings: {training: {checkpoints: 1}}            # keys of RunSpec that all runs share
    variants: [{calibration: {num_examples: 5}}]      # one more factor of the product
    include: [{tasks: [gsm8k], variants: [...]}]      # further products; what they leave out is as above
    exclude: [{method: random, keep_k: [128]}]        # runs that match are left out
    overrides: [{match: {task: squad*}, execution: {micro_batch_size: 2}}]

The product is models × tasks × keep-k × methods × variants. Names are matched by shell patterns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from emo_select.errors import SpecError
from emo_select.spec import Execution, Frozen, RunSpec, checked
from emo_select.textfile import read_yaml_mapping

One = str | int | bool
Many = tuple[One, ...]


class SweepModel(Frozen):
    """A model of a sweep. One that skips selection is run once per task, under the directory of `keep_k`."""

    id: str
    selects: bool = True
    keep_k: int | None = None
    experts: int | None = None
    """Experts of a full layer: runs that keep as many share all their work. None looks at the model, if it is here."""


class Product(Frozen):
    """Factors of a product of runs; None takes those of the file."""

    models: tuple[SweepModel, ...] | None = None
    tasks: tuple[str, ...] | None = None
    keep_k: tuple[int, ...] | None = None
    methods: tuple[str, ...] | None = None
    variants: tuple[dict[str, Any], ...] | None = None

    @field_validator("models", mode="before")
    @classmethod
    def _ids(cls, value: Any) -> Any:
        return [{"id": item} if isinstance(item, str) else item for item in value] if value is not None else None


class Override(Frozen):
    """Settings of those runs that `match` names."""

    match: dict[str, One | Many]
    settings: dict[str, Any] = {}
    execution: dict[str, Any] = {}


class SweepSpec(Product):
    """A sweep file."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    settings: dict[str, Any] = {}
    execution: dict[str, Any] = {}
    include: tuple[Product, ...] = ()
    exclude: tuple[dict[str, One | Many], ...] = ()
    overrides: tuple[Override, ...] = ()


class SweepRun(Frozen):
    """One run of a sweep, and how it is to be carried out."""

    spec: RunSpec
    execution: Execution = Execution()
    keeps_all: bool = False
    """Whether it is known to keep all experts, so that its method does not matter."""


def read_sweep(path: Path) -> SweepSpec:
    """Read a sweep file. Raises `SpecError` naming the wrong key with its near match."""
    data = read_yaml_mapping(path, SpecError, "a sweep file has `name`, `models`, `tasks`, …")
    return _with_whole_paths(checked(SweepSpec, data), path.parent)


def _with_whole_paths(sweep: SweepSpec, folder: Path) -> SweepSpec:
    """Task files by absolute paths, so that the sweep means the same from every directory.

    They are given relative to the sweep file or, where there is none, to the current directory.
    """
    def whole(task: str) -> str:
        beside = folder / task
        return str((beside if beside.exists() else Path(task)).absolute()) if task.endswith((".yaml", ".yml")) else task

    def of(product: Product) -> dict[str, Any]:
        return {"tasks": tuple(map(whole, product.tasks)) if product.tasks is not None else None}

    include = tuple(product.model_copy(update=of(product)) for product in sweep.include)
    return sweep.model_copy(update={**of(sweep), "include": include})


def expand_sweep(sweep: SweepSpec) -> list[SweepRun]:
    """Every run of the sweep, once, in the order of the file.

    Raises `SpecError` for a product without models or tasks, a key that a match or a setting does not have.
    """
    runs: dict[str, SweepRun] = {}
    experts: dict[str, int | None] = {}
    for product in (sweep, *sweep.include):
        experts |= {model.id: model.experts for model in product.models or () if model.experts}
        for spec in _product(sweep, product):
            if not any(matches(spec, rule) for rule in sweep.exclude):
                run = _overridden(sweep, spec, experts)
                runs.setdefault(run.spec.model_dump_json(), run)
    return list(runs.values())


def matches(spec: RunSpec, rule: dict[str, Any]) -> bool:
    """Whether a run has one of the values that the rule gives for each of its keys; `a.b` looks into parts."""
    return all(_matches_one(spec, key, wanted) for key, wanted in rule.items())


def _product(sweep: SweepSpec, product: Product) -> Iterator[RunSpec]:
    models, tasks, keep_ks, methods = (
        _factor(sweep, product, name) for name in ("models", "tasks", "keep_k", "methods"))
    names = _task_names(tasks, sweep.execution.get("data_dir"))
    for model in models:
        chosen = keep_ks if model.selects else (model.keep_k or keep_ks[0],)
        for task in names:
            for keep_k in chosen:
                for method in methods if model.selects else methods[:1]:
                    for variant in _factor(sweep, product, "variants", ({},)):
                        base = {"model": model.id, "task": task, "keep_k": keep_k, "method": method}
                        yield RunSpec.parse(merge({**base, "selects": model.selects}, sweep.settings, variant))


def _factor(sweep: SweepSpec, product: Product, name: str, default: Any = None) -> Any:
    own = getattr(product, name)
    value = own if own is not None else getattr(sweep, name)
    if value is None and name == "methods":
        return ("layerwise",)
    if not value:
        if default is None:
            raise SpecError(f"The sweep {sweep.name!r} has no `{name}`; give at least one.")
        return default
    return value


def _task_names(tasks: Sequence[str], data_dir: str | None) -> list[str]:
    from emo_select.tasks import get_tasks

    return [task.name for task in get_tasks(list(tasks), data_dir)]


def _overridden(sweep: SweepSpec, spec: RunSpec, experts: dict[str, int | None]) -> SweepRun:
    from emo_select.tasks import task_file

    settings: dict[str, Any] = {}
    execution = {"task_file": task_file(spec.task), **sweep.execution}
    for override in sweep.overrides:
        if matches(spec, override.match):
            settings = merge(settings, override.settings)
            execution = merge(execution, override.execution)
    final = RunSpec.parse(merge(spec.model_dump(), settings))
    return SweepRun(spec=final, execution=checked(Execution, execution), keeps_all=_keeps_all(final, experts))


def _keeps_all(spec: RunSpec, experts: dict[str, int | None]) -> bool:
    """Whether a run keeps all experts; `experts` are those of a full layer by model, completed where possible."""
    if not spec.selects or spec.num_shared is not None:
        return False
    if spec.model not in experts:
        from emo_select.sweeps.here import experts_of

        experts[spec.model] = experts_of(spec.model)
    total = experts[spec.model]
    return total is not None and spec.keep_k >= total


def merge(base: dict[str, Any], *layers: dict[str, Any]) -> dict[str, Any]:
    """Lay mappings over each other; mappings inside are merged, everything else is replaced."""
    merged = dict(base)
    for layer in layers:
        for key, value in layer.items():
            old = merged.get(key)
            merged[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _matches_one(spec: RunSpec, key: str, wanted: One | Many) -> bool:
    value: Any = spec
    for step in key.split("."):
        if step not in type(value).model_fields:
            raise SpecError(f"A run has no {key!r} to match; use model, task, keep_k, method or calibration.seed, ….")
        value = getattr(value, step)
    options = wanted if isinstance(wanted, tuple) else (wanted,)
    return any(fnmatchcase(value, option) if isinstance(value, str) and isinstance(option, str) else value == option
               for option in options)
