"""A training checkpoint becomes a released one, tensor by tensor, in the memory of the largest tensor."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emo_select.checkpoint.header import DTYPES, SAFETENSORS_DTYPE
from emo_select.checkpoint.sources import passed_on
from emo_select.checkpoint.writer import ShardedWriter, TensorSpec, assign_shards
from emo_select.convert.dcp import TrainingTensors
from emo_select.convert.experiment import TrainingModel, read_experiment, with_vocabulary
from emo_select.convert.layout import Group, groups, split
from emo_select.convert.released import STOP_TOKENS, check_convertible, generation_config, released_config
from emo_select.convert.tokenizers import find_tokenizer, tokenizer_output, write_files
from emo_select.errors import CheckpointError, NumericError, SpecError
from emo_select.progress import say, track
from emo_select.storage import output_directory, read_json

if TYPE_CHECKING:
    from torch import Tensor

DTYPES_OF_WEIGHTS = ("float32", "bfloat16", "float16")
WEIGHTS = "model_and_optim"
RECORD = "conversion.json"
USUAL_LENGTH = 4096  # of all published trainings, where config.json does not say
CONVERTED = "converted model"
LOOK_AT = 1 << 20  # values


@dataclass(frozen=True)
class HfOptions:
    """What the released checkpoint shall be like.

    Attributes:
        dtype: of the weights; None keeps the training's (float32 masters).
        cut_vocabulary: leave out the rows behind the tokenizer's vocabulary, as the published converter does.
        max_length: max_position_embeddings and the tokenizer's model_max_length; None: the training's, or
            4096 where its config does not say.
        tokenizer: folder or Hub id; None: the one beside the checkpoint or in its config; "none": without.
        published_config: the published converter's values where ours differ (docs/convert.md).
        max_shard_bytes: largest file; None: 5 GB.
    """

    dtype: str | None = None
    cut_vocabulary: bool = False
    max_length: int | None = None
    tokenizer: str | None = None
    published_config: bool = False
    max_shard_bytes: int | None = None


@dataclass(frozen=True)
class HfPlan:
    """All that will be written, decided from headers and configurations alone."""

    source: TrainingTensors
    model: TrainingModel  # with the vocabulary that is written
    groups: tuple[Group, ...]
    dtype: str
    config: Mapping[str, Any]
    files: Mapping[str, bytes]  # tokenizer and generation_config.json
    dropped_rows: int

    @property
    def specs(self) -> list[TensorSpec]:
        """The released tensors in the order in which they are made."""
        stored = SAFETENSORS_DTYPE[self.dtype]
        return [TensorSpec(name, stored, self._shape(group)) for group in self.groups for name in group.released]

    @property
    def total_bytes(self) -> int:
        """Bytes of the released tensors."""
        return sum(spec.bytes for spec in self.specs)

    @property
    def peak_bytes(self) -> int:
        """The largest tensor of the training, which has to be in memory."""
        return max(self.source.tensors[group.stored].bytes for group in self.groups)

    def _shape(self, group: Group) -> tuple[int, ...]:
        return (self.model.vocabulary, *group.part[1:]) if group.vocabulary else group.part


def to_hf(checkpoint: Path, out: Path, options: HfOptions | None = None) -> dict[str, Any]:
    """Convert a training checkpoint (`step<N>`) to a folder that transformers loads; returns what was written.

    The folder appears by rename when all of it is there. A call that was interrupted goes on with the file it was in.

    Raises:
        CheckpointError, ModelError, SpecError, DiskSpaceError: before anything is written, except for damage that
        only reading a tensor shows. NumericError: a weight is NaN or infinite, or too large for the dtype.
    """
    options = options or HfOptions()
    plan = plan_hf(checkpoint, options)
    record = _record(checkpoint, plan, options)
    if is_converted(out, record):
        return describe(plan)
    with output_directory(out, _key(plan, options), CONVERTED, plan.total_bytes, [checkpoint]) as folder:
        _write_weights(plan, folder, options.max_shard_bytes)
        write_files(plan.files, folder)
        described = {"config.json": plan.config, RECORD: record}
        write_files({name: _json(value) for name, value in described.items()}, folder)
    return describe(plan)


def plan_hf(checkpoint: Path, options: HfOptions, *, download: bool = True) -> HfPlan:
    """Check everything that can be checked without reading a tensor, and decide what will be written."""
    model = read_experiment(checkpoint)
    check_convertible(model)
    source = TrainingTensors(checkpoint / WEIGHTS)
    parts = tuple(groups(model))
    _check_tensors(source, parts)
    written = with_vocabulary(model, _rows(model, cut=options.cut_vocabulary))
    dtype = options.dtype or source.tensors[parts[0].stored].dtype
    if dtype not in DTYPES_OF_WEIGHTS:
        raise SpecError(f"Cannot store weights as {dtype!r}; choose {', '.join(DTYPES_OF_WEIGHTS)}.")
    length = options.max_length or model.sequence_length or USUAL_LENGTH
    config = released_config(written, dtype=dtype, max_length=length, published=options.published_config)
    files = _files(checkpoint, model, options, length, download=download)
    return HfPlan(source, written, parts, dtype, config, files, model.vocabulary - written.vocabulary)


def describe(plan: HfPlan) -> dict[str, Any]:
    """The plan in numbers for people and machines."""
    return {"model_type": plan.config["model_type"], "layers": len(plan.model.layers), "hidden": plan.model.hidden,
            "experts": plan.config.get("num_experts", 0), "shared": plan.config.get("num_shared_experts", 0),
            "vocabulary": plan.model.vocabulary, "dropped_rows": plan.dropped_rows, "dtype": plan.dtype,
            "tensors": len(plan.specs), "bytes": plan.total_bytes, "memory_bytes": plan.peak_bytes,
            "tokenizer": "tokenizer.json" in plan.files}


def released_tensors(plan: HfPlan, group: Group) -> Iterator[tuple[str, Tensor]]:
    """The released tensors of one training tensor: name and values, cast and cut."""
    tensor = plan.source.read(group.stored)
    if not all_finite(tensor):
        raise NumericError(f"{group.stored} in {plan.source.folder} holds NaN or infinite values; convert an earlier "
                           "step of the training.")
    for name, part in zip(group.released, split(group, tensor), strict=True):
        cut = part[:plan.model.vocabulary] if group.vocabulary else part
        yield name, cast(name, cut, plan.dtype)


def all_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite; looks at a few megabytes at a time, in place of a copy of the whole."""
    return all(piece.isfinite().all() for piece in tensor.reshape(-1).split(LOOK_AT))


def cast(name: str, tensor: Tensor, dtype: str) -> Tensor:
    """The tensor in `dtype`, refused where it does not fit in."""
    import torch

    target = getattr(torch, dtype)
    changed = tensor.to(target)
    if target == torch.float16 and not torch.isfinite(changed).all():
        raise NumericError(f"{name} has values that float16 cannot hold; choose bfloat16 or float32.")
    return changed


def _check_tensors(source: TrainingTensors, parts: tuple[Group, ...]) -> None:
    expected = {group.stored for group in parts}
    others = sorted(name for name in source.tensors if name.startswith("model.") and name not in expected)
    if others:
        raise CheckpointError(f"{source.folder} has weights that its config.json does not mention, such as {others[0]} "
                              f"({len(others)} in all).")
    for group in parts:
        if (shape := source.info(group.stored).shape) != group.shape:
            raise CheckpointError(f"{group.stored} in {source.folder} is {list(shape)}, but by config.json it should "
                                  f"be {list(group.shape)}.")
    source.check(expected)


def _rows(model: TrainingModel, *, cut: bool) -> int:
    known, largest = model.tokens.vocab_size, max((model.tokens.eos or 0), (model.tokens.pad or 0))
    if cut and known is None:
        raise SpecError("The training's config.json does not say how large its tokenizer's vocabulary is, so it "
                        "cannot be cut to that; leave out --cut-vocabulary.")
    rows = known if cut and known is not None else model.vocabulary
    if rows > model.vocabulary or largest >= rows:
        raise CheckpointError(f"The tokenizer in config.json (vocabulary {known}, largest special token {largest}) "
                              f"does not fit the model's {model.vocabulary} rows.")
    return rows


def _files(checkpoint: Path, model: TrainingModel, options: HfOptions, length: int, *, download: bool
           ) -> dict[str, bytes]:
    found = None
    if options.tokenizer != "none":
        found = find_tokenizer(checkpoint, model.tokens, options.tokenizer, download=download)
    files = tokenizer_output(found, model.tokens, length) if found else {}
    numbers = found.files.numbers if found else {}
    stops = [numbers[name] for name in STOP_TOKENS if name in numbers]
    generation = generation_config(stops, model.tokens.pad, published=options.published_config)
    return {**files, "generation_config.json": _json(generation)}


def _write_weights(plan: HfPlan, folder: Path, limit: int | None) -> None:
    shards = assign_shards(plan.specs, limit)
    with ShardedWriter(folder, shards) as out, track("Converting (GB)", plan.total_bytes / 1e9) as bar:
        size = DTYPES[SAFETENSORS_DTYPE[plan.dtype]][0]
        for group in plan.groups:
            if not all(map(out.done, group.released)):
                _write_group(plan, group, out)
            bar.advance(size * math.prod(group.shape) / 1e9, group.training)


def _write_group(plan: HfPlan, group: Group, out: ShardedWriter) -> None:
    """Its end lets go of the training tensor, before the next one is read."""
    for name, tensor in released_tensors(plan, group):
        out.write(name, tensor)


def _record(checkpoint: Path, plan: HfPlan, options: HfOptions) -> dict[str, Any]:
    """How the folder came about, with what released configs have no place for."""
    model = plan.model
    return {"format": "hf", "source": passed_on(str(checkpoint.resolve())),
            "source_fingerprint": fingerprint(checkpoint), "options": asdict(options), "trained_with": {
                "router": model.router, "pools": asdict(model.pools) if model.pools else None,
                "load_balancing_weight": model.balance, "sequence_length": model.sequence_length}}


def is_converted(out: Path, record: dict[str, Any]) -> bool:
    """Whether `out` is what a finished conversion with this record has left there.

    Raises:
        SpecError: it is there, but is the result of another conversion, or of something else.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    if (out / RECORD).is_file() and read_json(out / RECORD) == json.loads(json.dumps(record)):
        say(f"{out} holds this very conversion already; nothing to do.")
        return True
    raise SpecError(f"{out} is already there and is not the result of this conversion; choose another --out, or "
                    "delete it.")


def fingerprint(checkpoint: Path) -> str:
    """Hex SHA-256 over a training checkpoint's configuration and table of contents, which differ for every save."""
    digest = hashlib.sha256((checkpoint / "config.json").read_bytes())
    digest.update((checkpoint / WEIGHTS / ".metadata").read_bytes())
    return digest.hexdigest()


def _key(plan: HfPlan, options: HfOptions) -> str:
    identity = [fingerprint(plan.source.folder.parent), dict(plan.config), asdict(replace(options, tokenizer=None))]
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
