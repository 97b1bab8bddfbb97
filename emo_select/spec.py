"""What a run is: a frozen value, and the directory name that the published system would give it.

A `RunSpec` says *what* is computed and is a run's identity. `Execution` says *how* (device, batch sizes, threads)
and never enters an identity: the same spec on another machine is the same run.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from emo_select import progress
from emo_select.errors import KeepKError, SpecError, UnknownNameError

METHODS = ("layerwise", "easy_ep", "random", "global", "frequency", "gate_mass", "ean", "reap",
           "reap_renormalised")
SCORES = ("router_probability", "frequency", "gate_mass", "easy_ep", "ean", "reap", "reap_renormalised")

_NAME = re.compile(
    r"(?P<task>.+)_keepk_(?P<keep_k>\d+)_bs-(?P<batch>\d+)_lr-(?P<lr>[^_]+)_epoch-(?P<epochs>[^_]+)"
    r"_selectivemode-(?P<method>[a-z_]+?)"
    r"(?:_nselective-(?P<examples>\d+))?(?:_pseed-(?P<seed>\d+))?"
    r"(?:_pshots-(?P<shots>\d+))?(?:_eshots-(?P<eval_shots>\d+))?(?:_variant-(?P<variant>[0-9a-f]{8}))?"
)


Seed = Annotated[int, Field(ge=0, lt=2**32)]  # what every generator takes
_UNITS = {"": 1, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
T = TypeVar("T", bound=BaseModel)


if TYPE_CHECKING:
    from pydantic._internal._model_construction import ModelMetaclass
else:
    ModelMetaclass = type(BaseModel)


class _OneSentence(ModelMetaclass):
    """Makes a call with wrong values end in one `SpecError` sentence; inside a larger value, that one says where."""

    if not TYPE_CHECKING:  # a type checker goes by the fields

        def __call__(cls, *args, **values):
            try:
                return super().__call__(*args, **values)
            except ValidationError as error:
                raise SpecError(_sentence(cls, error)) from None


class Frozen(BaseModel, metaclass=_OneSentence):
    """Base of all settings: immutable, and an unknown key is an error rather than a lost option."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Calibration(Frozen):
    """Which texts expert selection sees."""

    num_examples: Annotated[int, Field(ge=1)] | None = None
    """The first N of a seeded permutation of the task's selection split; None takes all."""
    seed: Seed = 0
    """Seed of that permutation, and of random selection."""
    num_shots: Annotated[int, Field(ge=0)] | None = None
    """Few-shot examples before each text; None takes the task's own number."""
    leave_out_shots: bool = False
    """Without the rows that stand in their own prompt as an example, for training too; the published runs have them."""
    file: str | None = None
    """Own texts (.jsonl, .txt, .parquet) in place of the task's."""
    max_length: Annotated[int, Field(ge=1)] = 4096
    """Tokens per text; longer texts lose their tail."""
    thinking: bool | None = None
    """Whether the model thinks in the chats of `file`; must be said where it holds chats."""


class Lora(Frozen):
    """Low-rank adapters in place of full finetuning."""

    rank: Annotated[int, Field(ge=1)] = 16
    alpha: Annotated[float, Field(gt=0)] = 32.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    targets: tuple[str, ...] = ("attention", "dense", "experts")
    router: bool = False
    shared: bool = False
    merge: bool = False


class Training(Frozen):
    """The finetuning recipe (EMO paper, finetuning appendix); every default is the published value."""

    epochs: Annotated[float, Field(gt=0)] = 1
    batch_size: Annotated[int, Field(ge=1)] = 32
    """Examples per optimiser step, over all devices and accumulated micro-batches."""
    learning_rate: str = "5e-5"
    """As typed, because the directory name carries it as typed."""
    warmup: Annotated[float, Field(ge=0, le=1)] = 0.1
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    clip: Annotated[float, Field(gt=0)] = 1.0
    max_length: Annotated[int, Field(ge=2)] = 4095
    freeze: Literal["none", "routed", "routed_shared", "routed_shared_router"] = "none"
    checkpoints: Annotated[int, Field(ge=1)] = 1
    """Evenly spaced checkpoints after training starts; checkpoint-0, the pruned model, always exists."""
    seed: Seed = 0
    packing: bool = False
    lora: Lora | None = None
    file: str | None = None
    """Own examples (JSONL) in place of the task's training split."""
    loss_limit: Annotated[float, Field(gt=0)] = 100.0
    """Training stops when the loss of a step exceeds this, or is not a number."""

    @field_validator("learning_rate", mode="before")
    @classmethod
    def _as_typed(cls, value: Any) -> Any:
        """A number, as a file or a program gives it, in the spelling of the published names: 5e-5, 0.001."""
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return re.sub(r"e([+-])0*", lambda sign: "e" + sign[1].strip("+"), f"{value:.12g}") if is_number else value

    @field_validator("learning_rate")
    @classmethod
    def _readable_rate(cls, value: str) -> str:
        if not re.fullmatch(r"[0-9.]+(e-?[0-9]+)?", value) or not 0 < float(value) < float("inf"):
            raise ValueError(f"learning rate {value!r} is not a positive number such as 5e-5")
        return value

    @property
    def lr(self) -> float:
        """The learning rate as a number."""
        return float(self.learning_rate)


class Evaluation(Frozen):
    """How checkpoints are scored."""

    num_shots: Annotated[int, Field(ge=0)] | None = None
    """Few-shot examples per prompt; None takes the task's own number."""
    limit: Annotated[int, Field(ge=1)] | None = None
    """Only the first N test documents."""
    max_length: Annotated[int, Field(ge=2)] = 2048


class Execution(Frozen):
    """How a run is carried out; changes speed and memory, not what is computed (up to rounding)."""

    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    num_gpus: Annotated[int, Field(ge=0)] | None = None
    micro_batch_size: Annotated[int, Field(ge=1)] | None = None
    memory_budget: str | None = None
    data_dir: str | None = None
    task_file: str | None = None
    """Where the file of a user's own task lies; by its name alone, it would be looked for here and in `data_dir`."""
    trust_remote_code: bool = False
    report_to: Literal["none", "tensorboard", "wandb", "trackio"] = "none"
    gradient_checkpointing: bool = True
    plots: bool = False
    """Draw pictures of what was measured, beside it."""
    prediction_layers: Literal["drop", "prune", "keep"] | None = None
    """What pruning does to layers that guess further tokens, which no stage here runs; None: as before, else "drop"."""
    master_weights: bool = True
    """Finetuning in bfloat16 keeps float32 weights and casts them for each product; False trains bfloat16 weights."""

    @field_validator("memory_budget")
    @classmethod
    def _readable_size(cls, value: str | None) -> str | None:
        if value is not None:
            parse_bytes(value)
        return value


class RunSpec(Frozen):
    """One run: one model, one task, one keep-k, one method, one recipe."""

    model: str
    """As the user gave it: Hub id, folder or demo/NAME."""
    task: str
    """Its name in the tree."""
    keep_k: Annotated[int, Field(ge=1)]
    """Experts kept per layer, shared ones included. "16", "12.5%" and "full" become the model's number."""
    method: str = "layerwise"
    score: str = "router_probability"
    """What layerwise ranks by."""
    num_shared: Annotated[int, Field(ge=0)] | None = None
    """Shared experts kept per layer; None keeps all of them."""
    selects: bool = True
    """False for a model that skips selection (dense, or matched in size): it is finetuned and evaluated as it is."""
    model_path: str | None = None
    """Where `model` lies, absolute, if it is a folder."""
    model_folder: str | None = None
    """Its folder in the tree where the published one belongs to another model."""
    calibration: Calibration = Calibration()
    training: Training = Training()
    evaluation: Evaluation = Evaluation()

    @model_validator(mode="before")
    @classmethod
    def _counted(cls, data: Any) -> Any:
        """Turn a keep-k as typed into a number; for a share, the model's config.json has to be at hand."""
        if isinstance(data, dict) and isinstance(data.get("keep_k"), str) and isinstance(data.get("model"), str):
            return {**data, "keep_k": keep_k_of(data["model"], data["keep_k"])}
        return data

    @field_validator("method")
    @classmethod
    def _known_method(cls, value: str) -> str:
        if value not in METHODS:
            raise UnknownNameError("method", value, METHODS)
        return value

    @field_validator("score")
    @classmethod
    def _known_score(cls, value: str) -> str:
        if value not in SCORES:
            raise UnknownNameError("score", value, SCORES)
        return value

    @classmethod
    def parse(cls, data: dict[str, Any]) -> RunSpec:
        """Build a spec from plain data; a wrong or unknown key becomes one `SpecError` sentence."""
        return checked(cls, data)

    @property
    def model_directory(self) -> str:
        """Folder of the model below the tree's root."""
        return self.model_folder or model_directory(self.model)

    @property
    def source(self) -> str:
        """What to open: the same model from every directory."""
        return self.model_path or self.model

    @property
    def directory_name(self) -> str:
        """The published run name, plus `_variant-…` where the spec says more than published names can."""
        train, chosen = self.training, self.calibration
        name = (
            f"{self.task}_keepk_{self.keep_k}_bs-{train.batch_size}_lr-{train.learning_rate}"
            f"_epoch-{train.epochs:g}_selectivemode-{self.method}"
        )
        calibrated = self.method != "random"
        if calibrated and chosen.num_examples is not None:
            name += f"_nselective-{chosen.num_examples}"
        if calibrated and chosen.seed != 0:
            name += f"_pseed-{chosen.seed}"
        if calibrated and self.selects and chosen.num_shots is not None:
            name += f"_pshots-{chosen.num_shots}"
        if self.evaluation.num_shots is not None:
            name += f"_eshots-{self.evaluation.num_shots}"
        variant = self.variant
        return f"{name}_variant-{variant}" if variant else name

    @property
    def activations_name(self) -> str:
        """Folder of the calibration statistics, shared by every keep-k and every one-pass method."""
        chosen = self.calibration
        name = self.task
        name += f"_nselective-{chosen.num_examples}" if chosen.num_examples is not None else ""
        name += f"_pseed-{chosen.seed}" if chosen.seed else ""
        name += f"_pshots-{chosen.num_shots}" if chosen.num_shots is not None else ""
        unnamed = ("leave_out_shots", "file", "max_length", "thinking")
        extra = {key: value for key, value in _non_defaults(chosen).items() if key in unnamed}
        return f"{name}_variant-{_digest(extra)}" if extra else name

    @property
    def variant(self) -> str | None:
        """Eight hex digits over every setting that differs from its default and has no place in the published name."""
        extra = self._unnamed()
        return _digest(extra) if extra else None

    def _unnamed(self) -> dict[str, Any]:
        extra: dict[str, Any] = {}
        if self.num_shared is not None:
            extra["num_shared"] = self.num_shared
        if self.score != "router_probability":
            extra["score"] = self.score
        named = {
            "calibration": {"num_examples", "num_shots"} | ({"seed"} if self.method != "random" else set()),
            "training": {"batch_size", "learning_rate", "epochs"},
            "evaluation": {"num_shots"},
        }
        if self.method == "random":
            named["calibration"] |= {"file", "max_length", "thinking"}  # a random choice sees no texts
        for part, fields in named.items():
            rest = {key: value for key, value in _non_defaults(getattr(self, part)).items() if key not in fields}
            extra |= {part: rest} if rest else {}
        return extra


def with_whole_paths(spec: RunSpec) -> RunSpec:
    """The spec with the user's own files by absolute paths, so that it means the same from every directory."""
    update: dict[str, Any] = {}
    for part in ("calibration", "training"):
        settings = getattr(spec, part)
        if settings.file is not None:
            whole = os.path.normpath(Path(settings.file).expanduser().absolute())
            update[part] = settings.model_copy(update={"file": whole})
    return spec.model_copy(update=update)


class RunName(Frozen):
    """What a run directory's name says, for trees without `run.json`."""

    task: str
    keep_k: int
    batch_size: int
    learning_rate: str
    epochs: float
    method: str
    num_examples: int | None = None
    seed: int = 0
    num_shots: int | None = None
    eval_shots: int | None = None
    variant: str | None = None


def parse_directory_name(name: str) -> RunName | None:
    """Read a run directory's name, or return None where it is not one."""
    found = _NAME.fullmatch(name)
    if found is None:
        return None
    part = found.groupdict()
    try:
        epochs = float(part["epochs"])
    except ValueError:
        return None
    return RunName(
        task=part["task"],
        keep_k=int(part["keep_k"]),
        batch_size=int(part["batch"]),
        learning_rate=part["lr"],
        epochs=epochs,
        method=part["method"],
        num_examples=_number(part["examples"]),
        seed=int(part["seed"] or 0),
        num_shots=_number(part["shots"]),
        eval_shots=_number(part["eval_shots"]),
        variant=part["variant"],
    )


def model_directory(model: str) -> str:
    """A model's folder name: its id without anything but letters, digits, `_` and `-`."""
    name = re.sub(r"[^A-Za-z0-9_-]", "", model)
    if not name:
        raise SpecError(f"The model name {model!r} has no letter or digit to name its folder by.")
    return name


def listed(values: str | Iterable[str]) -> list[str]:
    """Flatten repeated and comma-separated values."""
    several = [values] if isinstance(values, str) else values
    return [part.strip() for value in several for part in value.split(",") if part.strip()]


def keep_ks_in(values: str | Iterable[str]) -> list[str]:
    """Flatten repeated and comma-separated keep-k.

    A number before a share may be meant as one with a decimal comma. Raises `KeepKError` where that is likely, because
    the share is a half, quarter, eighth, … (12,5% or 6,25%); elsewhere (4,50%) it is said how it is read.
    """
    several = [values] if isinstance(values, str) else list(values)
    for value in several:
        for found in re.finditer(r"(?<![\w.%])(\d+),(\d+)%", value):
            share = Fraction(f"{found[1]}.{found[2]}") / 100
            if share < 1 and share.denominator.bit_count() == 1:  # a power of two, as numbers of experts are
                raise KeepKError(f"keep-k {found[0]!r} can be read in two ways: write {found[1]}.{found[2]}% for a "
                                 f"share, or --keep-k {found[1]} --keep-k {found[2]}% for two numbers.")
            progress.say(f"keep-k {value!r} is read as {', '.join(listed(value))}; shares have a decimal point.")
    return listed(several)


def keep_k_of(model: str, text: str) -> int:
    """The number of experts that `16`, `12.5%` or `full` stands for in a model of which config.json is at hand.

    Raises:
        KeepKError: a share, and neither the model nor its shapes are on this machine; or one that cannot be kept.
    """
    if text.strip().isdigit():
        return int(text)
    from emo_select.models.shapes import experts_of  # looks into a file, which a number never needs

    total = experts_of(model)
    if total is None:
        raise KeepKError(f"keep-k {text} needs to know how many experts {model} has, and it is not on this machine; "
                         "give a number.")
    return parse_keep_k(text, total)


def parse_keep_k(text: str, num_experts: int) -> int:
    """Turn `16`, `12.5%` or `full` into a number of experts, for a model with `num_experts` per layer."""
    if text == "full":
        return num_experts
    if text.endswith("%"):
        return _share_of(text, num_experts)
    try:
        return int(text)
    except ValueError:
        raise KeepKError(f"keep-k {text!r} is neither a number, nor a percentage such as 12.5%, nor 'full'.") from None


def checked(kind: type[T], data: dict[str, Any]) -> T:
    """Validate plain data as `kind`; the first problem becomes one `SpecError` with the near match of a wrong key."""
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise SpecError(_sentence(kind, error)) from None


def merge(base: dict[str, Any], *layers: dict[str, Any]) -> dict[str, Any]:
    """Lay mappings over each other; mappings inside are merged, everything else is replaced."""
    merged = dict(base)
    for layer in layers:
        for key, value in layer.items():
            old = merged.get(key)
            merged[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def digest(value: Any) -> str:
    """Sixteen hex digits over any JSON value, independent of key order: the project's fingerprint of plain data."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def _digest(extra: dict[str, Any]) -> str:
    return digest(extra)[:8]


def _number(text: str | None) -> int | None:
    return None if text is None else int(text)


def _non_defaults(part: BaseModel) -> dict[str, Any]:
    return part.model_dump(mode="json", exclude_defaults=True)


def parse_bytes(text: str) -> int:
    """`8GB`, `512MiB` or a plain number of bytes. Raises `SpecError` for anything else."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?I?)B?\s*", text.upper())
    if match is None or match[2] not in _UNITS or len(match[1]) > 30:
        raise SpecError(f"{text!r} is not a size; write for example 8GB or 512MiB.")
    return int(float(match[1]) * _UNITS[match[2]])


def _share_of(text: str, num_experts: int) -> int:
    if not re.fullmatch(r"[0-9]{1,30}(\.[0-9]{1,30})?%", text):
        raise KeepKError(f"keep-k {text!r} is not a percentage such as 12.5%.")
    exact = Fraction(text[:-1]) * num_experts / 100
    kept = round(exact)
    if kept < 1 or kept > num_experts:
        raise KeepKError(f"keep-k {text} of {num_experts} experts is {float(exact):g}; choose 1 to {num_experts}.")
    return kept


def _sentence(kind: type[BaseModel], error: ValidationError) -> str:
    errors = error.errors()
    first = next((one for one in errors if one["type"] == "extra_forbidden"), errors[0])  # mistyped, so one is missing
    where = ".".join(str(step) for step in first["loc"]) or kind.__name__
    if first["type"] == "extra_forbidden":
        return str(UnknownNameError("key", where, _keys_at(kind, first["loc"])))
    return f"{where}: {first['msg'].removeprefix('Value error, ')} (got {first['input']!r})."


def _keys_at(kind: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    for step in loc[:-1]:
        field = kind.model_fields.get(str(step))
        inner = getattr(field, "annotation", None)
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            return []
        kind = inner
    return [".".join([*map(str, loc[:-1]), name]) for name in kind.model_fields]
