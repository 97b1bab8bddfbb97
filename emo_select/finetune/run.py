"""Finetuning as one call: check everything, store the job, publish checkpoint-0, train, report."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emo_select.checkpoint import Checkpoint, open_checkpoint, read_config
from emo_select.checkpoint.companions import companions, copy_companions
from emo_select.checkpoint.reader import INDEX
from emo_select.errors import SpecError, UsageError
from emo_select.faults import translated
from emo_select.finetune import recipe
from emo_select.finetune.examples import TokenSet, encode_examples, encode_file
from emo_select.finetune.freezing import require_experts
from emo_select.finetune.job import JOB, Job, job_key
from emo_select.finetune.lora import lora_targets
from emo_select.finetune.worker import HISTORY, launch, train
from emo_select.models.preflight import check_weights
from emo_select.ownership import FINETUNED, require_replaceable
from emo_select.progress import say
from emo_select.storage import (
    discard,
    drop_unfinished,
    leftovers,
    link_or_copy,
    partial_directory,
    publish,
    read_json,
    remove_directory,
    require_space,
    write_json,
)
from emo_select.tree import numbered_checkpoints

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from emo_select.spec import Execution, Training
    from emo_select.tasks import Example

REPORT = "training.json"


@dataclass(frozen=True)
class TrainReport:
    """What a training did; stored as `training.json` beside its checkpoints, which it marks as complete."""

    key: str
    model_fingerprint: str
    examples: int
    dropped: Mapping[str, int]
    """Examples left out, by reason."""
    tokens: int
    """Tokens of one epoch: end-of-sequence tokens included, padding not."""
    steps: int
    checkpoints: list[int]
    micro_batch: int
    processes: int
    history: list[dict[str, float]] = field(default_factory=list)
    """Per optimiser step: loss and its parts (means per label of the step), learning rate, gradient norm before
    clipping, tokens per second. Routing is in `routing.json`, per layer."""


@translated()
def finetune(
    model_dir: Path,
    examples: Sequence[Example],
    delimiter: str | None,
    out_dir: Path,
    training: Training,
    execution: Execution,
    *,
    replace: bool = False,
) -> TrainReport:
    """Train `model_dir` by the published recipe and write `checkpoint-0`, …, `checkpoint-N` into `out_dir`.

    With `training.file` its examples take the place of `examples`. A training that was interrupted continues; a
    complete one is not repeated. `replace` allows checkpoints of another model in `out_dir` to be deleted.

    Raises, before a model is loaded: `UsageError` (no example left, too few GPUs, another model's checkpoints, output
    within the model's folder), `TaskError` (a row or an answer that cannot be used), `SpecError` (batch sizes that do
    not divide, settings that exclude each other), `DiskSpaceError`. During training: `NumericError` when it diverges.
    """
    from emo_select.models import load_tokenizer

    tokenizer = load_tokenizer(str(model_dir), trust_remote_code=execution.trust_remote_code)
    limit = _length_limit(model_dir, training)
    if training.file is not None:
        tokens = encode_file(Path(training.file), tokenizer, limit)
    else:
        tokens = encode_examples(examples, tokenizer, delimiter, limit)
    return finetune_tokens(
        model_dir, tokens, out_dir, training, execution, pad_token=_pad_token(tokenizer), replace=replace
    )


def require_own_examples(model_dir: Path, training: Training) -> None:
    """Raise what `finetune` would raise for the rows of `training.file`, if there is one."""
    from emo_select.models import load_tokenizer

    if training.file is not None:
        encode_file(Path(training.file), load_tokenizer(str(model_dir)), _length_limit(model_dir, training))


def _length_limit(model_dir: Path, training: Training) -> int:
    """Tokens of an example without the end-of-sequence token, so that with it none exceeds the model's context."""
    context = read_config(model_dir).get("max_position_embeddings")
    return training.max_length if context is None else min(training.max_length, int(context) - 1)


@translated()
def finetune_tokens(
    model_dir: Path,
    tokens: TokenSet,
    out_dir: Path,
    training: Training,
    execution: Execution,
    *,
    pad_token: int = 0,
    replace: bool = False,
) -> TrainReport:
    """`finetune` on examples that are tokens already; `pad_token` fills rows and is never a label."""
    for reason, count in tokens.dropped.items():
        say(f"{count} of {count + len(tokens)} training examples left out: {reason}.")
    job = _checked_job(model_dir, tokens, out_dir, training, execution, pad_token)
    done = _completed(job)
    _wait_for_everyone(job.device)
    if done is not None:
        if _is_main_process():
            _tidy(job)
        return done
    if _is_main_process():
        _prepare(job, tokens, replace=replace)
    _wait_for_everyone(job.device)
    _carry_out(job)
    if _is_main_process():
        _report(job, tokens)
    _wait_for_everyone(job.device)
    return TrainReport(**read_json(out_dir / REPORT))


def _checked_job(
    model_dir: Path, tokens: TokenSet, out_dir: Path, training: Training, execution: Execution, pad_token: int
) -> Job:
    """The job, after everything that can be wrong with it has been looked at; no model is loaded."""
    if out_dir.resolve().is_relative_to(model_dir.resolve()):  # checkpoint-0 would contain itself
        raise UsageError(f"{out_dir} lies within the model that is trained; choose an output directory outside.")
    companions(model_dir)  # refuses links
    device = recipe.require_machine(execution)
    world = int(os.environ.get("WORLD_SIZE", "0")) or execution.num_gpus or 1
    with open_checkpoint(model_dir) as stored:
        check_weights(stored)
        checkpoint = stored.plain()
        require_trainable(checkpoint, training)
        _require_vocabulary(checkpoint, tokens)
        require_space(out_dir, checkpoint.total_bytes * (training.checkpoints + 3), "Finetuning")
        fingerprint = checkpoint.fingerprint
    return Job(
        model=model_dir.absolute(),
        out=out_dir.absolute(),
        training=training,
        execution=execution,
        micro_batch=recipe.micro_batch_size(training, execution, world, int(tokens.lengths.max())),
        world=world,
        device=device,
        pad_token=pad_token,
        fingerprint=fingerprint,
        key=job_key(fingerprint, tokens, training),
    )


def require_trainable(checkpoint: Checkpoint, training: Training) -> None:
    """Raise `UsageError` where this model has not what is to train, judging by names and counts."""
    if training.lora is not None:
        if training.freeze != "none":
            raise SpecError("LoRA leaves all weights of the model as they are; leave out --freeze or --lora.")
        lora_targets(checkpoint, training.lora)
    require_experts(checkpoint.config, training.freeze)


def _require_vocabulary(checkpoint: Checkpoint, tokens: TokenSet) -> None:
    vocabulary = checkpoint.config.get("vocab_size")
    if vocabulary is not None and int(tokens.ids.max()) >= vocabulary:
        raise UsageError(
            f"The examples have token {int(tokens.ids.max())} and the model has {vocabulary} tokens: the tokenizer "
            f"in {checkpoint.directory} belongs to another model; copy the right one there."
        )


def _completed(job: Job) -> TrainReport | None:
    """The report of this very training if it is complete and its checkpoints are there."""
    if not (job.out / REPORT).exists():
        return None
    report = TrainReport(**read_json(job.out / REPORT))
    there = set(report.checkpoints) <= set(numbered_checkpoints(job.out))
    return report if there and report.key == job.key else None


def _prepare(job: Job, tokens: TokenSet, *, replace: bool) -> None:
    """Clear what another training left, store the job, publish checkpoint-0."""
    if _stored(job.folder / JOB, "key") != job.key:
        _require_own(job, replace=replace)
        old = [job.out / f"checkpoint-{step}" for step in numbered_checkpoints(job.out)]
        for path in old:  # all of them before the first goes
            require_replaceable(path, job.model, what=FINETUNED)
        for path in old:
            remove_directory(path)
        discard(job.folder)
    (job.out / REPORT).unlink(missing_ok=True)
    job.write(tokens)
    _link_start(job.model, job.out / "checkpoint-0")


def _link_start(source: Path, final: Path) -> None:
    """Publish `checkpoint-0`: the starting model itself, its weights by hard links."""
    if final.exists():
        return
    partial = partial_directory(final)
    discard(partial)
    with open_checkpoint(source) as start:
        weights = [*start.shards, *([INDEX] if (source / INDEX).exists() else [])]
    partial.mkdir()
    for name in weights:
        link_or_copy(source / name, partial / name)
    copy_companions(source, partial)
    publish(partial, final, FINETUNED)


def _require_own(job: Job, *, replace: bool) -> None:
    """Raise `UsageError` where the output directory has checkpoints that did not start from this model."""
    owner = _stored(job.out / REPORT, "model_fingerprint") or _stored(job.folder / JOB, "fingerprint")
    if numbered_checkpoints(job.out) and owner != job.fingerprint and not replace:
        raise UsageError(
            f"{job.out} has checkpoints of another model; choose another output directory, or replace them by --force."
        )


def _stored(path: Path, key: str) -> Any:
    return read_json(path).get(key) if path.exists() else None


def _carry_out(job: Job) -> None:
    if job.world > 1 and "WORLD_SIZE" not in os.environ:
        launch(job, job.world)
    else:
        train(job)


def _report(job: Job, tokens: TokenSet) -> None:
    """Store the report, which marks the training as complete, and remove what only a resume needs."""
    history = read_json(job.folder / HISTORY)
    report = TrainReport(
        key=job.key,
        model_fingerprint=job.fingerprint,
        examples=len(tokens),
        dropped=dict(tokens.dropped),
        tokens=len(tokens.ids),
        steps=len(history),
        checkpoints=numbered_checkpoints(job.out),
        micro_batch=job.micro_batch,
        processes=job.world,
        history=history,
    )
    write_json(job.out / REPORT, asdict(report))
    _tidy(job)


def _tidy(job: Job) -> None:
    """Remove what only an unfinished training needs."""
    discard(job.folder)
    for left in leftovers(job.out):
        drop_unfinished(left.with_name(left.stem.lstrip(".")))


def _pad_token(tokenizer: PreTrainedTokenizerBase) -> int:
    padding = tokenizer.pad_token_id
    return int(padding if padding is not None else tokenizer.eos_token_id or 0)


def _is_main_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _wait_for_everyone(device: str) -> None:
    if "WORLD_SIZE" in os.environ:
        from accelerate import PartialState

        PartialState(cpu=device == "cpu").wait_for_everyone()
