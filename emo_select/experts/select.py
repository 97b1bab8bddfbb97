"""From a model and texts to keep sets in one call, outside any run tree."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from emo_select.checkpoint import Checkpoint, open_checkpoint
from emo_select.errors import SpecError, UnknownNameError
from emo_select.experts.activations import collect_activations
from emo_select.experts.calibration import SPLIT, CalibrationTexts, calibration_tokens, mixed_tokens
from emo_select.experts.keepset import KeepSet
from emo_select.experts.layerwise import select_layerwise
from emo_select.experts.methods import ONE_PASS, select_from_scores, select_random
from emo_select.experts.options import StreamOptions
from emo_select.experts.rules import KeepK, resolve_keep_k
from emo_select.experts.scores import criterion
from emo_select.faults import translated
from emo_select.spec import METHODS, Calibration


@dataclass(frozen=True)
class Selection:
    """What to select, apart from the model and where it goes.

    Attributes:
        keep_ks: experts kept per layer: numbers, or schedules with one number per layer.
        tasks: names of the tasks to calibrate on; not needed for own texts or random selection.
        weights: the tasks' weights if several are mixed; None treats all texts alike.
        method, score, num_shared: as in `RunSpec`.
        calibration: which texts, and how many.
    """

    keep_ks: Sequence[KeepK]
    method: str = "layerwise"
    tasks: Sequence[str] = ()
    weights: Mapping[str, float] | None = None
    score: str = "router_probability"
    num_shared: int | None = None
    calibration: Calibration = field(default_factory=Calibration)


@translated()
def select_experts(model: str, wanted: Selection, *, out_dir: Path | None = None, options: StreamOptions | None = None,
                   data_dir: str | None = None) -> dict[KeepK, KeepSet]:
    """Choose the experts of `model` that the calibration texts use, for every keep-k in one pass.

    Args:
        model: folder, Hub id or demo/NAME.
        wanted: what to select.
        out_dir: keeps snapshots and statistics while it runs, so that a killed call can go on; `activations` stays
            there for one-pass methods.
        options: device, precision, memory.
        data_dir: folder of datasets for machines without network.

    Raises:
        UsageError: of the kind that fits; before any work. NumericError: NaN or infinity, named.
    """
    _check(wanted)
    with open_checkpoint(model) as checkpoint:
        for keep_k in wanted.keep_ks:
            resolve_keep_k(checkpoint.config, keep_k, wanted.num_shared)
        if wanted.method == "random":
            return {keep_k: select_random(checkpoint.config, keep_k, wanted.calibration.seed,
                                          num_shared=wanted.num_shared,
                                          about=_about(model, wanted, fingerprint=checkpoint.forward_fingerprint))
                    for keep_k in wanted.keep_ks}
        return _calibrated(model, checkpoint, wanted, out_dir, options, data_dir)


def texts_of(model: str, tasks: Sequence[str], calibration: Calibration, data_dir: str | None = None
             ) -> CalibrationTexts:
    """Token ids and groups of the tasks' selection splits, or of `calibration.file`."""
    from emo_select.models import load_tokenizer
    from emo_select.tasks import get_tasks

    if calibration.file is not None:
        return calibration_tokens(None, load_tokenizer(model), calibration)
    if not tasks:
        raise SpecError("There is nothing to calibrate on; name a task with --task or texts with --calibration.")
    found = get_tasks(tasks, data_dir=data_dir)
    for task in found:
        task.require_data()
    return mixed_tokens(found, load_tokenizer(model), calibration)


def _calibrated(model: str, checkpoint: Checkpoint, wanted: Selection, out_dir: Path | None,
                options: StreamOptions | None, data_dir: str | None) -> dict[KeepK, KeepSet]:
    texts = texts_of(model, wanted.tasks, wanted.calibration, data_dir)
    about, weights = _about(model, wanted), _run_names(wanted, data_dir)
    if wanted.method == "layerwise":
        work_dir = out_dir / ".selection.partial" if out_dir else None
        found = select_layerwise(checkpoint, texts.token_ids, wanted.keep_ks, groups=texts.groups, weights=weights,
                                 num_shared=wanted.num_shared, score=wanted.score, options=options, work_dir=work_dir,
                                 about=about)
        if work_dir:  # every process has what it needs of it by now
            shutil.rmtree(work_dir, ignore_errors=True)
        return found
    activations = out_dir / "activations" if out_dir else None
    scores = collect_activations(checkpoint, texts.token_ids, texts.groups, activations, options)
    return {keep_k: select_from_scores(scores, wanted.method, keep_k, checkpoint.config, weights=weights,
                                       num_shared=wanted.num_shared, about=about) for keep_k in wanted.keep_ks}


def _check(wanted: Selection) -> None:
    if wanted.method not in METHODS:
        raise UnknownNameError("method", wanted.method, METHODS)
    criterion(wanted.score)
    if wanted.method in ONE_PASS and wanted.score != "router_probability":
        raise SpecError(f"--score is what layerwise ranks by; the method {wanted.method} ranks by "
                        f"{ONE_PASS[wanted.method]}.")
    if not wanted.keep_ks:
        raise SpecError("Nothing to select: give at least one --keep-k.")


def _run_names(wanted: Selection, data_dir: str | None) -> dict[str, float] | None:
    """Weights under the names that the groups of the tasks' texts begin with."""
    from emo_select.tasks import get_tasks

    if wanted.weights is None or wanted.calibration.file is not None:
        return None
    return {task.name: weight for name, weight in wanted.weights.items()
            for task in get_tasks([name], data_dir=data_dir)}


def _about(model: str, wanted: Selection, **more: Any) -> dict[str, Any]:
    chosen = wanted.calibration
    origin = {"model": model, "seed": chosen.seed, **more}
    if wanted.method == "random":
        return origin
    tasks = "+".join(wanted.tasks) if chosen.file is None else Path(chosen.file).name
    return {**origin, "task": tasks, "split": SPLIT if chosen.file is None else None, "num_shots": chosen.num_shots,
            "num_examples": chosen.num_examples}
