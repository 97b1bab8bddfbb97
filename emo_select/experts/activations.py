"""One pass through the unpruned model that collects every statistic of expert use at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from emo_select.checkpoint import Checkpoint
from emo_select.experts.batches import Batch
from emo_select.experts.layers import Embedded
from emo_select.experts.moe import Recorder
from emo_select.experts.options import StreamOptions
from emo_select.experts.passes import Meter, Pass
from emo_select.experts.resume import Snapshots, shared_stage
from emo_select.experts.scores import SUMS, LayerSums, Part, Scores
from emo_select.experts.states import HiddenStates
from emo_select.experts.stream import Shell
from emo_select.faults import translated
from emo_select.ownership import STATISTICS, require_replaceable


@translated()
def collect_activations(checkpoint: Checkpoint, token_ids: Sequence[Sequence[int]], groups: Sequence[str] | None = None,
                        out_dir: Path | None = None, options: StreamOptions | None = None,
                        record: Mapping[str, Any] | None = None) -> Scores:
    """Stream the calibration texts through the unpruned model and sum up how its experts are used.

    Every weight is read once and every token passes each layer once. A killed call, repeated with the same
    arguments, goes on after the last finished layer and gives the same bytes.

    Args:
        checkpoint: an MoE checkpoint.
        token_ids: token ids of each text; no padding.
        groups: a group name for each text, to score subsets later; None puts all into one.
        out_dir: where `scores.safetensors` and `scores.json` go; None writes nothing.
        options: device, precision, memory.
        record: entries added to scores.json.

    Raises:
        ModelError, CheckpointError, SpecError, OwnershipError: before any work. NumericError: NaN or infinity, named.
    """
    if out_dir is not None:
        require_replaceable(out_dir, checkpoint.directory, what=STATISTICS)
    stage = Pass(checkpoint, token_ids, groups, options or StreamOptions())
    if out_dir is None:
        return _Collection(stage, Snapshots(None, stage.key, stage.team)).run(record or {})
    with shared_stage(out_dir, stage.key, stage.team) as folder:
        scores = _Collection(stage, Snapshots(folder, stage.key, stage.team)).run(record or {})
        if stage.team.leads:
            scores.save(folder)
    return scores


class _Collection:
    def __init__(self, stage: Pass, snapshots: Snapshots) -> None:
        self.stage, self.snapshots = stage, snapshots
        self.layers: list[LayerSums | None] = []
        self.source: Embedded | HiddenStates

    def run(self, record: Mapping[str, Any]) -> Scores:
        stage = self.stage
        with stage.running("Collecting expert statistics") as meter:
            states = stage.new_states()
            first = self._continue(states)
            meter.layer(first, skipped=first * stage.rows)
            for layer in range(first, stage.layers):
                self._layer(layer, states, meter)
        stage.budget.release(states)
        about = {"model_fingerprint": stage.checkpoint.forward_fingerprint,
                 "dtype": str(stage.dtype).removeprefix("torch."), **record}
        return Scores(self.layers, stage.groups, stage.tokens, stage.examples, about)

    def _continue(self, states: HiddenStates) -> int:
        """Take up the latest snapshot, if any; the next layer to run."""
        found = self.snapshots.latest()
        if found is None:
            self.source = self.stage.embedded()
            return 0
        states.load(found.hidden[0])
        self.source = states
        for layer in range(found.layer + 1):
            values = {name: found.tensors[f"{layer}.{name}"] for name in SUMS if f"{layer}.{name}" in found.tensors}
            sums = self.stage.new_sums(layer, ()) if values else None
            if sums is not None:
                sums.values = {name: value.to(self.stage.device) for name, value in values.items()}
            self.layers.append(sums)
        return found.layer + 1

    def _layer(self, layer: int, states: HiddenStates, meter: Meter) -> None:
        stage = self.stage
        shell = stage.reader.shell(layer)
        stage.reader.prefetch_shell(layer + 1)
        sums = self._stream(layer, shell, states, meter)
        self.source = states
        if sums is not None:
            stage.complete(sums, layer)
        self.layers.append(sums)
        if layer + 1 < stage.layers:
            self.snapshots.save(layer, {}, self._tensors(), [states])

    def _stream(self, layer: int, shell: Shell, states: HiddenStates, meter: Meter) -> LayerSums | None:
        stage, rules = self.stage, self.stage.rules[layer]
        recorder, weights = None, {}
        if rules is not None:
            recorder = Recorder(stage.new_sums(layer, tuple(SUMS)), rules)
            weights = stage.reader.experts(layer, range(rules.experts))
        self._prefetch(layer + 1)
        front = stage.skeleton.front(shell)
        back = stage.skeleton.back(shell, weights, recorder=recorder)
        meter.layer(layer)

        def step(batch: Batch) -> list[Part]:
            if recorder is not None:
                recorder.begin(stage.group_rows(batch))
            states.write(batch.start, back(batch, front(batch, self.source.read(batch))))
            return recorder.parts if recorder else []

        for batch, parts in stage.each_batch(step):
            if recorder is not None:
                recorder.sums.add(parts)
            meter.advance(batch.stop - batch.start)
        stage.reader.recycle(weights)
        return recorder.sums if recorder else None

    def _prefetch(self, layer: int) -> None:
        rules = self.stage.rules[layer] if layer < self.stage.layers else None
        if rules is not None:
            self.stage.reader.prefetch_experts(layer, range(rules.experts))

    def _tensors(self) -> dict[str, Any]:
        return {f"{layer}.{name}": values.cpu() for layer, sums in enumerate(self.layers) if sums
                for name, values in sums.values.items()}
