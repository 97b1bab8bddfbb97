"""What a person sees of a run: a bar, a file of metrics, loads of the experts; and the stop where the loss breaks."""

from __future__ import annotations

import json
import math
from collections import deque
from pathlib import Path
from typing import Any

from olmo_core.distributed.utils import get_rank
from olmo_core.train.callbacks import Callback, WandBCallback
from torch import nn

from emo_select.errors import NumericError
from emo_select.pretrain.engine.pools import routers
from emo_select.pretrain.engine.starting import saved_steps
from emo_select.progress import Bar

WINDOW = 64  # steps whose mean loss a spike is measured against
LOADS = 200  # entries of loads.jsonl over a whole run
KEPT = {
    "train/CE loss": "loss", "train/load balancing loss": "balance", "train/router Z loss": "router_z",
    "train/Z loss": "lm_z", "train/routing entropy": "entropy", "train/load imbalance": "peak_load",
    "optim/total grad norm": "gradient_norm", "optim/LR (group 0)": "rate",
    "throughput/device/TPS": "tokens_per_second", "train/masked instances (%)": "masked_instances",
}
BENCHMARKS = "eval/downstream/"  # begins the names of the in-loop benchmarks
FILES = ("metrics.jsonl", "loads.jsonl", "benchmarks.jsonl")
SHOWN = ("loss", "balance", "router_z", "entropy", "peak_load")


class Watch(Callback):  # type: ignore[misc,unused-ignore]
    """Writes `metrics.jsonl` (a line per step), `loads.jsonl` (choices per layer and expert) and `benchmarks.jsonl`
    (scores, each time that benchmarks ran), and moves the bar.

    Raises `NumericError` for a loss that is not finite, or above the mean of the last 64 by more than `spike` nats
    (0: never), naming the last good checkpoint.
    """

    priority = -1

    def __init__(self, model: nn.Module, out: Path, bar: Bar, *, steps: int, micro_batches: int, spike: float) -> None:
        self.out, self.folder, self.bar = out, out / "watch", bar
        self.routers, self.spike = routers(model), spike
        self.per_step = max(1, len(self.routers)) * micro_batches
        self.every = max(1, steps // LOADS)
        self.recent: deque[float] = deque(maxlen=WINDOW)

    def pre_train(self) -> None:
        """Forget what an interrupted run wrote about steps that are done again."""
        self.bar.advance(self.step)
        if get_rank() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            for name in FILES:
                _keep_until(self.folder / name, self.step)

    def pre_epoch(self) -> None:
        """Forget what the engine's rehearsal before the first step has chosen."""
        for router in self.routers:
            router.take_seen()

    def post_step(self) -> None:
        """Every so many steps the choices of all layers since the last time, on this rank."""
        if not self.routers or self.step % self.every:
            return
        loads = [router.take_seen().tolist() for router in self.routers]
        if get_rank() == 0:
            self._append("loads.jsonl", {"step": self.step, "loads": loads})

    def log_metrics(self, step: int, metrics: dict[str, float]) -> None:
        """Metrics of one step, reduced over the ranks."""
        told = {name: metrics[key] for key, name in KEPT.items() if key in metrics}
        self._note_benchmarks(step, metrics)
        if "loss" not in told:
            return
        if "entropy" in told:
            told["entropy"] /= self.per_step  # the engine adds layers and micro-batches
        self._require_sound(step, told["loss"])
        if get_rank() == 0:
            self._append("metrics.jsonl", {"step": step, **{key: round(value, 6) for key, value in told.items()}})
            self.bar.advance(1, "  ".join(f"{name} {told[name]:.3f}" for name in SHOWN if name in told))

    def _note_benchmarks(self, step: int, metrics: dict[str, float]) -> None:
        scores = {key.removeprefix(BENCHMARKS): value for key, value in metrics.items() if key.startswith(BENCHMARKS)}
        if scores and get_rank() == 0:
            self._append("benchmarks.jsonl", {"step": step, **scores})

    def _require_sound(self, step: int, loss: float) -> None:
        usual = sum(self.recent) / len(self.recent) if len(self.recent) == WINDOW else math.inf
        self.recent.append(loss)
        if math.isfinite(loss) and not (self.spike and loss > usual + self.spike):
            return
        raise broken(self.out, step, f"is {loss:.3f}, {loss - usual:.1f} above the last {WINDOW} steps"
                     if math.isfinite(loss) else "is not finite")

    def _append(self, name: str, told: dict[str, Any]) -> None:
        with (self.folder / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(told) + "\n")


class WandB(WandBCallback):  # type: ignore[misc,unused-ignore]
    """The engine's callback; it ends runs with an argument that newer releases of W&B do not know."""

    def finalize(self, exit_code: int = 0) -> None:
        """End the run, once."""
        if not self.finalized:
            self.wandb.finish(exit_code=exit_code)
            self._finalized = True


class TensorBoard(Callback):  # type: ignore[misc,unused-ignore]
    """All metrics of the engine as TensorBoard events, by the first rank; the engine brings no such callback."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.writer: Any = None

    def pre_train(self) -> None:
        """Open the events file; what a resumed run repeats is shown once."""
        if get_rank() == 0:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(self.folder), purge_step=self.step + 1)

    def log_metrics(self, step: int, metrics: dict[str, float]) -> None:
        """Metrics of one step."""
        if self.writer is not None:
            for name, value in metrics.items():
                self.writer.add_scalar(name, value, step)

    def post_train(self) -> None:
        """Close the events file."""
        if self.writer is not None:
            self.writer.close()


def broken(out: Path, step: int, what: str) -> NumericError:
    """The error for a loss that ends the run; it names the last good checkpoint."""
    good = [saved for saved in saved_steps(out) if saved < step]
    where = f"the last good checkpoint is {out / f'step{good[-1]}'}" if good else "there is no checkpoint yet"
    return NumericError(f"The loss of step {step} {what}; {where}. Start a run of its own from it with a lower "
                        "optimizer.learning_rate; --spike 0 lets spikes pass.")


def _keep_until(path: Path, step: int) -> None:
    """Drop entries of later steps, and a line that was being written."""
    if not path.is_file():
        return
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
    path.write_text("".join(kept), encoding="utf-8")
