"""How a stream runs: device, precision, memory. None of it changes what is computed, up to rounding."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from emo_select.errors import SpecError
from emo_select.spec import parse_bytes

if TYPE_CHECKING:
    import torch

TOKENS_PER_BATCH = {"cpu": 2048, "cuda": 32768}  # on a CPU, what its cache holds
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class StreamOptions:
    """Settings of one streamed pass.

    Attributes:
        device: "auto" (a GPU if there is one), "cpu", "cuda" or "cuda:N".
        dtype: precision of weights and activations; "auto" is bfloat16 on a GPU and float32 elsewhere.
        memory_budget: bytes of hidden states kept in memory ("8GB" or a number); the rest goes to a scratch file.
            None allows half of the free memory.
        token_budget: padded tokens per batch; None takes a size that suits the device.
        scratch: folder of the scratch file; None is the system's.
    """

    device: str = "auto"
    dtype: str = "auto"
    memory_budget: str | int | None = None
    token_budget: int | None = None
    scratch: Path | None = None

    def __post_init__(self) -> None:
        self.budget_bytes()  # a wrong size is said before anything is read

    def torch_device(self) -> torch.device:
        """The device to compute on; SpecError if it does not exist."""
        import torch

        if self.device == "auto":
            return torch.device("cuda", _local_rank()) if torch.cuda.is_available() else torch.device("cpu")
        try:
            device = torch.device(self.device)
        except RuntimeError:
            raise SpecError(f"Unknown device {self.device!r}; write auto, cpu, cuda or cuda:N.") from None
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise SpecError(f"There is no device {self.device!r} here; write --device cpu.")
        return torch.device("cuda", _local_rank()) if device == torch.device("cuda") else device

    def torch_dtype(self) -> torch.dtype:
        """The precision to compute in."""
        import torch

        if self.dtype == "auto":
            return torch.bfloat16 if self.torch_device().type == "cuda" else torch.float32
        if self.dtype not in DTYPES:
            raise SpecError(f"Unknown dtype {self.dtype!r}; write auto, {', '.join(DTYPES)}.")
        found: torch.dtype = getattr(torch, self.dtype)
        return found

    def batch_tokens(self) -> int:
        """Padded tokens per batch."""
        return self.token_budget or TOKENS_PER_BATCH.get(self.torch_device().type, 2048)

    def budget_bytes(self) -> int | None:
        """`memory_budget` as a number."""
        return parse_bytes(self.memory_budget) if isinstance(self.memory_budget, str) else self.memory_budget


def _local_rank() -> int:
    import os

    return int(os.environ.get("LOCAL_RANK", "0"))
