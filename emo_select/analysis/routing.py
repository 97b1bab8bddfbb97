"""What the routers of a model say of documents, layer by layer with one layer in memory.

The pass is that of `emo_select.experts`: every weight is read once, every token passes each layer once, and a killed
call goes on after the last finished layer. A `Sink` takes what a layer's router says: `Columns` writes it down for
every token in the order of the documents, `emo_select.analysis.coverage` sums it per document.

Legend: T tokens, E routed experts of a layer (shared ones are left out), K of them chosen per token.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from emo_select.analysis.corpus import Corpus
from emo_select.analysis.layout import LayerInfo, RoutingInfo, column_file, write_array
from emo_select.checkpoint import Checkpoint
from emo_select.errors import ModelError, NumericError, SpecError
from emo_select.experts.batches import Batch
from emo_select.experts.layers import Embedded, Front
from emo_select.experts.options import StreamOptions
from emo_select.experts.passes import Meter, Pass
from emo_select.experts.resume import Snapshots, shared_stage
from emo_select.experts.routers import Scores
from emo_select.experts.rules import LayerRules, layer_rules
from emo_select.experts.states import HiddenStates
from emo_select.experts.stream import Shell
from emo_select.models.families import family_of, top_k
from emo_select.spec import digest
from emo_select.storage import require_space, write_bytes, write_json


def layer_infos(config: dict[str, Any]) -> tuple[LayerInfo, ...]:
    """The MoE layers of a model. ModelError where it has none."""
    found = tuple(_layer_info(layer, rules, top_k(config))
                  for layer, rules in enumerate(layer_rules(config)) if rules is not None)
    if not found:
        raise ModelError("The model has no MoE layers, so it has no router to look at.")
    return found


def _layer_info(layer: int, rules: LayerRules, chosen: int) -> LayerInfo:
    return LayerInfo(layer=layer, experts=rules.routed, chosen=min(chosen, rules.experts) - rules.shared,
                     shared=rules.shared, always_active=rules.always_active)


def probabilities(scores: Scores, experts: int) -> Tensor:
    """A router's scores → a distribution (T, E) in fp32 over the `experts` routed ones, which come first.

    Softmax over the routed experts, also where shared or always-active ones have one of their own in the model; of
    another router its affinities divided by their sum.
    """
    if scores.activation == "softmax":
        return scores.logits[:, :experts].float().softmax(dim=-1)
    affinities = scores.probabilities[:, :experts]
    return affinities / affinities.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)


class Sink(Protocol):
    """Where the rows of a layer go. `take` is called from several threads, `begin` and `end` from one."""

    def begin(self, layer: LayerInfo) -> None:
        """A layer begins."""

    def take(self, layer: LayerInfo, document: int, start: int, logits: Tensor, probs: Tensor, index: Tensor) -> None:
        """Tokens of a document from `start` on: logits and probs (T, E), chosen experts (T, K) ascending."""

    def end(self, layer: LayerInfo) -> None:
        """All of the layer's tokens have come; make sure that they are kept."""


class Columns:
    """Column blocks in `folder`: one file per layer and kind, a row per token in the order of the documents."""

    def __init__(self, folder: Path, corpus: Corpus, *, logits: bool, leads: bool = True) -> None:
        self.folder, self.corpus, self.leads = folder, corpus, leads
        self.kinds = {"probs": np.float16, "topk": np.uint16, **({"logits": np.float16} if logits else {})}
        self._files: dict[str, int] = {}
        self._offsets: dict[str, int] = {}

    def begin(self, layer: LayerInfo) -> None:
        """Make the layer's files at full size."""
        for kind, dtype in self.kinds.items():
            file = column_file(self.folder, kind, layer.layer)
            shape = (len(self.corpus.tokens), layer.chosen if kind == "topk" else layer.experts)
            if self.leads:
                _make_array(file, shape, dtype)

    def take(self, layer: LayerInfo, document: int, start: int, logits: Tensor, probs: Tensor, index: Tensor) -> None:
        """Write the rows where they belong."""
        row = int(self.corpus.bounds[document]) + start
        values = {"probs": probs, "topk": index, "logits": logits}
        for kind, dtype in self.kinds.items():
            self._write(column_file(self.folder, kind, layer.layer), row, values[kind].cpu().numpy().astype(dtype))

    def end(self, layer: LayerInfo) -> None:
        """Flush and close the layer's files."""
        for descriptor in self._files.values():
            os.fsync(descriptor)
            os.close(descriptor)
        self._files.clear()

    def _write(self, file: Path, row: int, values: np.ndarray[Any, Any]) -> None:
        name = file.name
        if name not in self._files:  # several threads may come here; each value is the same for all
            self._offsets[name] = np.load(file, mmap_mode="r").offset
            self._files.setdefault(name, os.open(file, os.O_WRONLY))
        raw, at = np.ascontiguousarray(values).reshape(-1).view(np.uint8).data, self._offsets[name]
        at += row * values[0].nbytes
        while raw:
            count = os.pwrite(self._files[name], raw, at)
            raw, at = raw[count:], at + count


def _make_array(file: Path, shape: tuple[int, int], dtype: Any) -> None:
    """An array of zeros that takes no room on disk until it is written."""
    file.unlink(missing_ok=True)
    np.lib.format.open_memmap(file, mode="w+", dtype=dtype, shape=shape)


class RoutingPass:
    """Documents on their way through a model, for a sink that sees every router."""

    def __init__(self, stage: Pass, corpus: Corpus, sink: Sink, snapshots: Snapshots) -> None:
        self.stage, self.corpus, self.sink, self.snapshots = stage, corpus, sink, snapshots
        self.infos = {info.layer: info for info in layer_infos(stage.checkpoint.config)}
        self.last = max(self.infos)
        self.source: Embedded | HiddenStates

    def run(self) -> None:
        """All layers up to the last router."""
        with self.stage.running("Asking the routers") as meter:
            states = self.stage.new_states()
            first = self._continue(states)
            meter.layer(first, skipped=first * self.stage.rows)
            for layer in range(first, self.last + 1):
                self._layer(layer, states, meter)
            meter.layer(self.last, skipped=(self.stage.layers - 1 - self.last) * self.stage.rows)
        self.stage.budget.release(states)

    def _continue(self, states: HiddenStates) -> int:
        found = self.snapshots.latest()
        if found is None:
            self.source = self.stage.embedded()
            return 0
        states.load(found.hidden[0])
        self.source = states
        return found.layer + 1

    def _layer(self, layer: int, states: HiddenStates, meter: Meter) -> None:
        stage, info = self.stage, self.infos.get(layer)
        shell = stage.reader.shell(layer)
        if layer < self.last:
            stage.reader.prefetch_shell(layer + 1)
        if info is not None:
            self.sink.begin(info)
            stage.team.wait()
        meter.layer(layer)
        self._stream(layer, shell, states, meter)
        self.source = states
        if info is not None:
            self.sink.end(info)
        stage.team.wait()
        if layer < self.last:
            self.snapshots.save(layer, {}, {}, [states])

    def _stream(self, layer: int, shell: Shell, states: HiddenStates, meter: Meter) -> None:
        stage, info, rules = self.stage, self.infos.get(layer), self.stage.rules[layer]
        goes_on = layer < self.last  # behind the last router nothing has to be computed
        weights = stage.reader.experts(layer, range(rules.experts)) if rules is not None and goes_on else {}
        front = stage.skeleton.front(shell)
        back = stage.skeleton.back(shell, weights) if goes_on else None

        def step(batch: Batch) -> None:
            hidden = front(batch, self.source.read(batch))
            if info is not None:
                self._ask(info, front, batch)
            if back is not None:
                states.write(batch.start, back(batch, hidden))

        for batch, _ in stage.each_batch(step):
            meter.advance(batch.stop - batch.start)
        stage.reader.recycle(weights)

    def _ask(self, info: LayerInfo, front: Front, batch: Batch) -> None:
        """What the router says of a batch, handed to the sink document by document."""
        routing = front.route(batch)
        logits = routing.scores.logits[:, :info.experts].float()
        if not bool(logits.isfinite().all()):
            raise NumericError(f"The router of layer {info.layer} gives NaN or infinity; try --dtype float32.")
        probs = probabilities(routing.scores, info.experts)
        chosen = _routed(routing.index, info)
        first = 0
        for number, length in zip(batch.segments, batch.lengths, strict=True):
            rows, segment = slice(first, first + length), self.stage.segments[number]
            before = 0 if segment.parent is None else len(self.stage.segments[segment.parent].tokens)
            for document, _ in segment.weights:
                self.sink.take(info, int(self.stage.groups[document]), before, logits[rows], probs[rows], chosen[rows])
            first += length


def _routed(index: Tensor, info: LayerInfo) -> Tensor:
    """Chosen experts (T, K + shared) → the routed ones (T, K), ascending. Shared ones have the highest numbers."""
    return index.sort(dim=-1).values[:, :info.chosen]


def open_pass(checkpoint: Checkpoint, corpus: Corpus, options: StreamOptions) -> Pass:
    """The pass in which each document is a group of its own, so that a shared prefix finds all its documents."""
    family_of(checkpoint.config)
    groups = [str(number) for number in range(len(corpus.token_ids))]
    return Pass(checkpoint, [ids.tolist() for ids in corpus.token_ids], groups, options)


def extract(checkpoint: Checkpoint, corpus: Corpus, model: str, folder: Path, *, logits: bool = False,
            options: StreamOptions | None = None) -> RoutingInfo:
    """Stream `corpus` through the model and write `folder`/routing; see `layout`.

    What is there already is left alone if it has the same fingerprint. A killed call, repeated, goes on after the last
    finished layer and gives the same bytes. torchrun shares the documents among its processes.

    Raises:
        SpecError: the folder holds the routing of other texts or of another model; nothing is replaced.
        ModelError, CheckpointError, NumericError, DiskSpaceError: as in any streamed pass.
    """
    options = options or StreamOptions()
    info = describe(checkpoint, corpus, model, options, logits=logits)
    target = folder / "routing"
    if is_extracted(folder, info):
        return info
    _require_room(target, info)
    stage = open_pass(checkpoint, corpus, options)
    with shared_stage(target, f"{info.fingerprint}/{stage.key}", stage.team) as work:
        sink = Columns(work, corpus, logits=logits, leads=stage.team.leads)
        RoutingPass(stage, corpus, sink, Snapshots(work, stage.key, stage.team)).run()
        if stage.team.leads:
            _describe_rows(work, corpus)
            write_json(work / "info.json", info.model_dump(mode="json"))
    return info


def describe(checkpoint: Checkpoint, corpus: Corpus, model: str, options: StreamOptions, *, logits: bool
             ) -> RoutingInfo:
    """`info.json` of an extraction, known before any work."""
    layers, dtype = layer_infos(checkpoint.config), str(options.torch_dtype()).removeprefix("torch.")
    tokenizer = tokenizer_fingerprint(checkpoint.directory)
    fingerprint = digest([checkpoint.fingerprint, corpus.fingerprint, tokenizer, dtype, logits])
    return RoutingInfo(
        fingerprint=fingerprint, model=model, model_fingerprint=checkpoint.fingerprint,
        tokenizer_fingerprint=tokenizer, texts=json.loads(json.dumps(dict(corpus.about), default=str)),
        label_key=corpus.label_key, tokens=len(corpus.tokens), documents=len(corpus.documents),
        num_layers=len(layer_rules(checkpoint.config)), layers=layers,
        scoring=family_of(checkpoint.config).scoring, dtype=dtype, has_logits=logits)


def tokenizer_fingerprint(directory: Path) -> str:
    """Of the files that make token ids; "" where a checkpoint has none."""
    import hashlib

    found = [directory / name for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")]
    present = [file for file in found if file.is_file()]
    if not present:
        return ""
    return hashlib.sha256(b"|".join(file.read_bytes() for file in present[:1])).hexdigest()[:16]


def is_extracted(folder: Path, info: RoutingInfo) -> bool:
    """Whether `folder` holds this very routing. SpecError where it holds another."""
    from emo_select.analysis.layout import ModelFolder

    if not (folder / "routing" / "info.json").exists():
        return False
    found = ModelFolder(folder).info
    if found.fingerprint != info.fingerprint:
        what = "another model" if found.model_fingerprint != info.model_fingerprint else "other texts or settings"
        raise SpecError(f"{folder} holds the routing of {what}; choose another folder with --out, or delete it.")
    return True


def extracted_bytes(info: RoutingInfo) -> int:
    """Size of all column blocks."""
    kinds = 2 if info.has_logits else 1
    return sum(info.tokens * 2 * (kinds * layer.experts + layer.chosen) for layer in info.layers)


def _require_room(target: Path, info: RoutingInfo) -> None:
    partial = target.with_name(f".{target.name}.partial")
    there = sum(file.stat().st_blocks * 512 for file in partial.glob("*.npy")) if partial.exists() else 0
    require_space(target.parent, max(0, extracted_bytes(info) - there), "The routing")


def _describe_rows(folder: Path, corpus: Corpus) -> None:
    lines = "\n".join(document.model_dump_json() for document in corpus.documents)
    write_bytes(folder / "documents.jsonl", (lines + "\n").encode())
    write_array(folder / "tokens.npy", corpus.tokens)
    write_array(folder / "bounds.npy", corpus.bounds)


def require_same_tokenizer(models: Sequence[tuple[str, str]]) -> None:
    """SpecError unless all models, (name, tokenizer fingerprint), cut texts into the same tokens."""
    other = next((name for name, fingerprint in models[1:] if fingerprint != models[0][1]), None)
    if other is not None:
        raise SpecError(f"{models[0][0]} and {other} have different tokenizers, so their tokens cannot be compared; "
                        "analyse them one by one.")
