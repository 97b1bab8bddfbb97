"""The stages of a run in order: what is done, what is stale, what to do, and doing it.

    activations → select → prune → finetune → eval

`runs` binds a spec to a tree and says what each stage depends on; `plan` decides; `stages` does the work by calling
the rooms below; `expand` turns lists of models, tasks and keep-k into checked runs.
"""

from emo_select.pipeline.expand import Wanted, check_space, expand
from emo_select.pipeline.plan import Action, Step, plan
from emo_select.pipeline.runs import ONE_PASS, STAGES, Run, reopen
from emo_select.pipeline.stages import Planned, collect, execute, execute_all

__all__ = ["ONE_PASS", "STAGES", "Action", "Planned", "Run", "Step", "Wanted", "check_space", "collect", "execute",
           "execute_all", "expand", "plan", "reopen"]
