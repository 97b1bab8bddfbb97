"""`run`: one run from Python, as the command line does it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from emo_select import record
from emo_select.errors import EmoSelectError
from emo_select.faults import translated
from emo_select.pipeline.expand import Wanted, check_space, expand
from emo_select.pipeline.plan import plan
from emo_select.pipeline.runs import STAGES
from emo_select.pipeline.stages import execute
from emo_select.record import RunRecord
from emo_select.spec import Execution, RunSpec
from emo_select.tree import Tree


@translated()
def run(spec: RunSpec, output_dir: str | Path | None = None, *, execution: Execution | None = None,
        stages: Sequence[str] = STAGES, force: Sequence[str] = ()) -> RunRecord:
    """Do what is missing or stale of one run and return its record.

    Args:
        spec: what to run. `model`, `task` and `keep_k` are checked before any work.
        output_dir: root of the run tree; None takes EMO_SELECT_OUTPUT_DIR or ./selective_evals_final.
        execution: device, precision, batch sizes; None chooses by machine.
        stages, force: stages to consider, and those to repeat.

    Raises:
        UsageError: before any work. Other `EmoSelectError`s: during work, with everything finished kept.
    """
    tree, machine = Tree.at(output_dir), execution or Execution()
    settings = spec.model_dump(exclude={"model", "task", "keep_k", "method", "selects", "model_path", "model_folder"})
    wanted = Wanted([spec.model], [spec.task], [str(spec.keep_k)], [spec.method], settings)
    [bound] = expand(wanted, tree, machine)
    tree.require_writable()
    steps = plan(bound, stages, force)
    check_space([bound], tree)
    execute(bound, steps)
    done = record.load(bound.paths)
    if done is None:
        raise EmoSelectError(f"Nothing was run for {bound.paths.directory.name}; all its stages were skipped.")
    return done
