"""Keep sets in the forms that serving engines and other pruning programs read; docs/use.md says which reads what.

All speak of the experts of the unpruned model by its own numbers. L layer, E experts of a layer, K kept ones.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from emo_select.checkpoint import resolve
from emo_select.checkpoint.reader import read_config
from emo_select.errors import CheckpointError, KeepKError, SpecError, UnknownNameError
from emo_select.experts.keepset import KeepSet, check_keep_set
from emo_select.experts.provenance import MASK
from emo_select.models.families import experts_per_layer
from emo_select.progress import say
from emo_select.storage import read_json

Layers = Mapping[int, "Layer"]


class Layer:
    """One MoE layer: how many experts it has, and those that stay, best first where scores are known."""

    def __init__(self, count: int, kept: Sequence[int], scores: Sequence[float] | None = None) -> None:
        def rank(expert: int) -> tuple[float, int]:
            return (-scores[expert] if scores else 0, expert)

        self.count = count
        self.kept = sorted(kept, key=rank)
        self.dropped = sorted(set(range(count)) - set(kept), key=rank)


def keep_list(source: Path, form: str, model: str | None = None) -> str:
    """The text of a keep list in the form "mask", "jsonl", "ordered" or "profile".

    `source` is a run directory, a selection.json or a folder with one, or a pruned checkpoint, whose experts go by the
    numbers of the first original model. `model` is needed where a selection does not say what it was made on.

    Raises:
        UnknownNameError, SpecError, CheckpointError, KeepKError: there is no such form, no keep set, or it does not
            fit the model or the form.
    """
    if form not in FORMS:
        raise UnknownNameError("keep list format", form, FORMS)
    return FORMS[form](_layers(source, model))


def prune_ratio(layers: Layers) -> float:
    """The ratio for engines that keep int(E · (1 − ratio)) experts of an ordered list in every layer.

    Raises `KeepKError` where layers keep different numbers: one ratio cannot say so.
    """
    sizes = {(layer.count, len(layer.kept)) for layer in layers.values()}
    if len(sizes) > 1:
        raise KeepKError("Layers keep different numbers of experts, and an ordered list has one ratio for all; use "
                         "the format jsonl or profile.")
    [(count, kept)] = sizes
    return max(0.0, round(1 - (kept + 0.5) / count, 6))  # half an expert away from where rounding could lose one


def _mask(layers: Layers) -> str:
    return json.dumps([[int(expert in layer.kept) for expert in range(layer.count)] for layer in layers.values()]
                      ) + "\n"


def _jsonl(layers: Layers) -> str:
    return "".join(json.dumps({str(number): layer.kept}) + "\n" for number, layer in layers.items())


def _ordered(layers: Layers) -> str:
    ratio = prune_ratio(layers)
    say(f"The ratio that goes with this list is {ratio:g}: vLLM-Ascend takes --additional-config "
        f'\'{{"expert_list_file": "FILE", "expert_prune_ratio": {ratio:g}}}\'.')
    return "".join(json.dumps({str(number): [*layer.kept, *layer.dropped]}) + "\n" for number, layer in layers.items())


def _profile(layers: Layers) -> str:
    dropped = [[number, expert] for number, layer in layers.items() for expert in sorted(layer.dropped)]
    return json.dumps({"version": 1, "pruned_experts": dropped}) + "\n"


FORMS: Mapping[str, Callable[[Layers], str]] = {"mask": _mask, "jsonl": _jsonl, "ordered": _ordered,
                                                "profile": _profile}


def _layers(source: Path, model: str | None) -> dict[int, Layer]:
    selection = source if source.is_file() else source / "selection.json"
    pruned = next((folder for folder in (source, source / "selected_model") if (folder / MASK).is_file()), None)
    if not selection.is_file() and pruned is not None:
        return _of_mask(read_json(pruned / MASK))
    if not selection.is_file():
        raise CheckpointError(f"{source} has no selection.json and no {MASK}; give a run directory, a selection or a "
                              "pruned model.")
    keep_set = KeepSet.load(selection)
    named = model or keep_set.model
    if named is None:
        raise SpecError(f"{selection} does not say which model it is for; name it with --model.")
    config = read_config(resolve(named))
    check_keep_set(config, keep_set)
    if keep_set.scores is None:
        say("The selection has no scores, so experts are in the order of their numbers.")
    return _of_selection(keep_set, experts_per_layer(config))


def _of_selection(keep_set: KeepSet, counts: Sequence[int]) -> dict[int, Layer]:
    scores: Sequence[Any] = keep_set.scores or [None] * len(counts)
    return {number: Layer(count, kept, scores[number])
            for number, (kept, count) in enumerate(zip(keep_set.experts, counts, strict=True)) if kept is not None}


def _of_mask(mask: Sequence[Sequence[int]]) -> dict[int, Layer]:
    return {number: Layer(len(row), [expert for expert, kept in enumerate(row) if kept])
            for number, row in enumerate(mask) if row}
