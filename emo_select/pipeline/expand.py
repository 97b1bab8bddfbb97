"""From what a user asks for (several models, tasks, keep-k, methods) to checked runs, before any work."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from emo_select import progress
from emo_select.checkpoint.companions import companions
from emo_select.errors import SpecError
from emo_select.names import Names, absolute
from emo_select.ownership import require_own_run
from emo_select.pipeline.adopt import twin_key
from emo_select.pipeline.runs import Run
from emo_select.spec import Execution, RunSpec, Training, checked, parse_keep_k, with_whole_paths
from emo_select.storage import require_space
from emo_select.tasks import lengths
from emo_select.tree import Tree

if TYPE_CHECKING:
    from emo_select.checkpoint import Checkpoint
    from emo_select.tasks import Task


@dataclass(frozen=True)
class Wanted:
    """A product of models, tasks, keep-k and methods, with the settings that all its runs share."""

    models: Sequence[str]
    tasks: Sequence[str]
    keep_ks: Sequence[str]
    methods: Sequence[str] = ("layerwise",)
    settings: dict[str, Any] = field(default_factory=dict)
    """Further keys of `RunSpec`: calibration, training, evaluation, score, num_shared."""


def expand(wanted: Wanted, tree: Tree, execution: Execution, *, download: bool = True) -> list[Run]:
    """Every run of the product, each checked against its model's headers and its task's data.

    Dense models skip selection and are run once per task. `download` False is for plans: models come from disk, and
    of what is not there the shapes do. Raises a `UsageError` for the first thing that cannot work.
    """
    from emo_select.tasks import get_tasks

    for name in ("models", "tasks", "keep_ks", "methods"):
        if not getattr(wanted, name):
            raise SpecError(f"Nothing to run: give at least one --{name.rstrip('s').replace('_', '-')}.")
    training = checked(Training, wanted.settings.get("training", {}))
    _check_machine(execution, training)
    tasks = get_tasks(wanted.tasks, data_dir=execution.data_dir)
    runs: list[Run] = []
    names = Names(tree)
    called = {id(task): names.task(task) for task in tasks}
    for model in dict.fromkeys(wanted.models):
        source = _opened(model, execution, download=download)
        _check_training(training, source)
        if source.has_weights:
            companions(source.directory)  # refuses links, before selection takes hours
        choices, placed = list(_choices(model, source, wanted)), names.keys(model, absolute(model))
        for task in tasks:
            if download or not lengths.known(task):
                task.require_data()
            where = {**placed, "task": called[id(task)]}
            runs += [_bind(_spec(where, choice, wanted), tree, execution, source, task) for choice in choices]
    return runs


def _opened(model: str, execution: Execution, *, download: bool) -> Checkpoint:
    from emo_select.checkpoint import open_checkpoint
    from emo_select.models.files import require_tokenizer
    from emo_select.models.preflight import check_weights
    from emo_select.models.shapes import open_or_outline

    found = None if download else open_or_outline(model, execution.data_dir)
    if found is None:
        found = open_checkpoint(model, data_dir=execution.data_dir, download=download)
    if found.has_weights:
        check_weights(found)
        require_tokenizer(found.directory, trust_remote_code=execution.trust_remote_code)
    return found


def _check_machine(execution: Execution, training: Training) -> None:
    """Ask torch about devices, and the recipe about batches, only where something other than the default is wanted."""
    if execution.device not in ("auto", "cpu"):
        from emo_select.experts import StreamOptions

        StreamOptions(device=execution.device).torch_device()
    if execution.num_gpus or execution.micro_batch_size or execution.report_to != "none":
        from emo_select.finetune import recipe

        recipe.require_gpus(execution, recipe.training_device(execution))
        recipe.require_tracker(execution)
        recipe.micro_batch_size(training, execution, execution.num_gpus or 1, longest=1)


def _check_training(training: Training, source: Checkpoint) -> None:
    """The full model decides for the pruned one, too: pruning takes no kind of module away."""
    if training.lora is not None or training.freeze != "none":
        from emo_select.finetune import require_trainable

        require_trainable(source, training)


@dataclass(frozen=True)
class _Choice:
    keep_k: int
    method: str
    selects: bool = True


def _choices(model: str, source: Checkpoint, wanted: Wanted) -> Iterator[_Choice]:
    from emo_select.experts.keepset import check_keep_k
    from emo_select.models.families import is_moe

    if not is_moe(source.config):
        yield _dense_choice(model, source, wanted)
        return
    total = num_experts(source.config)
    for text in dict.fromkeys(wanted.keep_ks):
        keep_k = parse_keep_k(text, total)
        notice = check_keep_k(source.config, keep_k, wanted.settings.get("num_shared"))
        if notice:
            progress.say_once(notice)
        yield from (_Choice(keep_k, method) for method in dict.fromkeys(wanted.methods))


def _dense_choice(model: str, source: Checkpoint, wanted: Wanted) -> _Choice:
    from emo_select.models.families import DENSE_TYPES, family_of

    if source.config.get("model_type") not in DENSE_TYPES:
        family_of(source.config)  # raises, naming the supported families
    progress.say_once(f"{model} has no experts to select from: it is finetuned and evaluated as it is, once per task.")
    numbers = [int(text) for text in wanted.keep_ks if text.isdigit()]
    return _Choice(numbers[0] if numbers else 1, "layerwise", selects=False)


def num_experts(config: dict[str, Any]) -> int:
    """Experts of a full layer, shared ones included: the largest count of any layer."""
    from emo_select.models.families import experts_per_layer

    return max(experts_per_layer(config))


def _spec(where: dict[str, Any], choice: _Choice, wanted: Wanted) -> RunSpec:
    return with_whole_paths(RunSpec.parse({
        **where, "keep_k": choice.keep_k, "method": choice.method, "selects": choice.selects, **wanted.settings,
    }))


def _bind(spec: RunSpec, tree: Tree, execution: Execution, source: Checkpoint, task: Task) -> Run:
    run = Run(spec, tree, execution)
    require_own_run(run.paths.directory)
    run.__dict__.update(source=source, task=task)  # opened once for all runs of the product
    return run


def check_space(runs: Iterable[Run], tree: Tree) -> None:
    """Raise `DiskSpaceError` unless all pruned checkpoints of `runs` that are still to be written fit together."""
    missing = [run for run in runs if run.spec.selects and not run.paths.selected_model.exists()]
    apart = {twin_key(run.spec, keeps_all=run.keeps_all): run for run in missing}  # the others are hard links
    needed = sum(pruned_bytes(run) for run in apart.values())
    require_space(tree.root, needed, "Writing the pruned checkpoints")


def pruned_bytes(run: Run) -> int:
    """Bytes of the checkpoint that is finetuned: expert tensors shrink by kept/all, everything else stays."""
    from emo_select.models.families import experts_per_layer, family_of

    if not run.spec.selects:
        return run.source.total_bytes
    source, family = run.source, family_of(run.source.config)
    counts = experts_per_layer(source.config)
    total = 0.0
    for name, info in source.tensors.items():
        weight = source.formats.owner.get(name)
        role = family.role(weight.name if weight else name)
        pruned = role.kind != "other" and role.layer is not None and role.layer < len(counts)
        share = min(1.0, run.spec.keep_k / counts[role.layer]) if pruned and role.layer is not None else 1.0
        total += info.bytes * share
    return int(total)
