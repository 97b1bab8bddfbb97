"""`python -m emo_select` is the program, so that `torchrun -m emo_select` can start it."""

from emo_select.cli.app import main

main()
