"""What a run will take, from its recipe alone: steps, bytes, memory, GPU-hours. Importing this imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from emo_select.errors import SpecError
from emo_select.pretrain.recipe import Recipe

GB = 1e9


@dataclass(frozen=True)
class Plan:
    """Figures of a run on `gpus` GPUs. Memory is an estimate; GPU-hours follow from the rate that the user gives."""

    recipe: Recipe
    gpus: int
    tokens_per_second: float | None = None
    available: int | None = None
    """Tokens of the data, if it is known."""

    @property
    def tokens(self) -> int:
        """Tokens that are trained on, whole batches."""
        return self.recipe.steps * self.recipe.batch_tokens

    @property
    def epochs(self) -> float | None:
        """How often the data is read."""
        return None if self.available is None else self.tokens / max(1, self.available)

    @property
    def accumulated(self) -> int:
        """Micro-batches of a step on each GPU."""
        return self.recipe.batch.sequences // (self.gpus * self.recipe.batch.micro_batch)

    @property
    def balance_group(self) -> int:
        """Sequences over which the load of experts is balanced: one micro-batch of every rank."""
        ranks = self.gpus if self.recipe.objective.balance == "global" else 1
        return self.recipe.batch.micro_batch * ranks

    @property
    def data_bytes(self) -> int:
        """Bytes of the token files that the run reads, if it reads none of them twice."""
        return self.tokens * token_width(self.recipe.tokenizer.vocab_size)

    @property
    def checkpoint_bytes(self) -> int:
        """One checkpoint: fp32 weights and both moments."""
        return 12 * parameters(self.recipe)[0]

    @property
    def checkpoints(self) -> int:
        """Checkpoints that stay, the first and the last included."""
        return self.recipe.steps // self.recipe.save.every + 1 + bool(self.recipe.steps % self.recipe.save.every)

    @property
    def gpu_bytes(self) -> int:
        """Estimate of the memory of one GPU: the shard of weights, gradients and moments, and the activations."""
        sharded = 16 * parameters(self.recipe)[0] / self.gpus
        return int(sharded + _gathered(self.recipe) + _activations(self.recipe))

    @property
    def flops(self) -> float:
        """Floating point operations: 6 per active parameter and token, and those of causal attention."""
        model, length = self.recipe.model, self.recipe.data.sequence_length
        attention = 6 * model.layers * model.hidden_size * length  # 12 for both products, half of them masked
        return (6.0 * parameters(self.recipe)[1] + attention) * self.tokens

    @property
    def gpu_hours(self) -> float | None:
        """At `tokens_per_second` of one GPU."""
        return None if self.tokens_per_second is None else self.tokens / self.tokens_per_second / 3600

    def told(self) -> dict[str, int | float | str | None]:
        """All figures under the names that --json uses."""
        total, active = parameters(self.recipe)
        hours = self.gpu_hours
        return {
            "recipe": self.recipe.name, "parameters": total, "active_parameters": active, "steps": self.recipe.steps,
            "tokens": self.tokens, "epochs": self.epochs, "batch_tokens": self.recipe.batch_tokens, "gpus": self.gpus,
            "micro_batches_per_step": self.accumulated, "balance_group_sequences": self.balance_group,
            "data_bytes": self.data_bytes, "checkpoint_bytes": self.checkpoint_bytes,
            "checkpoints": self.checkpoints,
            "gpu_memory_bytes": self.gpu_bytes, "flops": self.flops,
            "tokens_per_second_per_gpu": self.tokens_per_second, "gpu_hours": hours,
            "days": None if hours is None else hours / self.gpus / 24,
        }


def check_divides(recipe: Recipe, ranks: int) -> None:
    """Raise `SpecError` where a step does not divide over so many processes."""
    sequences, micro = recipe.batch.sequences, recipe.batch.micro_batch
    if sequences % (ranks * micro):
        raise SpecError(f"A batch of {sequences} sequences does not divide over {ranks} processes in micro-batches of "
                        f"{micro}; choose a number of GPUs that divides {sequences // micro}, or --set "
                        "batch.micro_batch=N.")


def token_width(vocabulary: int) -> int:
    """Bytes of one token on disk: those of the smallest unsigned type that holds the vocabulary."""
    return next(width for width in (1, 2, 4, 8) if vocabulary <= 2 ** (8 * width))


def parameters(recipe: Recipe) -> tuple[int, int]:
    """All parameters, and those that one token uses (embedding rows of other tokens counted as unused)."""
    model = recipe.model
    width, rows = model.hidden_size, recipe.tokenizer.padded
    layers = [_feed_forward(recipe, layer) for layer in range(model.layers)]
    fixed = model.layers * (4 * width * width + 2 * width) + width + rows * width
    return fixed + rows * width + sum(all_ for all_, _ in layers), fixed + sum(used for _, used in layers)


def _feed_forward(recipe: Recipe, layer: int) -> tuple[int, int]:
    """(all, used by a token) parameters of a layer's experts and router, or of its dense block."""
    model = recipe.model
    width, dense, experts = model.hidden_size, model.dense, model.experts
    if experts is None or (dense is not None and layer < (dense.layers or 0)):
        assert dense is not None
        size = 3 * width * dense.width + (2 * dense.width + width if dense.bias else 0)
        return size, size
    router, expert = experts.count * width, 3 * width * experts.width
    return router + experts.count * expert, router + experts.top_k * expert


def _gathered(recipe: Recipe) -> int:
    """The weights of two blocks in bf16 and the gradient of one in fp32, while FSDP works on it."""
    model = recipe.model
    largest = max(_feed_forward(recipe, layer)[0] for layer in range(model.layers))
    return (largest + 4 * model.hidden_size**2) * (2 * 2 + 4)


def _activations(recipe: Recipe) -> int:
    """bf16 activations kept for the backward pass, and the logits, without recomputation."""
    model = recipe.model
    tokens = recipe.batch.micro_batch * recipe.data.sequence_length
    wide = model.dense.width if model.experts is None and model.dense else 0
    if model.experts is not None:
        wide = model.experts.top_k * (model.experts.width + model.hidden_size)
    per_layer = tokens * (10 * model.hidden_size + 3 * wide) * 2
    return model.layers * per_layer + tokens * recipe.tokenizer.padded * (2 + 4)
