"""The experts half of a decoder layer, run on packed tokens, and what can be measured while it runs.

Shapes: T tokens, E experts of the layer, K experts per token, D hidden, S = T·K assignments sorted by expert.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from emo_select.experts.batches import GroupRows
from emo_select.experts.routers import Scores
from emo_select.experts.rules import LayerRules
from emo_select.experts.scores import NEEDS_EXPERTS, LayerSums, Part


class Recorder(threading.local):
    """Sums up what router, experts and block of one layer show for a batch. Each thread records a batch of its own.

    Call `begin`, run the batch, and give what `parts` then holds to `sums`. Only statistics of `sums` are computed.
    """

    def __init__(self, sums: LayerSums, rules: LayerRules) -> None:
        self.sums, self.rules = sums, rules
        self.begin([(0, None, 1)])

    def begin(self, group_rows: GroupRows) -> None:
        """Forget the last batch; the next one's rows belong to these groups (see `Batch.group_rows`)."""
        self.parts: list[Part] = []
        self.places: Tensor | None = None
        """Which of the rows that come are tokens of the batch, in its packed order; None: all."""
        self._group_rows = group_rows
        self._index, self._gates, self._probability = torch.empty(0), torch.empty(0), torch.empty(0)
        self._norms: Tensor | None = None

    @property
    def needs_norms(self) -> bool:
        """Whether expert outputs have to be measured."""
        return not NEEDS_EXPERTS.isdisjoint(self.sums.values)

    @property
    def needs_choice(self) -> bool:
        """Whether it matters which experts the router chose, or its scores suffice."""
        return any(name != "probability" for name in self.sums.values)

    def scored(self, scores: Scores) -> None:
        """The router's scores."""
        self._probability = self._tokens(scores.probabilities)
        self._add("probability", self._probability)

    def chosen(self, gates: Tensor, index: Tensor) -> None:
        """Routing weights and expert indices (T, K)."""
        self._index, self._gates = self._tokens(index), self._tokens(gates).float()
        self._add_chosen("count", self._gates.new_ones(()).expand_as(self._gates))
        self._add_chosen("gate", self._gates)

    def measured(self, norms: Tensor) -> None:
        """L2 norms (T, K) in fp32 of the chosen experts' outputs, before weighting."""
        self._measured(self._tokens(norms))

    def measured_all(self, norms: Tensor) -> None:
        """The same for all experts (T, E)."""
        self._measured(self._tokens(norms).gather(1, self._index))

    def _measured(self, norms: Tensor) -> None:
        self._norms = norms
        self._add_chosen("norm", self._norms)
        self._add_chosen("reap", self._gates * self._norms)
        if "reap_renormalised" in self.sums.values:
            self._add_chosen("reap_renormalised", self._renormalised() * self._norms)

    def finished(self, hidden: Tensor, output: Tensor) -> None:
        """Input and output (T, D) of the whole block, separate shared experts included."""
        if self._norms is None or "easy_ep" not in self.sums.values:
            return
        before = self._tokens(hidden).double()  # 1 - cos of nearly parallel vectors would lose half the digits of fp32
        turned = (1 - F.cosine_similarity(before, before + self._tokens(output), dim=-1)).clamp(min=0)
        probability = self._probability.gather(1, self._index.clamp(max=self.rules.experts - 1))
        self._add_chosen("easy_ep", probability * self._norms * turned[:, None])

    def _tokens(self, values: Tensor) -> Tensor:
        return values if self.places is None else values.index_select(0, self.places.to(values.device))

    def _renormalised(self) -> Tensor:
        """Gates divided by their sum over the token's top-k, routed and shared apart."""
        shared = self._index >= self.rules.routed
        routed_sum = self._gates.masked_fill(shared, 0).sum(-1, keepdim=True)
        shared_sum = self._gates.masked_fill(~shared, 0).sum(-1, keepdim=True)
        return self._gates / torch.where(shared, shared_sum, routed_sum).clamp(min=torch.finfo(torch.float32).tiny)

    def _add(self, name: str, per_token: Tensor) -> None:
        """Sum (T, E) in fp64 over the rows of each group, as often as they count."""
        if name not in self.sums.values:
            return
        for group, rows, times in self._group_rows:
            chosen = per_token if rows is None else per_token.index_select(0, rows.to(per_token.device))
            self.parts.append((name, group, times * chosen.sum(dim=0, dtype=torch.float64)))

    def _add_chosen(self, name: str, per_choice: Tensor) -> None:
        """Sum values (T, K) of the chosen experts, which are distinct for each token; a choice of none is left out."""
        if name in self.sums.values:
            experts = self.sums.experts
            dense = per_choice.new_zeros(len(per_choice), experts + 1)
            self._add(name, dense.scatter_(1, self._index.clamp(max=experts), per_choice)[:, :experts])


def streamed_experts(template: nn.Module, weights: Mapping[str, Tensor], rows: Tensor | None,
                     recorder: Recorder | None) -> nn.Module:
    """The experts of a layer with weights that were read from disk; see `StreamedExperts`."""
    if len(inspect.signature(template.forward).parameters) == 1:
        return RepeatedExperts(template, weights, rows, recorder)
    by_flags = hasattr(template, "_apply_gate") and hasattr(template, "is_transposed")
    return (StreamedExperts if by_flags else FilledExperts)(template, weights, rows, recorder)


class StreamedExperts(nn.Module):
    """Experts whose weights were read from disk, in place of a layer's own expert module.

    `template` is that module (on the meta device): it tells activation, layout and biases. `weights` are its tensors
    by name with the loaded experts on axis 0; `rows` (E,) maps the router's indices to them, None if they agree.
    """

    def __init__(self, template: nn.Module, weights: Mapping[str, Tensor], rows: Tensor | None = None,
                 recorder: Recorder | None = None) -> None:
        super().__init__()
        self._template: tuple[Any] = (template,)  # hidden from the module tree: it has no weights
        self.weights, self.rows, self.recorder = dict(weights), rows, recorder

    def forward(self, hidden: Tensor, index: Tensor, gates: Tensor) -> Tensor:
        """Weighted sum of the chosen experts' outputs: hidden (T, D), index and gates (T, K) → (T, D)."""
        loaded = index if self.rows is None else self.rows[index]
        order = torch.argsort(loaded.flatten(), stable=True)
        counts = torch.bincount(loaded.flatten(), minlength=len(self.weights["down_proj"]))
        outputs = self._outputs(hidden, order // index.shape[1], counts, loaded.flatten()[order])
        place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        place = place.view(index.shape)
        if self.recorder is not None:
            self.recorder.chosen(gates, index)
        if self.recorder is not None and self.recorder.needs_norms:
            norms = torch.linalg.vector_norm(outputs, dim=-1, dtype=torch.float32)
            self.recorder.measured(norms[place])
        return combine(outputs, place, gates)

    def _outputs(self, hidden: Tensor, tokens: Tensor, counts: Tensor, experts: Tensor) -> Tensor:
        """Expert outputs (S, D), sorted by expert."""
        template = self._template[0]
        apply = _grouped if _has_grouped_kernel(hidden) else _one_by_one
        return apply(template, self.weights, hidden, tokens, counts, experts)


class FilledExperts(nn.Module):
    """Experts with a forward of their own, whose layout is known to them alone: the module itself, with its weights.

    Arguments are those of `StreamedExperts`.
    """

    def __init__(self, template: nn.Module, weights: Mapping[str, Tensor], rows: Tensor | None = None,
                 recorder: Recorder | None = None) -> None:
        super().__init__()
        self.module, self.recorder = template, recorder
        _fill(template, weights, rows)

    def forward(self, hidden: Tensor, index: Tensor, gates: Tensor) -> Any:
        """As the module computes it: hidden (T, D), index and gates (T, K)."""
        if self.recorder is not None:
            self.recorder.chosen(gates, index)
        if self.recorder is not None and self.recorder.needs_norms:
            self.recorder.measured(self._norms(hidden.reshape(-1, hidden.shape[-1]), index))
        return self.module(hidden, index, gates)

    def _norms(self, hidden: Tensor, index: Tensor) -> Tensor:
        """L2 norms (T, K) of the chosen experts' outputs, one expert at a time."""
        norms = hidden.new_zeros(index.shape, dtype=torch.float32)
        for expert in index.unique().tolist():
            token, slot = torch.where(index == expert)
            alone = index.new_full((len(token), index.shape[1]), expert)  # as wide as ever: some take one for none
            gates = hidden.new_zeros(alone.shape)
            gates[:, 0] = 1
            output = self.module(hidden[token], alone, gates)
            norms[token, slot] = torch.linalg.vector_norm(output.reshape(len(token), -1), dim=-1, dtype=torch.float32)
        return norms


class RepeatedExperts(nn.Module):
    """Experts that are called with all tokens once per expert, each multiplied by its gate, so that most are zero.

    Only tokens that are not zero are run, by the module itself. Arguments are those of `StreamedExperts`.
    """

    def __init__(self, template: nn.Module, weights: Mapping[str, Tensor], rows: Tensor | None = None,
                 recorder: Recorder | None = None) -> None:
        super().__init__()
        self.module, self.recorder = template, recorder
        _fill(template, weights, rows)
        self._experts = len(next(template.parameters()))

    def forward(self, repeated: Tensor) -> Tensor:
        """(E·T, D) → (E·T, D)."""
        values = repeated.view(self._experts, -1, repeated.shape[-1])
        used = values.ne(0).any(dim=-1)
        most = max(1, int(used.sum(dim=1).max()))
        places = used.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :most, None].expand(
            -1, -1, values.shape[-1])
        found = self.module(values.gather(1, places).flatten(0, 1)).view(places.shape)
        output = torch.zeros_like(values).scatter_(1, places, found)
        if self.recorder is not None and self.recorder.needs_norms:
            self.recorder.measured_all(torch.linalg.vector_norm(output, dim=-1, dtype=torch.float32).T)
        return output.flatten(0, 1)


def _fill(template: nn.Module, weights: Mapping[str, Tensor], rows: Tensor | None) -> None:
    for name, parameter in dict(template.named_parameters()).items():
        owner, _, leaf = name.rpartition(".")
        chosen = weights[name] if rows is None else weights[name].index_select(0, rows)
        template.get_submodule(owner)._parameters[leaf] = nn.Parameter(_as_wide(chosen, parameter.shape), False)


def _as_wide(values: Tensor, shape: torch.Size) -> Tensor:
    """`values` in a parameter's shape; entries behind the experts, which compute nothing, are zero."""
    if values.numel() < shape.numel():
        behind = values.new_zeros(shape[0] - len(values), *values.shape[1:])
        values = torch.cat([values, behind])
    return values.reshape(shape)


def combine(outputs: Tensor, place: Tensor, gates: Tensor) -> Tensor:
    """Σ_k gates · outputs[place]: outputs (S, D), place and gates (T, K) → (T, D)."""
    if outputs.device.type == "cpu" and outputs.dtype == torch.float32:
        # one pass over `outputs` instead of three: gather, scale and add in a single kernel
        return F.embedding_bag(place, outputs, per_sample_weights=gates.to(outputs.dtype), mode="sum")
    return (outputs[place] * gates[..., None].to(outputs.dtype)).sum(dim=1).to(outputs.dtype)


def _has_grouped_kernel(hidden: Tensor) -> bool:
    return (hidden.device.type == "cuda" and hidden.dtype == torch.bfloat16
            and torch.cuda.get_device_capability(hidden.device) >= (8, 0))


def _one_by_one(template: Any, weights: Mapping[str, Tensor], hidden: Tensor, tokens: Tensor, counts: Tensor,
                experts: Tensor) -> Tensor:
    """One matrix product per expert that has tokens; every intermediate stays small enough for the cache."""
    outputs = hidden.new_empty(len(tokens), hidden.shape[-1])
    first, activate = _inner(template)
    start = 0
    for expert, count in enumerate(counts.tolist()):
        if count:
            stop = start + count
            inner = _linear(template, weights, first, expert, hidden.index_select(0, tokens[start:stop]))
            _linear(template, weights, "down_proj", expert, activate(inner), outputs[start:stop])
            start = stop
    return _post_norm(template, outputs)


def _inner(template: Any) -> tuple[str, Callable[[Tensor], Tensor]]:
    """Name of an expert's first product, and what becomes of its result."""
    return ("gate_up_proj", template._apply_gate) if template.has_gate else ("up_proj", template.act_fn)


def _linear(template: Any, weights: Mapping[str, Tensor], name: str, expert: int, inputs: Tensor,
            out: Tensor | None = None) -> Tensor:
    weight = weights[name][expert]
    product = torch.mm(inputs, weight if template.is_transposed else weight.T, out=out)
    bias = weights.get(f"{name}_bias")
    return product if bias is None else product.add_(bias[expert])


def _grouped(template: Any, weights: Mapping[str, Tensor], hidden: Tensor, tokens: Tensor, counts: Tensor,
             experts: Tensor) -> Tensor:
    """All experts in two grouped matrix products (bf16 on a GPU)."""
    stops = counts.cumsum(0).to(torch.int32)
    values = hidden.index_select(0, tokens)
    first, activate = _inner(template)
    for name in (first, "down_proj"):
        weight = weights[name] if template.is_transposed else weights[name].transpose(-2, -1)
        values = F.grouped_mm(values, weight, offs=stops)
        if f"{name}_bias" in weights:
            values = values + weights[f"{name}_bias"][experts]
        if name == first:
            values = activate(values)
    return _post_norm(template, values)


def _post_norm(template: Any, outputs: Tensor) -> Tensor:
    return template.post_expert_norm(outputs) if template.has_post_expert_norm else outputs
