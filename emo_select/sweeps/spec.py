"""What a sweep file says, and the runs it stands for.

    name: main
    models: [{id: allenai/Emo_1b14b_1T, experts: 128}, {id: allenai/Dense_1b_130B, selects: false, keep_k: 32}]
    tasks: [mc9, mmlu]
    keep_k: [8, 12.5%, full]
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

from emo_select import progress
from emo_select.errors import KeepKError, SpecError
from emo_select.names import Names, absolute
from emo_select.spec import (
    Execution,
    Frozen,
    RunSpec,
    checked,
    keep_k_of,
    keep_ks_in,
    listed,
    merge,
    parse_keep_k,
    with_whole_paths,
)
from emo_select.textfile import read_yaml_mapping
from emo_select.tree import Tree

SHIPPED = Path(__file__).parent / "shipped"
One = str | int | bool
Many = tuple[One, ...]


class SweepModel(Frozen):
    """A model of a sweep. One that skips selection is run once per task, under the directory of `keep_k`."""

    id: str
    selects: bool = True
    keep_k: int | None = None
    experts: int | None = None
    """Experts of a full layer: runs that keep as many share all their work. None looks at the model, if it is here."""
    path: str | None = None
    """Where a model that is a folder lies, absolute; found when the file is read."""


class Product(Frozen):
    """Factors of a product of runs; None takes those of the file."""

    models: tuple[SweepModel, ...] | None = None
    tasks: tuple[str, ...] | None = None
    keep_k: tuple[int | str, ...] | None = None
    """Numbers, shares such as 12.5%, or full."""
    methods: tuple[str, ...] | None = None
    variants: tuple[dict[str, Any], ...] | None = None

    @field_validator("models", mode="before")
    @classmethod
    def _ids(cls, value: Any) -> Any:
        items = listed(value) if isinstance(value, str) else value
        return [{"id": item} if isinstance(item, str) else item for item in items] if items is not None else None

    @field_validator("tasks", "methods", mode="before")
    @classmethod
    def _several(cls, value: Any) -> Any:
        """One value, or several with commas, as on the command line."""
        return listed(value) if isinstance(value, str) else value

    @field_validator("keep_k", mode="before")
    @classmethod
    def _numbers(cls, value: Any) -> Any:
        items = [value] if isinstance(value, str | int) else value
        if not isinstance(items, list | tuple):
            return items
        return [part for item in items for part in (keep_ks_in(item) if isinstance(item, str) else [item])]


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


def shipped_names() -> list[str]:
    """Names of the sweeps that come with the package."""
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def sweep_file(name: str) -> Path | None:
    """The file that is meant by a path, or by the name of a shipped sweep (main, sweeps/main.yaml); else None."""
    path = Path(name)
    if path.suffix in (".yaml", ".yml") and (path.exists() or path.stem not in shipped_names()):
        return path
    return SHIPPED / f"{path.stem}.yaml" if path.stem in shipped_names() else None


def read_sweep(path: Path) -> SweepSpec:
    """Read a sweep file. Raises `SpecError` naming the wrong key with its near match."""
    data = read_yaml_mapping(path, SpecError, "a sweep file has `name`, `models`, `tasks`, …")
    return _with_whole_paths(checked(SweepSpec, data), path.parent)


def _with_whole_paths(sweep: SweepSpec, folder: Path) -> SweepSpec:
    """Task files and models by absolute paths, so that the sweep means the same from every directory.

    They are given relative to the sweep file or, where there is none, to the current directory.
    """
    def whole(task: str) -> str:
        beside = folder / task
        return str((beside if beside.exists() else Path(task)).absolute()) if task.endswith((".yaml", ".yml")) else task

    def found(model: SweepModel) -> SweepModel:
        path = model.path or absolute(str(folder / Path(model.id).expanduser())) or absolute(model.id)
        return model.model_copy(update={"path": None if model.id.startswith("demo/") else path})

    def of(product: Product) -> dict[str, Any]:
        return {"tasks": tuple(map(whole, product.tasks)) if product.tasks is not None else None,
                "models": tuple(map(found, product.models)) if product.models is not None else None}

    include = tuple(product.model_copy(update=of(product)) for product in sweep.include)
    return sweep.model_copy(update={**of(sweep), "include": include})


def expand_sweep(sweep: SweepSpec, tree: Tree | None = None) -> list[SweepRun]:
    """Every run of the sweep, once, in the order of the file, named as in `tree` (None: the usual one).

    An `exclude` or override that concerns no run is said. Raises `SpecError` for a product without models or tasks, a
    key that a match or a setting does not have, and where no run is left.
    """
    runs: dict[str, SweepRun] = {}
    experts, used, names = Experts(sweep.execution.get("data_dir")), _Used(), Names(tree or Tree.at())
    for product in (sweep, *sweep.include):
        experts.known |= {model.id: model.experts for model in product.models or () if model.experts}
        experts.paths |= {model.id: model.path for model in product.models or () if model.path}
        for spec in _product(sweep, product, experts, names):
            if not used.any(matches(spec, rule, experts) and used.note("exclude", rule) for rule in sweep.exclude):
                run = _overridden(sweep, spec, experts, used)
                runs.setdefault(run.spec.model_dump_json(), run)
    used.say_unused(sweep)
    if not runs:
        raise SpecError(f"The sweep {sweep.name!r} has no runs: its `exclude` leaves every one out.")
    return list(runs.values())


class Experts:
    """Experts of a full layer by model, as the sweep file says or as this machine knows."""

    def __init__(self, data_dir: str | None = None) -> None:
        self.known: dict[str, int | None] = {}
        self.paths: dict[str, str] = {}
        self._data_dir = data_dir

    def of(self, model: str) -> int | None:
        """None for a model without experts, or one that is not known here."""
        from emo_select.models.shapes import experts_of

        if model not in self.known:
            self.known[model] = experts_of(self.paths.get(model, model), self._data_dir)
        return self.known[model]

    def keep_k(self, model: str, value: int | str) -> int:
        """The number that `value` stands for. Raises `KeepKError` where the model would have to be known."""
        total = self.of(model)
        number = int(value) if isinstance(value, int) or value.isdigit() else None
        if number is None:
            return keep_k_of(model, str(value)) if total is None else parse_keep_k(str(value), total)
        if total is not None and number > total:
            raise KeepKError(f"keep_k {number} is more than the {total} experts per layer of {model}.")
        return number


class _Used:
    """Which excludes and overrides concerned a run; one that concerns none is most likely mistyped."""

    def __init__(self) -> None:
        self._rules: set[str] = set()

    def note(self, kind: str, rule: dict[str, Any]) -> bool:
        """Remember that the rule has matched."""
        self._rules.add(f"{kind} {rule}")
        return True

    @staticmethod
    def any(matched: Iterator[bool]) -> bool:
        """Whether one has matched, after looking at all."""
        return True in list(matched)

    def say_unused(self, sweep: SweepSpec) -> None:
        """Name the rules that no run has matched."""
        wanted = [("exclude", rule) for rule in sweep.exclude] + [("override", one.match) for one in sweep.overrides]
        for kind, rule in wanted:
            if f"{kind} {rule}" not in self._rules:
                progress.say(f"{sweep.name}: the {kind} {_in_words(rule)} concerns no run.")


def _in_words(rule: dict[str, Any]) -> str:
    return ", ".join(f"{key}: {'|'.join(map(str, value)) if isinstance(value, tuple) else value}"
                     for key, value in rule.items()) or "without a match"


def matches(spec: RunSpec, rule: dict[str, Any], experts: Experts | None = None) -> bool:
    """Whether a run has one of the values that the rule gives for each of its keys; `a.b` looks into parts."""
    return all(_matches_one(spec, key, wanted, experts or Experts()) for key, wanted in rule.items())


def _product(sweep: SweepSpec, product: Product, experts: Experts, names: Names) -> Iterator[RunSpec]:
    models, tasks, keep_ks, methods = (
        _factor(sweep, product, name) for name in ("models", "tasks", "keep_k", "methods"))
    called = _task_names(tasks, sweep.execution.get("data_dir"), names)
    for model in models:
        place = names.keys(model.id, model.path)
        chosen = tuple(dict.fromkeys(experts.keep_k(model.id, value) for value in keep_ks)) if model.selects else (
            model.keep_k or next((int(value) for value in keep_ks if str(value).isdigit()), 1),)
        for task in called:
            for keep_k in chosen:
                for method in methods if model.selects else methods[:1]:
                    for variant in _factor(sweep, product, "variants", ({},)):
                        base = {**place, "task": task, "keep_k": keep_k, "method": method}
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


def _task_names(tasks: Sequence[str], data_dir: str | None, names: Names) -> list[str]:
    from emo_select.tasks import get_tasks

    return [names.task(task) for task in get_tasks(list(tasks), data_dir)]


def _overridden(sweep: SweepSpec, spec: RunSpec, experts: Experts, used: _Used) -> SweepRun:
    from emo_select.tasks import task_file

    settings: dict[str, Any] = {}
    execution = {"task_file": task_file(spec.task), **sweep.execution}
    for override in sweep.overrides:
        if matches(spec, override.match, experts) and used.note("override", override.match):
            settings = merge(settings, override.settings)
            execution = merge(execution, override.execution)
    final = with_whole_paths(RunSpec.parse(merge(spec.model_dump(), settings)))
    return SweepRun(spec=final, execution=checked(Execution, execution), keeps_all=_keeps_all(final, experts))


def _keeps_all(spec: RunSpec, experts: Experts) -> bool:
    """Whether a run is known to keep all experts."""
    if not spec.selects or spec.num_shared is not None:
        return False
    total = experts.of(spec.model)
    return total is not None and spec.keep_k >= total


def _matches_one(spec: RunSpec, key: str, wanted: One | Many, experts: Experts) -> bool:
    value: Any = spec
    for step in key.split("."):
        if step not in type(value).model_fields:
            raise SpecError(f"A run has no {key!r} to match; use model, task, keep_k, method or calibration.seed, ….")
        value = getattr(value, step)
    options = wanted if isinstance(wanted, tuple) else (wanted,)
    if key == "keep_k":
        options = tuple(experts.keep_k(spec.model, option) for option in options)
    return any(fnmatchcase(value, option) if isinstance(value, str) and isinstance(option, str) else value == option
               for option in options)
