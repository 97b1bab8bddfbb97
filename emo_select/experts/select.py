"""From a model and texts to keep sets in one call, outside any run tree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import field_validator

from emo_select.checkpoint import Checkpoint, open_checkpoint, resolve
from emo_select.errors import SpecError, UnknownNameError, keywords_checked
from emo_select.experts.activations import collect_activations
from emo_select.experts.calibration import SPLIT, CalibrationTexts, calibration_tokens, mixed_tokens
from emo_select.experts.keepset import KeepSet, top_k_notice
from emo_select.experts.layerwise import select_layerwise
from emo_select.experts.methods import ONE_PASS, select_from_scores, select_random
from emo_select.experts.options import StreamOptions
from emo_select.experts.rules import KeepK, resolve_keep_k
from emo_select.experts.scores import criterion
from emo_select.faults import translated
from emo_select.models.families import experts_per_layer
from emo_select.progress import say_once
from emo_select.spec import METHODS, Calibration, Frozen, keep_ks_in, listed, parse_keep_k
from emo_select.storage import discard

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Selection(Frozen):
    """What to select, apart from the model and where it goes; fields are named as in `RunSpec`.

    `keep_k` and `task` take one value or several.
    """

    keep_k: tuple[int | str | tuple[int, ...], ...]
    """Experts kept per layer, shared ones included: numbers, shares such as "12.5%", "full", or schedules with one
    number per layer."""
    method: str = "layerwise"
    task: tuple[str, ...] = ()
    """Names of the tasks to calibrate on; not needed for own texts or random selection."""
    weights: dict[str, float] | None = None
    """The tasks' weights if several are mixed; None treats all texts alike."""
    score: str = "router_probability"
    num_shared: int | None = None
    calibration: Calibration = Calibration()
    """Which texts, and how many."""

    @field_validator("keep_k", mode="before")
    @classmethod
    def _several_keep_k(cls, value: Any) -> Any:
        items = [value] if isinstance(value, int | str) else value
        return [part for item in items for part in (keep_ks_in(item) if isinstance(item, str) else [item])]

    @field_validator("task", mode="before")
    @classmethod
    def _several_tasks(cls, value: Any) -> Any:
        return listed(value) if isinstance(value, str) else value

    def keep_ks(self, config: Mapping[str, Any]) -> list[KeepK]:
        """The numbers (and schedules) that `keep_k` stands for in a model with this configuration."""
        total = max(experts_per_layer(config))
        return list(dict.fromkeys(parse_keep_k(one, total) if isinstance(one, str) else one for one in self.keep_k))


@translated()
@keywords_checked
def select_experts(model: str | PreTrainedModel, wanted: Selection, *, tokenizer: PreTrainedTokenizerBase | None = None,
                   out_dir: Path | None = None, options: StreamOptions | None = None, data_dir: str | None = None
                   ) -> dict[KeepK, KeepSet]:
    """Choose the experts of `model` that the calibration texts use, for every keep-k in one pass.

    Args:
        model: folder, Hub id or demo/NAME; or a model in memory, which is left as it is.
        wanted: what to select.
        tokenizer: of a model in memory; None takes the one where the model came from.
        out_dir: keeps snapshots and statistics while it runs, so that a killed call can go on; `activations` stays
            there for one-pass methods.
        options: device, precision, memory.
        data_dir: folder of datasets and models for machines without network.

    Returns:
        A keep set per keep-k, by its number (or schedule).

    Raises:
        UsageError: of the kind that fits; before any work. NumericError: NaN or infinity, named.
    """
    _check(wanted)
    with _opened(model, data_dir) as checkpoint:
        name = model if isinstance(model, str) else str(checkpoint.directory)
        keep_ks = wanted.keep_ks(checkpoint.config)
        for keep_k in keep_ks:
            resolve_keep_k(checkpoint.config, keep_k, wanted.num_shared)
            notice = top_k_notice(checkpoint.config, [keep_k] if isinstance(keep_k, int) else keep_k)
            if notice:
                say_once(notice)
        if wanted.method == "random":
            about = _about(name, wanted, fingerprint=checkpoint.forward_fingerprint)
            found = {keep_k: select_random(checkpoint.config, keep_k, wanted.calibration.seed,
                                           num_shared=wanted.num_shared, about=about) for keep_k in keep_ks}
        else:
            read = tokenizer or _tokenizer_of(model, name, data_dir)
            found = _calibrated(name, read, checkpoint, wanted, out_dir, options, data_dir)
    if isinstance(model, str):
        return found
    # the digest of a model in memory is not that of its files, with which pruning will compare
    return {keep_k: keep_set.model_copy(update={"fingerprint": None}) for keep_k, keep_set in found.items()}


def _opened(model: str | PreTrainedModel, data_dir: str | None) -> Checkpoint:
    if isinstance(model, str):
        return open_checkpoint(model, data_dir=data_dir)
    from emo_select.models.memory import ModelInMemory

    return ModelInMemory(model)


def _tokenizer_of(model: str | PreTrainedModel, name: str, data_dir: str | None) -> PreTrainedTokenizerBase:
    from emo_select.models import load_tokenizer

    if not isinstance(model, str) and not model.config.name_or_path:
        raise SpecError("This model in memory does not say where its tokenizer is; give it with tokenizer=.")
    return load_tokenizer(str(resolve(name, data_dir=data_dir)))


def texts_of(tokenizer: PreTrainedTokenizerBase, tasks: Sequence[str], calibration: Calibration,
             data_dir: str | None = None) -> CalibrationTexts:
    """Token ids and groups of the tasks' selection splits, or of `calibration.file`."""
    from emo_select.tasks import get_tasks

    if calibration.file is not None:
        return calibration_tokens(None, tokenizer, calibration)
    if not tasks:
        raise SpecError("There is nothing to calibrate on; name a task with --task or texts with --calibration.")
    found = get_tasks(tasks, data_dir=data_dir)
    for task in found:
        task.require_data()
    return mixed_tokens(found, tokenizer, calibration)


def _calibrated(model: str, tokenizer: PreTrainedTokenizerBase, checkpoint: Checkpoint, wanted: Selection,
                out_dir: Path | None, options: StreamOptions | None, data_dir: str | None) -> dict[KeepK, KeepSet]:
    texts = texts_of(tokenizer, wanted.task, wanted.calibration, data_dir)
    keep_ks = wanted.keep_ks(checkpoint.config)
    about, weights = _about(model, wanted), _run_names(wanted, data_dir)
    if wanted.method == "layerwise":
        work_dir = out_dir / ".selection.partial" if out_dir else None
        found = select_layerwise(checkpoint, texts.token_ids, keep_ks, groups=texts.groups, weights=weights,
                                 num_shared=wanted.num_shared, score=wanted.score, options=options, work_dir=work_dir,
                                 about=about)
        if work_dir:  # every process has what it needs of it by now
            discard(work_dir)
        return found
    activations = out_dir / "activations" if out_dir else None
    scores = collect_activations(checkpoint, texts.token_ids, texts.groups, activations, options)
    return {keep_k: select_from_scores(scores, wanted.method, keep_k, checkpoint.config, weights=weights,
                                       num_shared=wanted.num_shared, about=about) for keep_k in keep_ks}


def _check(wanted: Selection) -> None:
    if wanted.method not in METHODS:
        raise UnknownNameError("method", wanted.method, METHODS)
    criterion(wanted.score)
    if wanted.method in ONE_PASS and wanted.score != "router_probability":
        raise SpecError(f"--score is what layerwise ranks by; the method {wanted.method} ranks by "
                        f"{ONE_PASS[wanted.method]}.")
    if not wanted.keep_k:
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
    tasks = "+".join(wanted.task) if chosen.file is None else Path(chosen.file).name
    return {**origin, "task": tasks, "split": SPLIT if chosen.file is None else None, "num_shots": chosen.num_shots,
            "num_examples": chosen.num_examples}
