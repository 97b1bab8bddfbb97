"""What a router computes: a score for every expert, and the choice that the experts are called with.

Routers differ (softmax or sigmoid, top-k first, groups, corrections, experts that compute nothing), so none of it is
computed again: the softmax or sigmoid is noted while the router itself runs, and the choice is what its block then
calls the experts with.

Legend: T tokens, E experts of the layer, K experts per token.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from emo_select.errors import ModelError

ACTIVATIONS = ("softmax", "sigmoid", "sqrt")  # the last one for the root of softplus


@dataclass(frozen=True)
class Scores:
    """What a router thinks of every expert, before it chooses.

    `logits` (T, E); `probabilities` (T, E) in fp32; `activation`: the function that made them of the logits.
    """

    logits: Tensor
    probabilities: Tensor
    activation: str


@dataclass(frozen=True)
class Routing:
    """A router's scores, and its choice: `gates` and `index` (T, K). An index of E or more is no expert."""

    scores: Scores
    gates: Tensor
    index: Tensor

    def rows(self, places: Tensor | None) -> Routing:
        """That of some of the tokens; None: of all."""
        if places is None:
            return self
        chosen = [values.index_select(0, places.to(values.device)) for values in (
            self.scores.logits, self.scores.probabilities, self.gates, self.index)]
        return Routing(Scores(chosen[0], chosen[1], self.scores.activation), chosen[2], chosen[3])


class ExpertsReached(Exception):
    """Raised where experts would run, in a run that only asks the router."""


class Ear:
    """Listens to the router of a layer with E experts, in whichever thread it runs.

    `scored` is told its scores; `chosen` the gates and index, where the router and not the call of the experts says
    them.
    """

    def __init__(self, router: nn.Module, experts: int, scored: Callable[[Scores], None] | None = None,
                 chosen: Callable[[Tensor, Tensor], None] | None = None) -> None:
        self.router, self._plain = router, router.forward
        self._experts, self._scored, self._chosen, self._of_thread = experts, scored, chosen, threading.local()
        router.forward = self._forward

    def ask(self, run: Callable[[], Any]) -> Routing:
        """The routing of `run`, which calls the block of this router with `Nowhere` in place of its experts."""
        try:
            run()
        except ExpertsReached as reached:
            gates, index = choice(self._of_thread.output, *reached.args)
            return Routing(self._of_thread.scores, gates, index)
        raise ModelError("The layer does not call its experts, so it cannot be asked whom it would choose.")

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        with _Heard() as heard:
            output = self._plain(*args, **kwargs)
        self._of_thread.output = output
        self._of_thread.scores = scores_of(heard.notes, output, self._experts)
        if self._scored is not None:
            self._scored(self._of_thread.scores)
        if self._chosen is not None and says_gates(output):
            self._chosen(*choice(output))
        return output


def says_gates(output: Any) -> bool:
    """Whether a router returns the gates of all experts, of which most are zero, beside their logits."""
    return isinstance(output, tuple) and len(output) == 2 and output[0].shape == output[1].shape


class Nowhere(nn.Module):
    """Stands in for a layer's experts where the run ends with the question whom the router chose."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Never returns."""
        raise ExpertsReached(*args, *kwargs.values())


def choice(output: Any, *called: Any) -> tuple[Tensor, Tensor]:
    """Gates and index (T, K) from the arguments of the experts: hidden states, index, gates.

    Experts that are called with hidden states alone got them multiplied by gates, which the router says for all.
    """
    if len(called) > 2:
        return called[2].reshape(-1, called[2].shape[-1]), called[1].reshape(-1, called[1].shape[-1])
    every: Tensor = output[0]
    gates, index = every.topk(int((every != 0).sum(dim=-1).max()), dim=-1)
    return gates, index


def scores_of(notes: Sequence[tuple[str, Tensor, Tensor]], output: Any, experts: int) -> Scores:
    """Scores from the activations that a router computed, (name, input, result), and its output.

    The last activation over all experts counts (what it has behind them, zero or shared experts, is left out), or else
    several that cover them part by part. Where a router only looks at its top-k, the same function of all logits.
    """
    flat = [(name, _rows(before), _rows(after)) for name, before, after in notes if not before.isneginf().any()]
    for name, before, after in reversed(flat):
        if (after.shape[-1] >= experts and name != "sqrt") or after.shape[-1] == experts:
            return Scores(before[:, :experts], after[:, :experts].float(), name)
    said = output[1] if says_gates(output) else output[0] if isinstance(output, tuple) else output
    logits = _rows(said)[:, :experts]
    if sum(after.shape[-1] for _, _, after in flat) == experts:
        return Scores(logits, torch.cat([after.float() for _, _, after in flat], dim=-1), flat[0][0])
    activation = notes[-1][0] if notes else "softmax"
    wide = logits.float()
    return Scores(logits, wide.sigmoid() if activation == "sigmoid" else wide.softmax(dim=-1), activation)


def _rows(values: Tensor) -> Tensor:
    return values.reshape(-1, values.shape[-1])


class _Heard(TorchFunctionMode):
    """Notes every activation function that is called meanwhile in this thread."""

    def __init__(self) -> None:
        super().__init__()
        self.notes: list[tuple[str, Tensor, Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") in ACTIVATIONS and args:
            self.notes.append((func.__name__, args[0], result))
        return result
