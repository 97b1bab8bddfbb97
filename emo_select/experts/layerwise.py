"""Layerwise selection: choose a layer's experts with all layers below already pruned, prune it, go on.

Several keep-k share one pass over the disk. They share hidden states as long as they have kept the same experts;
after that each branch carries its own. A layer's experts are read once its keep sets are known, the kept ones only,
and run together with the attention of the next layer, so hidden states move once per layer. The last layer's experts
are neither read nor run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emo_select import progress
from emo_select.checkpoint import Checkpoint
from emo_select.experts.batches import Batch
from emo_select.experts.keepset import KeepSet
from emo_select.experts.layers import Back, Embedded, Front
from emo_select.experts.moe import Recorder
from emo_select.experts.options import StreamOptions
from emo_select.experts.passes import Meter, Pass
from emo_select.experts.resume import Snapshots
from emo_select.experts.rules import KeepK, choose, full_set, resolve_keep_k
from emo_select.experts.scores import LayerSums, Part, criterion, layer_score, mixture
from emo_select.experts.states import HiddenStates
from emo_select.experts.stream import Shell

Kept = list[list[int] | None]


def select_layerwise(checkpoint: Checkpoint, token_ids: Sequence[Sequence[int]], keep_ks: Sequence[KeepK], *,
                     groups: Sequence[str] | None = None, weights: Mapping[str, float] | None = None,
                     num_shared: int | None = None, score: str = "router_probability",
                     options: StreamOptions | None = None, work_dir: Path | None = None,
                     about: Mapping[str, Any] | None = None) -> dict[KeepK, KeepSet]:
    """Choose experts greedily from the first layer to the last, for all of `keep_ks` in one pass.

    In each layer experts are ranked by `score` over the calibration tokens as they arrive through the pruned layers
    below; equal scores go to the lower index (EMO, arXiv 2605.06663: layerwise selection; there by mean router
    probability over real tokens, which is the default here).

    Args:
        checkpoint: an MoE checkpoint.
        token_ids: token ids of each text; no padding.
        keep_ks: experts kept per layer, shared ones included: numbers, or schedules with one number per layer.
        groups, weights: task of each text and the tasks' weights, to mix tasks; see `Scores.score`.
        num_shared: shared experts kept per layer; None keeps all.
        score: a criterion of `scores.CRITERIA`. Those that need expert outputs cost a run of all experts per layer.
        options: device, precision, memory.
        work_dir: folder for snapshots; a killed call, repeated with the same arguments, goes on there and gives the
            same result. The caller removes it once the result is stored.
        about: fields of `KeepSet` that say what the selection was made from (model, task, …).

    Returns:
        A keep set per entry of `keep_ks`. One that keeps everything needs no pass and has no scores.

    Raises:
        KeepKError, ModelError, CheckpointError, SpecError: before any work. NumericError: NaN or infinity, named.
    """
    criterion(score)
    wanted = {keep_k: resolve_keep_k(checkpoint.config, keep_k, num_shared) for keep_k in keep_ks}
    # only a mixture needs sums per task
    stage = Pass(checkpoint, token_ids, groups if weights else None, options or StreamOptions(), num_shared)
    everything = [len(kept) if kept else None for kept in full_set(stage.rules)]
    asked = [keep_k for keep_k, counts in wanted.items() if counts != everything]
    key = f"{stage.key} {asked} {num_shared} {score} {sorted((weights or {}).items())}"
    run = _Layerwise(stage, [wanted[keep_k] for keep_k in asked], score, mixture(stage.groups, weights))
    if asked and stage.skeleton.whole:
        progress.say_once(f"{stage.skeleton.whole} of {stage.layers} layers do not split into attention and experts, "
                          "so their attention runs twice.")
    if asked:
        run.run(Snapshots(work_dir, key, stage.team))
    found: dict[KeepK, tuple[Kept, list[list[float] | None] | None]] = {
        keep_k: (full_set(stage.rules), None) for keep_k in keep_ks}
    found |= {keep_k: (run.kept(i), run.scores[i]) for i, keep_k in enumerate(asked)}
    return {keep_k: _keep_set(stage, keep_k, *found[keep_k], score, about or {}) for keep_k in keep_ks}


@dataclass
class _Branch:
    """Requests that have kept the same experts so far."""

    requests: list[int]
    source: Embedded | HiddenStates
    """Hidden states, which siblings share until `back` has run on them."""
    kept: Kept = field(default_factory=list)
    back: Back | None = None
    """The rest of the layer below, still to be run on `source`."""


class _Layerwise:
    def __init__(self, stage: Pass, counts: list[list[int | None]], score: str,
                 parts: Sequence[tuple[float, Sequence[int]]]) -> None:
        self.stage, self.counts, self.score, self.parts = stage, counts, score, parts
        self.rule = criterion(score)
        self.branches: list[_Branch] = []
        self.weights: dict[str, Tensor] = {}  # experts of the layer below
        self.scores: list[list[list[float] | None]] = [[] for _ in counts]

    def kept(self, request: int) -> Kept:
        """The finished keep set of a request."""
        return next(branch.kept for branch in self.branches if request in branch.requests)

    def run(self, snapshots: Snapshots) -> None:
        stage = self.stage
        with stage.running("Selecting experts layer by layer", len(self.counts)) as meter:
            first = self._continue(snapshots)
            meter.layer(first, skipped=first * stage.rows * len(self.counts))
            for layer in range(first, stage.layers):
                self._layer(layer, meter)
                if layer + 1 < stage.layers:
                    snapshots.save(layer, *self._snapshot())
        for states in self._sources():
            stage.budget.release(states)

    def _layer(self, layer: int, meter: Meter) -> None:
        stage = self.stage
        shell = stage.reader.shell(layer)
        stage.reader.prefetch_shell(layer + 1)
        meter.layer(layer)
        observer = _Observer(self, shell) if stage.rules[layer] else None
        front = stage.skeleton.front(shell)
        self.branches = [branch for source in _distinct(self.branches)
                         for branch in self._advance(source, front, observer, meter)]
        stage.reader.recycle(self.weights)
        self.weights = {}
        if observer is None:
            for branch in self.branches:
                branch.kept.append(None)
                branch.back = stage.skeleton.back(shell, {})
            self._note_scores([None] * len(self.branches))
        else:
            self._choose(layer, observer)
            if layer + 1 < stage.layers:
                self._attach_experts(shell, observer)

    def _advance(self, source: Embedded | HiddenStates, front: Front, observer: _Observer | None,
                 meter: Meter) -> list[_Branch]:
        """Run every branch of `source` through its pending experts and this layer's front, into its own states."""
        members = [branch for branch in self.branches if branch.source is source]
        targets = [self.stage.new_states() for _ in members[1:]]
        targets.append(source if isinstance(source, HiddenStates) else self.stage.new_states())

        def step(batch: Batch) -> list[list[Part]]:
            below, found = source.read(batch), []
            for branch, target in zip(members, targets, strict=True):  # the last one writes where `below` lies
                hidden = front(batch, branch.back(batch, below) if branch.back else below, branch.requests[0])
                found.append(observer.see(branch, batch, front, hidden) if observer else [])
                target.write(batch.start, hidden)
            return found

        if observer is not None:
            observer.begin(members)
        for batch, found in self.stage.each_batch(step):
            for branch, parts in zip(members, found, strict=True):
                if observer is not None:
                    observer.sums(branch).add(parts)
                meter.advance((batch.stop - batch.start) * len(branch.requests))
            if observer is not None and batch is self.stage.batches[len(self.stage.batches) // 2]:
                observer.guess()
        for branch, target in zip(members, targets, strict=True):
            branch.source, branch.back = target, None
        return members

    def _choose(self, layer: int, observer: _Observer) -> None:
        """Rank the layer's experts for every branch, and split branches whose requests now differ."""
        rules = self.stage.rules[layer]
        assert rules is not None
        split, scores = [], []
        for branch in self.branches:
            sums = observer.sums(branch)
            self.stage.complete(sums, layer)
            score = layer_score(sums, self.stage.tokens, self.score, self.parts)
            by_set: dict[tuple[int, ...], list[int]] = {}
            for request in branch.requests:
                by_set.setdefault(tuple(choose(score, self.counts[request][layer] or 0, rules)), []).append(request)
            split += [_Branch(requests, branch.source, [*branch.kept, list(kept)])
                      for kept, requests in by_set.items()]
            scores += [score] * len(by_set)
        self.branches = split
        self._note_scores(scores)

    def _note_scores(self, scores: Sequence[list[float] | None]) -> None:
        for branch, score in zip(self.branches, scores, strict=True):
            for request in branch.requests:
                self.scores[request].append(score)

    def _attach_experts(self, shell: Shell, observer: _Observer | None = None) -> None:
        """Read the experts that any branch keeps, once, and give every branch the rest of its pruned layer."""
        chosen = [branch.kept[shell.layer] or [] for branch in self.branches]
        loaded = observer.experts if observer and observer.experts else None
        union = sorted({expert for kept in chosen for expert in kept})
        self.weights = loaded or self.stage.reader.experts(shell.layer, union)
        place = {expert: expert if loaded else row for row, expert in enumerate(union)}
        for branch, kept in zip(self.branches, chosen, strict=True):
            rows = torch.tensor([place[expert] for expert in kept], device=self.stage.device)
            branch.back = self.stage.skeleton.back(shell, self.weights, kept=kept, rows=rows)

    def _sources(self) -> list[HiddenStates]:
        return [source for source in _distinct(self.branches) if isinstance(source, HiddenStates)]

    def _snapshot(self) -> tuple[dict[str, Any], dict[str, Tensor], list[HiddenStates]]:
        sources = self._sources()
        branches = [{"requests": branch.requests, "kept": branch.kept,
                     "source": next(i for i, source in enumerate(sources) if source is branch.source)}
                    for branch in self.branches]
        return {"branches": branches, "scores": self.scores}, {}, sources

    def _continue(self, snapshots: Snapshots) -> int:
        """Take up the latest snapshot, if any; the next layer to run."""
        found = snapshots.latest()
        if found is None:
            self.branches = [_Branch(list(range(len(self.counts))), self.stage.embedded())]
            return 0
        sources = [self.stage.new_states() for _ in found.hidden]
        for source, path in zip(sources, found.hidden, strict=True):
            source.load(path)
        self.scores = found.data["scores"]
        self.branches = [_Branch(b["requests"], sources[b["source"]], b["kept"]) for b in found.data["branches"]]
        shell = self.stage.reader.shell(found.layer)
        if self.stage.rules[found.layer] is not None:
            self._attach_experts(shell)
        else:
            for branch in self.branches:
                branch.back = self.stage.skeleton.back(shell, {})
        return found.layer + 1


class _Observer:
    """Collects the ranking statistics of one layer, per branch."""

    def __init__(self, run: _Layerwise, shell: Shell) -> None:
        self._run, self._shell = run, shell
        self._recorders: dict[int, tuple[Recorder, Back | None]] = {}
        self._rules = run.stage.rules[shell.layer]
        assert self._rules is not None
        self.experts: dict[str, Tensor] | None = None
        if run.rule.needs_experts:
            self.experts = run.stage.reader.experts(shell.layer, range(self._rules.experts))

    def begin(self, branches: Sequence[_Branch]) -> None:
        """These branches come next."""
        for branch in branches:
            self._recorders[id(branch)] = self._recorder()

    def see(self, branch: _Branch, batch: Batch, front: Front, hidden: Tensor) -> list[Part]:
        """A batch has passed this layer's front: `hidden` (T, D); what it adds to the branch's sums."""
        recorder, all_experts = self._recorders[id(branch)]
        recorder.begin(self._run.stage.group_rows(batch))
        if all_experts is not None:
            all_experts(batch, hidden)
        elif recorder.needs_choice:
            routing = front.route(batch)
            recorder.scored(routing.scores)
            recorder.chosen(routing.gates, routing.index)
        else:
            recorder.scored(front.scores(batch))
        return recorder.parts

    def sums(self, branch: _Branch) -> LayerSums:
        """The sums of a branch."""
        return self._recorders[id(branch)][0].sums

    def guess(self) -> None:
        """With half of the tokens seen, let the disk fetch the experts that lead so far."""
        stage, layer = self._run.stage, self._shell.layer
        if self.experts is not None or layer + 1 == stage.layers or not self._recorders or stage.rules[layer] is None:
            return
        ahead: set[int] = set()
        for branch in self._run.branches:
            if id(branch) in self._recorders:
                score = layer_score(self.sums(branch), stage.tokens, self._run.score, self._run.parts)
                most = max(self._run.counts[request][layer] or 0 for request in branch.requests)
                ahead |= set(choose(score, most, stage.rules[layer]))  # type: ignore[arg-type]
        stage.reader.warm(layer, sorted(ahead))

    def _recorder(self) -> tuple[Recorder, Back | None]:
        stage = self._run.stage
        assert self._rules is not None
        sums = stage.new_sums(self._shell.layer, self._run.rule.sums)
        recorder = Recorder(sums, self._rules)
        if self.experts is None:
            return recorder, None
        return recorder, stage.skeleton.back(self._shell, self.experts, recorder=recorder)


def _distinct(branches: Sequence[_Branch]) -> list[Embedded | HiddenStates]:
    return list({id(branch.source): branch.source for branch in branches}.values())


def _keep_set(stage: Pass, keep_k: KeepK, kept: Kept, scores: list[list[float] | None] | None, score: str,
              about: Mapping[str, Any]) -> KeepSet:
    return KeepSet(
        experts=tuple(None if layer is None else tuple(layer) for layer in kept),
        method="layerwise" if isinstance(keep_k, int) else "variable",
        keep_k=keep_k if isinstance(keep_k, int) else min(keep_k),
        schedule=None if isinstance(keep_k, int) else keep_k,
        num_shared=max(rule.keep_shared for rule in stage.rules if rule),
        score=score,
        scores=None if scores is None else tuple(None if row is None else tuple(row) for row in scores),
        fingerprint=stage.checkpoint.forward_fingerprint,
        **about,
    )
