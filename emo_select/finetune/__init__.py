"""Finetuning a pruned (or any) model by the published recipe, and putting what it learned back into the full model.

Importing this imports no torch; the functions do.
"""

from emo_select.finetune.run import TrainReport, finetune, require_own_examples, require_trainable

__all__ = ["TrainReport", "finetune", "require_own_examples", "require_trainable"]
