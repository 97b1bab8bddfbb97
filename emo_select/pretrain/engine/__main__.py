"""One process of a run on several; started by `torchrun` or Slurm, not by hand."""

import logging
import sys
from pathlib import Path

if __name__ == "__main__":
    logging.basicConfig(level=logging.ERROR, format="%(message)s")  # before the engine, which talks while it loads

    from emo_select.pretrain.engine.work import main

    main(Path(sys.argv[1]))
