"""A run bound to a tree and a machine, and what each of its stages depends on.

A stage's fingerprint contains those of the stages before it, so a change early in the chain makes everything after
it stale.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from emo_select import names, record
from emo_select.errors import CheckpointError
from emo_select.ownership import MODEL_NOTE
from emo_select.spec import Execution, RunSpec, digest
from emo_select.storage import read_json
from emo_select.tree import RunPaths, Tree

if TYPE_CHECKING:
    from emo_select.checkpoint import Checkpoint
    from emo_select.tasks import Task

ABSENT = "not on this machine"
STAGES = ("activations", "select", "prune", "finetune", "eval")
ONE_PASS = ("easy_ep", "global", "frequency", "gate_mass", "ean", "reap", "reap_renormalised")


@dataclass(frozen=True)
class Run:
    """A spec bound to a tree and a machine, with what its stages read."""

    spec: RunSpec
    tree: Tree
    execution: Execution

    @cached_property
    def paths(self) -> RunPaths:
        """Files of this run."""
        return self.tree.run(self.spec)

    @cached_property
    def source(self) -> Checkpoint:
        """The full model on disk, headers checked."""
        from emo_select.checkpoint import open_checkpoint

        return open_checkpoint(self.spec.source, data_dir=self.execution.data_dir)

    @cached_property
    def task(self) -> Task:
        """The task's definition and data."""
        from emo_select.tasks import get_tasks

        machine = self.execution
        return get_tasks([machine.task_file or self.spec.task], data_dir=machine.data_dir)[0]

    @cached_property
    def is_here(self) -> bool:
        """Whether model and data are on this machine; else plans go by shapes, shipped lengths and records."""
        return self.source.has_weights and self.task.available

    @property
    def start_model(self) -> Path:
        """The checkpoint that finetuning starts from, which is also checkpoint-0."""
        return self.paths.selected_model if self.spec.selects else self.source.directory

    @cached_property
    def keeps_all(self) -> bool:
        """Whether nothing is pruned: then no method needs texts, and all methods come to the same result."""
        from emo_select.models.families import experts_per_layer

        spec = self.spec
        return spec.selects and spec.num_shared is None and spec.keep_k >= max(experts_per_layer(self.source.config))

    @property
    def prediction_layers(self) -> Literal["drop", "prune", "keep"]:
        """What pruning does to prediction layers: as asked, else as it did when this run was pruned."""
        return self.execution.prediction_layers or recorded_prediction(self.paths.selected_model)

    def fingerprint(self, stage: str) -> str:
        """Digest of everything the outputs of `stage` depend on; on another machine, the one in the run's record."""
        return digest({"stage": stage, **_DEPENDS[stage](self)}) if self.is_here else self.recorded(stage)

    def claim(self) -> None:
        """Say in the tree whose name the model's folder is, and the task's.

        Raises `LockedError` where another process took it for something else since this run was planned.
        """
        note = self.paths.directory.parent / MODEL_NOTE
        names.claim(note, self.spec.model, self.spec.model_path, self.source.fingerprint)
        if self.task.file is not None:
            note = self.tree.root / names.TASKS / f"{self.spec.task}.json"
            names.claim(note, self.task.name, self.task.file, self.task.fingerprint())

    def recorded(self, name: str) -> str:
        """The fingerprint that a completion record of this run has, or one that no record has."""
        if name == "activations":
            return record.activations_fingerprint(self.tree.activations_record(self.spec)) or ABSENT
        done = record.load(self.paths)
        return done.stages[name].fingerprint if done and name in done.stages else ABSENT


def recorded_prediction(pruned: Path) -> Literal["drop", "prune", "keep"]:
    """What a pruned folder says became of prediction layers."""
    metadata = pruned / "pruning_metadata.json"
    found = read_json(metadata).get("prediction_layers") if metadata.is_file() else None
    return found if found in ("prune", "keep") else "drop"


def _activations_depend(run: Run) -> dict[str, Any]:
    chosen = run.spec.calibration
    texts = _file_digest(chosen.file) if chosen.file else run.task.fingerprint()
    return {"model": run.source.forward_fingerprint, "texts": texts, "calibration": chosen.model_dump(),
            "statistics": record.STATISTICS}


def _select_depends(run: Run) -> dict[str, Any]:
    spec = run.spec
    own = {"method": spec.method, "keep_k": spec.keep_k, "num_shared": spec.num_shared}
    if run.keeps_all:
        return {**own, "model": run.source.forward_fingerprint}
    if spec.method == "random":
        return {**own, "model": run.source.forward_fingerprint, "seed": spec.calibration.seed}
    if spec.method == "layerwise":
        return {**own, "score": spec.score, **_activations_depend(run)}
    return {**own, "activations": run.fingerprint("activations")}


def _prune_depends(run: Run) -> dict[str, Any]:
    layers = run.prediction_layers
    own = {"prediction_layers": layers} if layers != "drop" else {}
    if run.keeps_all:
        return {"keep": "all", "model": run.source.fingerprint, **own}
    return {"select": run.fingerprint("select"), "model": run.source.fingerprint, **own}


def _start_depends(run: Run) -> dict[str, Any]:
    return {"start": run.fingerprint("prune") if run.spec.selects else run.source.fingerprint}


def _finetune_depends(run: Run) -> dict[str, Any]:
    training = run.spec.training
    examples = _file_digest(training.file) if training.file else run.task.fingerprint()
    texts = run.spec.calibration
    own = {} if training.file else {"num_shots": texts.num_shots, "leave_out_shots": texts.leave_out_shots}
    return {**_start_depends(run), "examples": examples, **own, "training": training.model_dump()}


def _eval_depends(run: Run) -> dict[str, Any]:
    return {**_start_depends(run), "task": run.task.fingerprint(), "evaluation": run.spec.evaluation.model_dump()}


def _file_digest(path: str) -> str:
    from emo_select.experts.calibration import file_fingerprint

    return file_fingerprint(path)


_DEPENDS: dict[str, Callable[[Run], dict[str, Any]]] = {
    "activations": _activations_depend,
    "select": _select_depends,
    "prune": _prune_depends,
    "finetune": _finetune_depends,
    "eval": _eval_depends,
}


def checkpoint_fingerprint(run: Run, step: int) -> str:
    """Digest of what the results of `checkpoint-<step>` depend on; training matters from step 1 on."""
    if not run.is_here:
        return run.recorded(f"eval/checkpoint-{step}")
    trained = {"finetune": run.fingerprint("finetune")} if step else {}
    return digest({"stage": "eval", "step": step, **trained, **_eval_depends(run)})


def reopen(directory: Path, execution: Execution) -> Run:
    """The run that a run directory belongs to, from its `run.json`.

    Raises `CheckpointError` where there is none or it cannot be read.
    """
    directory = directory.resolve()
    found = record.load(RunPaths(directory))
    if found is None:
        raise CheckpointError(f"{directory} has no run.json; start it with `emo-select run` or `emo-select select`.")
    if found.task_file is not None and Path(found.task_file).is_file():
        execution = execution.model_copy(update={"task_file": found.task_file})
    spec = found.spec.model_copy(update={"model_folder": directory.parent.name})
    run = Run(spec, Tree(directory.parent.parent), execution)
    run.__dict__["paths"] = RunPaths(directory)  # also where it was given another name
    return run
