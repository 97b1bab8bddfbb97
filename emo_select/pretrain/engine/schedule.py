"""The rate of annealing as a scheduler of the engine."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from olmo_core.optim.scheduler import Scheduler


@Scheduler.register("emo_select_linear_to_zero")
@dataclass
class LinearToZero(Scheduler):
    """rate · (steps - j) / steps in step first_step + j, j = 1, ..., steps: the last step has rate 0.

    `warmup` steps at the start rise linearly to that line, for a start without optimiser state.
    """

    first_step: int = 0
    rate: float = 0.0
    steps: int = 1
    warmup: int = 0

    def get_lr(self, initial_lr: float | torch.Tensor, current: int, t_max: int) -> float | torch.Tensor:
        """The rate of step `current`; what the optimiser holds as its first rate has no say."""
        del initial_lr, t_max
        done = min(max(current - self.first_step, 0), self.steps)
        rate = self.rate * (self.steps - done) / self.steps
        return rate * min(1.0, done / self.warmup) if self.warmup else rate
