"""What each process of a test does that torchrun starts: train small models one by one, then die in the last training.

    python train_and_die.py FOLDER FAMILY,… ARGUMENTS OF emo-select
"""

import os
import signal
import sys
from pathlib import Path

from accelerate.state import AcceleratorState
from finetune_cases import CPU, family_tokens

from emo_select.cli.app import app
from emo_select.finetune import saving
from emo_select.finetune.run import finetune_tokens
from emo_select.spec import Training

DIES_AFTER = 3  # steps


def train_family(folder: Path, family: str, out: Path):
    """Four steps, each of two micro-batches on one process and of one on each of two."""
    training = Training(batch_size=4, learning_rate="1e-2", warmup=0)
    return finetune_tokens(folder / family, family_tokens(), out, training, CPU.model_copy(
        update={"micro_batch_size": 2}), pad_token=1)


def die_after_saving() -> None:
    """Let the state be written at every step, and the process be killed when it has been."""
    save = saving.Keeper.save

    def save_and_die(self, step):
        save(self, step)
        if step == DIES_AFTER:
            os.kill(os.getpid(), signal.SIGKILL)

    saving.SAVING_SHARE, saving.Keeper.save = 1e9, save_and_die


if __name__ == "__main__":
    where = Path(sys.argv[1])
    for name in sys.argv[2].split(","):
        train_family(where, name, where / f"{name}-two")
        AcceleratorState._reset_state()  # as in a new process
    die_after_saving()
    app(sys.argv[3:])
