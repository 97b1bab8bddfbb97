"""One process of a run on several; started by `torchrun` or Slurm, not by hand."""

import sys
from pathlib import Path

from emo_select.pretrain.engine.work import main

main(Path(sys.argv[1]))
