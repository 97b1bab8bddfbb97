"""How an evaluation runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from emo_select.errors import SpecError, UnknownNameError

BACKENDS = ("hf", "vllm")


@dataclass(frozen=True)
class EvalOptions:
    """How a checkpoint is evaluated. The first five decide the numbers, the others the machine.

    `samples` picks documents per task (name -> numbers in the test split) in place of the first `limit`.
    `dtype` "auto" means float32, in which the published evaluation ran. `device_map` spreads a model over devices.
    `token_budget` is the number of new tokens per forward (None: from free memory).
    """

    num_shots: int | None = None
    limit: int | None = None
    samples: Mapping[str, Sequence[int]] | None = None
    max_length: int = 2048
    dtype: str = "float32"
    add_bos_token: bool = False
    backend: str = "hf"
    device: str = "auto"
    device_map: str | None = None
    token_budget: int | None = None
    trust_remote_code: bool = False
    force: bool = False

    def __post_init__(self) -> None:
        if self.limit is not None and self.samples is not None:
            raise SpecError("--limit and --samples exclude each other; leave one out.")
        if self.backend not in BACKENDS:
            raise UnknownNameError("backend", self.backend, BACKENDS)

    @property
    def precision(self) -> str:
        """The dtype of weights and activations."""
        return "float32" if self.dtype == "auto" else self.dtype
