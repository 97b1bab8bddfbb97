"""Score a model on tasks: lm-eval drives an engine that runs each shared prefix once. See docs/evaluation.md."""

from emo_select.evaluate.curve import evaluate_keep_set, sweep_keep_k
from emo_select.evaluate.options import EvalOptions
from emo_select.evaluate.run import Evaluator, evaluate_checkpoint, load_engine

__all__ = ["EvalOptions", "Evaluator", "evaluate_checkpoint", "evaluate_keep_set", "load_engine", "sweep_keep_k"]
