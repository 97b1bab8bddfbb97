"""Hands the objective and a recipe to ai2-olmo-core (extra `pretrain`), which is used as it is installed."""
