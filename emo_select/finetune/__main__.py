"""One process of a training on several; started by `torchrun`, not by hand."""

import sys

from emo_select.finetune.worker import main

main(sys.argv[1])
