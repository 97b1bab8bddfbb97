"""What `emo-select pretrain --config` reads. Every key is checked; unknown ones are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from emo_select.errors import SpecError
from emo_select.textfile import read_yaml_mapping


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Architecture(_Strict):
    """Sizes of the model. `num_experts` and `num_experts_per_tok` include the shared experts."""

    hidden_size: int = Field(gt=0)
    intermediate_size: int = Field(gt=0)
    num_hidden_layers: int = Field(gt=0)
    num_attention_heads: int = Field(gt=0)
    num_experts: int = Field(gt=1)
    num_shared_experts: int = Field(ge=0)
    num_experts_per_tok: int = Field(gt=0)
    initializer_range: float = Field(gt=0)
    rope_theta: float = Field(default=10000.0, gt=0)

    @property
    def num_routed(self) -> int:
        return self.num_experts - self.num_shared_experts

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.hidden_size % (2 * self.num_attention_heads):
            raise ValueError(f"hidden_size {self.hidden_size} does not split into {self.num_attention_heads} "
                             "attention heads of even width")
        if not self.num_shared_experts < self.num_experts_per_tok <= self.num_experts:
            raise ValueError("num_experts_per_tok must lie above num_shared_experts and not above num_experts")
        return self


class Pool(_Strict):
    """Bounds of the number of routed experts that a document may use."""

    smallest: int = Field(gt=0)
    largest: int = Field(gt=0)


class Objective(_Strict):
    """Weights of the losses. Without `pool` a standard MoE is trained."""

    pool: Pool | None
    balance_weight: float = Field(ge=0)
    z_weight: float = Field(ge=0)


class Documents(_Strict):
    """How many documents a step sees, and how many facts each states."""

    per_step: int = Field(gt=0)
    facts: int = Field(gt=0)


class Optimizer(_Strict):
    """AdamW with linear warm-up and cosine decay to `final_fraction` of the learning rate."""

    steps: int = Field(gt=0)
    learning_rate: float = Field(gt=0)
    warmup_steps: int = Field(ge=0)
    final_fraction: float = Field(ge=0, le=1)
    beta2: float = Field(gt=0, lt=1)
    weight_decay: float = Field(ge=0)
    clip: float = Field(gt=0)


class PretrainConfig(_Strict):
    """One pretraining run. `dtype` is that of the published weights; training itself is in fp32."""

    name: str = Field(pattern=r"^[A-Za-z0-9_-]+$")
    seed: int = Field(ge=0)
    dtype: Literal["float32", "bfloat16"]
    save_every: int = Field(gt=0, description="Steps between two states that training can go on from.")
    model: Architecture
    objective: Objective
    data: Documents
    optimizer: Optimizer

    @model_validator(mode="after")
    def _pool_fits(self) -> Self:
        pool, needed = self.objective.pool, self.model.num_experts_per_tok - self.model.num_shared_experts
        if pool and not needed <= pool.smallest <= pool.largest <= self.model.num_routed:
            raise ValueError(f"pool sizes must lie between the {needed} routed experts per token and the "
                             f"{self.model.num_routed} routed experts, smallest first")
        return self


def read_config(path: Path) -> PretrainConfig:
    """Read a YAML file. Raises `SpecError` with the first wrong key."""
    try:
        return PretrainConfig.model_validate(read_yaml_mapping(path, SpecError))
    except ValidationError as error:
        raise SpecError(f"{path}: {_first(error.errors()[0])}.") from None


def _first(error: Any) -> str:
    where = ".".join(map(str, error["loc"]))
    return f"{where}: {error['msg']}" if where else str(error["msg"])
