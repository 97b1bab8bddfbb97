"""Dropping experts beside replacing them by their mean output (MoNE, arXiv 2507.00390), at equal numbers kept.

    python benchmarks/replacing.py [--models demo/emo demo/stdmoe] [--tasks demo_harbor …] [--keep-k 4 8 16] [--limit N]

dropped      the pruned model: the router chooses among kept experts only
constants    the full router; a dropped expert gives its mean output over the calibration tokens that it was given
nothing      the full router; a dropped expert gives zeros, which tells the constants' part of the gain
For all three the kept experts are those of layerwise selection; "by variance" keeps those with the largest product of
frequency and output variance, as the paper does, and replaces the others by constants ("… dropped": leaves them out).
Values are means over the tasks of each one's headline metric on its test documents.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.common import table
from emo_select.checkpoint import open_checkpoint
from emo_select.evaluate.curve import choose, evaluate_masked
from emo_select.evaluate.options import EvalOptions
from emo_select.evaluate.run import Evaluator, load_engine
from emo_select.experts import KeepSet, StreamOptions, calibration_tokens
from emo_select.models import load_tokenizer
from emo_select.models.families import experts_per_layer, family_of, shared_per_layer
from emo_select.spec import Calibration
from emo_select.tasks.registry import get_tasks

TASKS = [f"demo_{name}" for name in ("harbor", "kitchen", "museum", "orchard", "railway", "theater", "village",
                                     "workshop")]
WAYS = ("dropped", "constants", "nothing", "by variance", "by variance, dropped")


@dataclass
class Outputs:
    """Of one layer's experts: how many tokens each was given, sum and sum of squares of its outputs (E, D)."""

    count: torch.Tensor
    total: torch.Tensor
    squares: torch.Tensor

    @property
    def mean(self) -> torch.Tensor:
        """(E, D)."""
        return self.total / self.count.clamp(min=1)[:, None]

    @property
    def importance(self) -> torch.Tensor:
        """Frequency times the variance of the output, summed over its dimensions (E,)."""
        variance = self.squares / self.count.clamp(min=1)[:, None] - self.mean ** 2
        return self.count / self.count.sum() * variance.clamp(min=0).sum(-1)


@contextmanager
def experts_as(model: Any, family: Any, make: Any) -> Iterator[None]:
    """Give every layer's experts the forward `make(layer, forward)` in the body."""
    modules = [layer.get_submodule(family.experts_module) for layer in model.get_decoder().layers]
    old = [module.forward for module in modules]
    try:
        for index, module in enumerate(modules):
            module.forward = make(index, module.forward)
        yield
    finally:
        for module, forward in zip(modules, old, strict=True):
            module.forward = forward


def measured(model: Any, family: Any, config: dict[str, Any], texts: Sequence[Sequence[int]]) -> list[Outputs]:
    """What each expert gives for the tokens that the full model's router sends to it."""
    hidden = config["hidden_size"]
    found = [Outputs(*(torch.zeros(shape, dtype=torch.float64) for shape in ((count,), (count, hidden),
                                                                             (count, hidden))))
             for count in experts_per_layer(config)]

    def recording(layer: int, forward: Any) -> Any:
        def run(tokens: torch.Tensor, index: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
            for expert in index.unique().tolist():
                rows = torch.where(index == expert)[0]
                one = torch.full((len(rows), 1), expert)
                output = forward(tokens[rows], one, torch.ones(len(rows), 1)).double()
                found[layer].count[expert] += len(rows)
                found[layer].total[expert] += output.sum(0)
                found[layer].squares[expert] += (output ** 2).sum(0)
            return forward(tokens, index, gates)
        return run

    with experts_as(model, family, recording), torch.no_grad():
        for ids in texts:
            model(torch.tensor([ids]))
    return found


def replacing(keep_set: KeepSet, constants: Sequence[torch.Tensor]) -> Any:
    """Experts of which those that are not kept give a constant."""
    def make(layer: int, forward: Any) -> Any:
        kept = torch.zeros(len(constants[layer]), dtype=torch.bool)
        kept[list(keep_set.experts[layer] or ())] = True

        def run(tokens: torch.Tensor, index: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
            given = gates * kept[index]
            own = constants[layer].to(tokens.dtype)[index]
            return forward(tokens, index, given) + torch.einsum("tk,tkd->td", gates - given, own)
        return run
    return make


def by_variance(found: Sequence[Outputs], keep_set: KeepSet, config: dict[str, Any]) -> KeepSet:
    """As many experts as `keep_set` has, the shared ones and those of largest importance."""
    layers = []
    for outputs, kept, shared in zip(found, keep_set.experts, shared_per_layer(config), strict=True):
        routed = len(outputs.count) - shared
        best = outputs.importance[:routed].topk(len(kept or ()) - shared).indices.tolist()
        layers.append((*sorted(best), *range(routed, len(outputs.count))))
    return keep_set.model_copy(update={"experts": tuple(layers)})


def values(model: str, task: Any, keep_ks: Sequence[int], options: EvalOptions, folder: Path, engine: Any
           ) -> dict[int, list[float]]:
    """Per keep-k, the task's metric for each of `WAYS`."""
    with open_checkpoint(model) as checkpoint:
        config = checkpoint.config
    family, calibration = family_of(config), Calibration(max_length=512)
    sets = choose(model, task, "layerwise", keep_ks, calibration, StreamOptions(device="cpu"))
    texts = calibration_tokens(task, load_tokenizer(model), calibration).token_ids
    found = measured(engine.model, family, config, texts)
    means, zeros = [one.mean for one in found], [one.mean * 0 for one in found]

    def dropped(keep_set: KeepSet, name: str) -> float:
        metrics = evaluate_masked(engine, config, model, [task], keep_set, folder / name, options)[task.name]
        return float(metrics[task.headline_metric])

    def replaced(keep_set: KeepSet, constants: Sequence[torch.Tensor], name: str) -> float:
        with experts_as(engine.model, family, replacing(keep_set, constants)), Evaluator(
                model, folder / name, options, engine=engine, keep_set=name) as evaluator:
            return float(evaluator.evaluate(task)[task.headline_metric])

    rows = {}
    for keep_k, usual in sets.items():
        other, name = by_variance(found, usual, config), f"{task.name}-{keep_k}"
        rows[keep_k] = [dropped(usual, f"{name}-dropped"), replaced(usual, means, f"{name}-constants"),
                        replaced(usual, zeros, f"{name}-nothing"), replaced(other, means, f"{name}-variance"),
                        dropped(other, f"{name}-variance-dropped")]
    return rows


def main() -> None:
    """Print a table per model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["demo/emo", "demo/stdmoe"])
    parser.add_argument("--tasks", nargs="+", default=TASKS)
    parser.add_argument("--keep-k", nargs="+", type=int, default=[4, 8, 16])
    parser.add_argument("--limit", type=int)
    given = parser.parse_args()
    options = EvalOptions(device="cpu", limit=given.limit)
    for model in given.models:
        engine = load_engine(model, options)
        with tempfile.TemporaryDirectory() as folder:
            found = [values(model, task, given.keep_k, options, Path(folder), engine)
                     for task in get_tasks(given.tasks)]
        means = [[str(keep_k), *(f"{sum(one[keep_k][way] for one in found) / len(found):.3f}"
                                 for way in range(len(WAYS)))] for keep_k in given.keep_k]
        print(f"\n{model}, {len(found)} tasks")
        print(table(means, ["keep-k", *WAYS]))


if __name__ == "__main__":
    main()
