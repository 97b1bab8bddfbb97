"""Score a model on tasks: lm-eval drives an engine that runs each shared prefix once. See docs/evaluation.md."""

from emo_select.evaluate.run import EvalOptions, Evaluator, evaluate_checkpoint, load_engine

__all__ = ["EvalOptions", "Evaluator", "evaluate_checkpoint", "load_engine"]
