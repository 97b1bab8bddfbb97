"""A released checkpoint becomes a training checkpoint (`step0`: weights, no optimiser), tensor by tensor."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from emo_select.checkpoint import Checkpoint, open_checkpoint
from emo_select.checkpoint.header import SAFETENSORS_DTYPE, tensor_bytes
from emo_select.checkpoint.tokenizer import TokenizerFiles
from emo_select.convert.dcp_write import ARCHIVE_BYTES, assign_parts, write_parts
from emo_select.convert.experiment import Pools, TrainingModel, with_vocabulary
from emo_select.convert.experiment_write import experiment_config
from emo_select.convert.hf import CONVERTED, DTYPES_OF_WEIGHTS, RECORD, WEIGHTS, all_finite, is_converted
from emo_select.convert.layout import Group, groups, join
from emo_select.convert.released import PUBLISHED_BALANCE, read_released
from emo_select.convert.tokenizers import copy_tokenizer
from emo_select.errors import CheckpointError, ModelError, NumericError, SpecError
from emo_select.progress import track
from emo_select.storage import output_directory, write_json
from emo_select.textfile import read_json_object

if TYPE_CHECKING:
    from torch import Tensor

TRAINED_BALANCE = 0.1  # of all published MoE trainings
AS_TRAINED: Literal["as trained"] = "as trained"
OLMO_CORE = "3.0.0"  # whose layout this is, where it is not installed


@dataclass(frozen=True)
class CoreOptions:
    """What the training checkpoint shall be like.

    Attributes:
        dtype: of the weights; trainers keep float32.
        multiple: the vocabulary is filled with zero rows up to a multiple of this; 1 leaves it as it is.
        pools: sizes of document pools, for an EMO training to go on with; None: a standard MoE; AS_TRAINED: as
            `conversion.json` beside the weights says, else a standard MoE.
        max_part_bytes: largest file; None: 5 GB.
    """

    dtype: str = "float32"
    multiple: int = 128
    pools: Pools | Literal["as trained"] | None = AS_TRAINED
    max_part_bytes: int | None = None


@dataclass(frozen=True)
class CorePlan:
    """All that will be written, decided from headers and config.json alone."""

    source: Checkpoint
    model: TrainingModel
    groups: tuple[Group, ...]
    added_rows: int
    options: CoreOptions

    @property
    def total_bytes(self) -> int:
        """Bytes of the training checkpoint's tensors."""
        return sum(self.bytes_of(group) for group in self.groups)

    def bytes_of(self, group: Group) -> int:
        """Bytes of one training tensor."""
        return tensor_bytes(SAFETENSORS_DTYPE[self.options.dtype], group.shape)


def to_olmo_core(source: str, out: Path, options: CoreOptions | None = None) -> dict[str, Any]:
    """Convert a released checkpoint (folder, Hub id or demo/NAME) to a step folder; returns what was written.

    The folder appears by rename when all of it is there. A call that was interrupted goes on with the file it was in.

    Raises:
        ModelError, CheckpointError, SpecError, DiskSpaceError: before anything is written.
        NumericError: a weight is NaN or infinite.
    """
    plan = plan_olmo_core(source, options or CoreOptions())
    record = {"format": "olmo-core", "source": source, "source_fingerprint": plan.source.fingerprint,
              "options": asdict(plan.options)}
    if is_converted(out, record):
        return describe(plan)
    needed = plan.total_bytes + ARCHIVE_BYTES * len(plan.groups)
    with plan.source, output_directory(out, _key(plan), CONVERTED, needed, [plan.source.directory]) as folder:
        _write_weights(plan, folder / WEIGHTS)
        copy_tokenizer(plan.source.directory, folder / "tokenizer")
        write_json(folder / ".metadata.json", {"ephemeral": False, "version": _version()})
        write_json(folder / RECORD, record)
        write_json(folder / "config.json", experiment_config(plan.model))
    return describe(plan)


def plan_olmo_core(source: str, options: CoreOptions, *, download: bool = True) -> CorePlan:
    """Check names and shapes from headers, and decide what will be written; reads no weights."""
    if options.dtype not in DTYPES_OF_WEIGHTS:
        raise SpecError(f"Cannot store weights as {options.dtype!r}; choose {', '.join(DTYPES_OF_WEIGHTS)}.")
    checkpoint = open_checkpoint(source, download=download)
    config = checkpoint.config
    trained = _trained_with(checkpoint)
    pools = _pools(trained) if options.pools == AS_TRAINED else options.pools
    model = read_released(config, pools=pools, balance=trained.get("load_balancing_weight") or _balance(config))
    model = replace(model, tokens=replace(model.tokens, vocab_size=_tokenizer_size(checkpoint, model)))
    _check_routing(model)
    parts = tuple(groups(model))
    _check_tensors(checkpoint, parts)
    rows = -(-model.vocabulary // options.multiple) * options.multiple
    padded = with_vocabulary(model, rows)
    return CorePlan(checkpoint, padded, tuple(groups(padded)), rows - model.vocabulary, options)


def describe(plan: CorePlan) -> dict[str, Any]:
    """The plan in numbers for people and machines."""
    experts = max((layer.experts for layer in plan.model.layers), default=0)
    return {"layers": len(plan.model.layers), "hidden": plan.model.hidden, "experts": experts,
            "shared": max(layer.shared for layer in plan.model.layers), "vocabulary": plan.model.vocabulary,
            "added_rows": plan.added_rows, "dtype": plan.options.dtype, "tensors": len(plan.groups),
            "bytes": plan.total_bytes, "memory_bytes": max(map(plan.bytes_of, plan.groups)),
            "pools": asdict(plan.model.pools) if plan.model.pools else None,
            "optimiser_state": False}


def training_tensor(plan: CorePlan, group: Group) -> Tensor:
    """One training tensor, put together from the released ones."""
    import torch

    return join(group, _released(plan, group), getattr(torch, plan.options.dtype))


def _released(plan: CorePlan, group: Group) -> Iterator[Tensor]:
    for name in group.released:
        tensor = plan.source.read(name)
        if not all_finite(tensor):
            raise NumericError(f"{name} in {plan.source.directory} holds NaN or infinite values; download or save the "
                               "checkpoint again.")
        yield tensor


def _trained_with(checkpoint: Checkpoint) -> dict[str, Any]:
    """What our own conversion of the training has noted beside the weights; empty where there is no note."""
    path = checkpoint.directory / RECORD
    return dict(read_json_object(path, CheckpointError).get("trained_with") or {}) if path.is_file() else {}


def _pools(trained: dict[str, Any]) -> Pools | None:
    found = trained.get("pools")
    return Pools(found["least"], found["most"], found["evaluation"]) if found else None


def _balance(config: dict[str, Any]) -> float:
    """The training's weight of the balance loss; the published 0.01 says nothing about it (docs/convert.md)."""
    stored = float(config.get("router_aux_loss_coef") or PUBLISHED_BALANCE)
    return TRAINED_BALANCE if stored == PUBLISHED_BALANCE else stored


def _tokenizer_size(checkpoint: Checkpoint, model: TrainingModel) -> int:
    """Tokens of the tokenizer beside the weights; without one, as many as there are rows."""
    files = TokenizerFiles(checkpoint.directory)
    return min(model.vocabulary, files.size) if files.path.is_file() else model.vocabulary


def _check_routing(model: TrainingModel) -> None:
    if any(layer.always_active for layer in model.layers):
        raise ModelError("This checkpoint has always-active experts, which ai2-olmo-core's router has no equal for; it "
                         "cannot become a training checkpoint.")
    pools = model.pools
    if pools is None:
        return
    if not model.moe:
        raise ModelError("A dense model has no experts, so it cannot have pools of them; leave out --pool.")
    needed = max(layer.top_k - layer.shared for layer in model.moe)
    if pools.least > pools.most or min(pools.least, pools.evaluation or pools.least) < needed:
        raise SpecError(f"Pools of {pools.least} to {pools.most} experts are too small for tokens that use {needed} "
                        "routed experts each; --pool and --eval-pool must be at least that.")


def _check_tensors(checkpoint: Checkpoint, parts: tuple[Group, ...]) -> None:
    expected = {name: group.part for group in parts for name in group.released}
    others = sorted(checkpoint.tensors.keys() - expected.keys())
    if others:
        raise CheckpointError(f"{checkpoint.directory} has tensors that its config.json does not mention, such as "
                              f"{others[0]} ({len(others)} in all).")
    for name, shape in expected.items():
        if (found := checkpoint.info(name).shape) != shape:
            raise CheckpointError(f"{name} in {checkpoint.directory} is {list(found)}, but by config.json it should be "
                                  f"{list(shape)}.")


def _write_weights(plan: CorePlan, folder: Path) -> None:
    parts = assign_parts(plan.groups, plan.options.dtype, plan.options.max_part_bytes)
    with track("Converting (GB)", plan.total_bytes / 1e9) as bar:
        write_parts(folder, parts, plan.options.dtype, lambda group: training_tensor(plan, group),
                    lambda group: bar.advance(plan.bytes_of(group) / 1e9, group.training))


def _key(plan: CorePlan) -> str:
    options = asdict(plan.options)
    return hashlib.sha256(json.dumps([plan.source.fingerprint, options], sort_keys=True).encode()).hexdigest()


def _version() -> str:
    try:
        return importlib.metadata.version("ai2-olmo-core")
    except importlib.metadata.PackageNotFoundError:
        return OLMO_CORE
