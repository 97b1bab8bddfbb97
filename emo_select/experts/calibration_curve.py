"""Kept experts against the number of calibration examples: how many examples does a selection need?

For every task and keep-k, the keep sets of several sample sizes are compared with that of the largest one, layer by
layer. Sample sizes are nested: the first N of one seeded permutation. Statistics of unpruned models (easy_ep, global,
…) add up, so one pass serves all sizes; layerwise selection depends on what it kept below and takes a pass per size,
each for all keep-k.

Files, as published: `<out>/<model>/<task>/keepk-<K>/nprune-<N>.json` and `summary.json`, `<out>/<model>/summary.md`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emo_select import progress
from emo_select.errors import CheckpointError, SpecError
from emo_select.experts.inspect import jaccard
from emo_select.experts.keepset import KeepSet
from emo_select.ownership import require_own_files
from emo_select.spec import Calibration
from emo_select.storage import json_bytes, read_json, write_json, write_output

if TYPE_CHECKING:
    from emo_select.checkpoint import Checkpoint
    from emo_select.experts.calibration import CalibrationTexts
    from emo_select.experts.options import StreamOptions

ALL = "all"
RECORD = "made_from.json"


@dataclass(frozen=True)
class Curve:
    """The keep sets of one model, task, keep-k and method, by sample size: "1", "5", …, "all", ascending."""

    model: str
    task: str
    keep_k: int
    keep_sets: dict[str, KeepSet]
    examples: dict[str, int | None] = field(default_factory=dict)
    """How many examples each one saw: fewer than asked for where there are no more."""
    note: str = ""
    """What sets it apart from other curves of the same task and keep-k: the method, the seed, the shots."""

    @property
    def reference(self) -> str:
        """The largest sample size."""
        return list(self.keep_sets)[-1]

    def overlap(self, tag: str, *, shared: bool = False) -> list[float | None]:
        """Jaccard index per layer with the largest sample's keep set, None for dense layers.

        Of routed experts; `shared` counts shared experts too, as published, which raises it: all sets have them.
        """
        mine, reference = self.keep_sets[tag], self.keep_sets[self.reference]
        if not shared:
            return jaccard(mine, reference)
        pairs = zip(mine.experts, reference.experts, strict=True)
        return [None if a is None or b is None else len({*a} & {*b}) / len({*a} | {*b}) for a, b in pairs]

    def mean(self, tag: str, *, shared: bool = False) -> float:
        """`overlap`, averaged over the MoE layers."""
        found = [value for value in self.overlap(tag, shared=shared) if value is not None]
        return sum(found) / len(found)

    def smallest(self, tag: str, *, shared: bool = False) -> float:
        """`overlap` of the layer that agrees least."""
        return min(value for value in self.overlap(tag, shared=shared) if value is not None)

    def as_data(self) -> dict[str, Any]:
        """Everything as plain data."""
        tags = list(self.keep_sets)
        return {
            "model": self.model, "task": self.task, "keep_k": self.keep_k, "note": self.note,
            "reference": self.reference, "sizes": tags,
            "jaccard": {tag: self.overlap(tag) for tag in tags}, "mean": {tag: self.mean(tag) for tag in tags},
            "smallest": {tag: self.smallest(tag) for tag in tags},
            "published_mean": {tag: self.mean(tag, shared=True) for tag in tags},
            "published_smallest": {tag: self.smallest(tag, shared=True) for tag in tags},
        }


# ---- from selections that exist ----


def curves_of(selections: Iterable[KeepSet]) -> list[Curve]:
    """Group selections that differ in the number of examples only. SpecError where no two of them do."""
    found: dict[tuple[Any, ...], dict[int | None, KeepSet]] = {}
    for one in selections:
        if one.method != "random":
            key = (one.model or "", one.task or "", one.keep_k, one.method, one.score, one.seed, one.num_shots)
            found.setdefault(key, {})[one.num_examples] = one
    made = [_curve(key, sizes) for key, sizes in sorted(found.items(), key=lambda item: repr(item[0]))
            if len(sizes) > 1]
    if not made:
        raise SpecError("No two of these selections differ in nothing but the number of examples; make some with "
                        "--model, --task, --keep-k and --num-examples 1,5,10,all.")
    return sorted(made, key=lambda curve: (curve.model, curve.task, curve.note, curve.keep_k))


def _curve(key: tuple[Any, ...], sizes: Mapping[int | None, KeepSet]) -> Curve:
    model, task, keep_k, method, score, seed, shots = key
    words = [method if method != "layerwise" else "", score if score not in (None, "router_probability") else "",
             f"seed {seed}" if seed else "", f"{shots}-shot" if shots is not None else ""]
    ordered = sorted(sizes, key=lambda n: float("inf") if n is None else n)
    if len({tuple(kept is None for kept in sizes[n].experts) for n in ordered}) > 1:
        raise CheckpointError(f"The selections of {task} with keep-k {keep_k} belong to models of different shapes.")
    return Curve(model, task, keep_k, {_tag(n): sizes[n] for n in ordered}, {}, ", ".join(filter(None, words)))


def _tag(size: int | None) -> str:
    return ALL if size is None else str(size)


def parse_sizes(texts: Sequence[str]) -> list[int | None]:
    """`["1", "5", "all"]` → [1, 5, None], ascending. SpecError for anything else, or fewer than two."""
    sizes: set[int | None] = set()
    for text in texts:
        if text != ALL and not (text.isdecimal() and int(text)):
            raise SpecError(f"A number of examples is 1 or more, or {ALL}, not {text!r}.")
        sizes.add(None if text == ALL else int(text))
    if len(sizes) < 2:
        raise SpecError(f"A curve needs at least two numbers of examples, such as --num-examples 1,5,10,{ALL}.")
    return sorted(sizes, key=lambda n: float("inf") if n is None else n)


# ---- made here ----


@dataclass(frozen=True)
class CurveRequest:
    """What to compute for one model."""

    model: str
    keep_ks: Sequence[int]
    sizes: Sequence[int | None]
    """Ascending; None, all examples, comes last."""
    method: str = "layerwise"
    calibration: Calibration = field(default_factory=Calibration)


def collect_curves(request: CurveRequest, tasks: Sequence[str], out: Path, *, data_dir: str | None = None,
                   options: StreamOptions | None = None) -> list[Curve]:
    """Select for every task, sample size and keep-k, and write the files as each selection is finished.

    What `out` already holds of the same model, texts and settings is reused, so a killed call goes on where it was.

    Raises:
        UsageError: of the kind that fits; before any work. NumericError: NaN or infinity, named.
    """
    from emo_select.checkpoint import open_checkpoint
    from emo_select.experts.rules import resolve_keep_k
    from emo_select.experts.select import texts_of
    from emo_select.models import load_tokenizer

    with open_checkpoint(request.model, data_dir=data_dir) as checkpoint:
        tokenizer = load_tokenizer(str(checkpoint.directory))
        for keep_k in request.keep_ks:
            resolve_keep_k(checkpoint.config, keep_k)
        whole = request.calibration.model_copy(update={"num_examples": None})
        curves = []
        for task in tasks:
            texts = texts_of(tokenizer, [task], whole, data_dir)
            curves += collect_task(checkpoint, request, task, texts, out, options)
    return curves


def collect_task(checkpoint: Checkpoint, request: CurveRequest, task: str, texts: CalibrationTexts, out: Path,
                 options: StreamOptions | None = None) -> list[Curve]:
    """The curves of one task, whose `texts` are all that there are, in the task's order."""
    folder = out / _model_folder(request.model) / _task_folder(task, request)
    store = _Store(folder, request, task, len(texts.token_ids), _key(checkpoint, request, texts))
    require_own_files(*(_summary_file(folder, keep_k) for keep_k in request.keep_ks))
    missing = [size for size in request.sizes if not store.has(size)]
    make = _one_by_one if request.method == "layerwise" else _in_one_pass
    for size, keep_sets in make(checkpoint, request, texts, missing, folder, options):
        store.save(size, keep_sets)
    note = _curve(("", task, 0, request.method, None, request.calibration.seed, request.calibration.num_shots), {}).note
    curves = [Curve(request.model, task, keep_k, {_tag(n): store.load(n, keep_k) for n in request.sizes},
                    {_tag(n): store.examples(n) for n in request.sizes}, note) for keep_k in request.keep_ks]
    for curve in curves:
        write_output(_summary_file(folder, curve.keep_k), json_bytes(published_summary(curve)))
    return curves


def _summary_file(folder: Path, keep_k: int) -> Path:
    return folder / f"keepk-{keep_k}" / "summary.json"


Found = Iterable[tuple[int | None, Mapping[int, KeepSet]]]


def _one_by_one(checkpoint: Checkpoint, request: CurveRequest, texts: CalibrationTexts, sizes: Sequence[int | None],
                folder: Path, options: StreamOptions | None) -> Found:
    """Layerwise: a pass per size, the smallest first."""
    import shutil

    from emo_select.experts.calibration import draw
    from emo_select.experts.layerwise import select_layerwise

    for size in sizes:
        chosen = [texts.token_ids[i] for i in draw(len(texts.token_ids), size, request.calibration.seed)]
        progress.say(f"{folder.name}: selecting from {len(chosen)} examples.")
        work = folder / ".selection.partial"
        found = select_layerwise(checkpoint, chosen, request.keep_ks, options=options, work_dir=work)
        yield size, {keep_set.keep_k: keep_set for keep_set in found.values()}
        shutil.rmtree(work, ignore_errors=True)


def _in_one_pass(checkpoint: Checkpoint, request: CurveRequest, texts: CalibrationTexts, sizes: Sequence[int | None],
                 folder: Path, options: StreamOptions | None) -> Found:
    """Methods that rank by the unpruned model: a text belongs to the smallest sample that has it, and sums add up."""
    from emo_select.experts.activations import collect_activations
    from emo_select.experts.calibration import draw
    from emo_select.experts.methods import select_from_scores

    if not sizes:
        return
    total = len(texts.token_ids)
    order = dict.fromkeys([*draw(total, min(total, max((n or 0 for n in sizes), default=0)), request.calibration.seed)])
    order |= dict.fromkeys(range(total)) if None in sizes else {}
    ends = [total if size is None else min(size, total) for size in sizes]
    rings = [next(str(i) for i, end in enumerate(ends) if place < end) for place in range(len(order))]
    scores = collect_activations(checkpoint, [texts.token_ids[i] for i in order], rings, None, options)
    for number, size in enumerate(sizes):
        inside = [ring for ring in scores.groups if int(ring) <= number]
        yield size, {keep_k: select_from_scores(scores, request.method, keep_k, checkpoint.config, groups=inside)
                     for keep_k in request.keep_ks}


class _Store:
    """The nprune-N.json files of one task."""

    def __init__(self, folder: Path, request: CurveRequest, task: str, total: int, key: str) -> None:
        self.folder, self.request, self.task, self.total = folder, request, task, total
        record, stored = folder / RECORD, list(folder.glob("keepk-*/nprune-*.json"))
        if not record.exists() and stored:
            raise SpecError(f"{folder} holds kept sets that this command did not write; give another --out.")
        if not record.exists() or read_json(record).get("key") != key:
            for file in stored:  # ours, of another model, other texts or settings
                file.unlink()
            write_json(record, {"key": key})

    def file(self, size: int | None, keep_k: int) -> Path:
        return self.folder / f"keepk-{keep_k}" / f"nprune-{_tag(size)}.json"

    def has(self, size: int | None) -> bool:
        return all(self.file(size, keep_k).exists() for keep_k in self.request.keep_ks)

    def examples(self, size: int | None) -> int:
        return self.total if size is None else min(size, self.total)

    def save(self, size: int | None, keep_sets: Mapping[int, KeepSet]) -> None:
        for keep_k, keep_set in keep_sets.items():
            write_json(self.file(size, keep_k), {
                "model": self.request.model, "task": self.task, "split": "validation", "prune_keep_k": keep_k,
                "num_shared_experts": keep_set.num_shared, "num_calibration": size,
                "num_calibration_effective": self.examples(size),
                "experts_kept_per_layer": keep_set.experts, "avg_probs_per_layer": keep_set.scores,
            })

    def load(self, size: int | None, keep_k: int) -> KeepSet:
        file = self.file(size, keep_k)
        data = read_json(file)
        try:
            return KeepSet(experts=data["experts_kept_per_layer"], method=self.request.method, keep_k=keep_k,
                           num_shared=data["num_shared_experts"], model=data["model"], task=data["task"],
                           num_examples=size, seed=self.request.calibration.seed)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{file} is not a kept set ({error}); delete it so that it is made again.") from None


def _key(checkpoint: Checkpoint, request: CurveRequest, texts: CalibrationTexts) -> str:
    settings = request.method, request.calibration.seed, checkpoint.forward_fingerprint
    digest = sha256(repr(settings).encode())
    for ids in texts.token_ids:
        digest.update(repr(list(ids)).encode())
    return digest.hexdigest()


def _model_folder(model: str) -> str:
    """The last two parts of its path joined, letters, digits, `_` and `-` only: the published name."""
    name = re.sub(r"[^A-Za-z0-9_-]", "", "".join(Path(model).parts[-2:]))
    return name or "model"


def _task_folder(task: str, request: CurveRequest) -> str:
    """The task's name, and what differs from the published default."""
    chosen = request.calibration
    words = [task, "" if request.method == "layerwise" else f"selectivemode-{request.method}",
             f"pseed-{chosen.seed}" if chosen.seed else "",
             "" if chosen.num_shots is None else f"pshots-{chosen.num_shots}"]
    return re.sub(r"[^\w.:-]", "_", "_".join(filter(None, words)))


# ---- summaries ----


def published_summary(curve: Curve) -> dict[str, Any]:
    """The published summary.json: shared experts count in its Jaccard indices."""
    tags = list(curve.keep_sets)
    return {
        "task": curve.task, "prune_keep_k": curve.keep_k, "reference_nprune": curve.reference, "tags": tags,
        "per_layer_jaccard": {tag: curve.overlap(tag, shared=True) for tag in tags},
        "mean_jaccard": {tag: curve.mean(tag, shared=True) for tag in tags},
        "min_jaccard": {tag: curve.smallest(tag, shared=True) for tag in tags},
    }


def write_summary(curves: Sequence[Curve], out: Path, *, published: bool = False) -> list[Path]:
    """`summary.md` and `curve.json` of every model below `out`.

    `published`: summary.md as published, with shared experts counted and keep-k sorted as text. Else routed experts,
    the published number in parentheses, keep-k sorted by size.
    """
    models = dict.fromkeys(curve.model for curve in curves)
    files = [out / _model_folder(model) / name for model in models for name in ("summary.md", "curve.json")]
    require_own_files(*files)
    for model in models:
        own, folder = [curve for curve in curves if curve.model == model], out / _model_folder(model)
        write_output(folder / "summary.md", markdown(own, published=published).encode())
        write_output(folder / "curve.json", json_bytes([curve.as_data() for curve in own]))
    return files


def markdown(curves: Sequence[Curve], *, published: bool = False) -> str:
    """Two tables, mean and then smallest index over layers; see `write_summary`."""
    order: Callable[[Curve], Any] = (lambda c: (c.task, str(c.keep_k))) if published else (
        lambda c: (c.task, c.note, c.keep_k))
    rows, sizes = sorted(curves, key=order), all_sizes(curves)
    head = f"| task | keep_k |{''.join(f' N={tag} |' for tag in sizes)}\n|---|---|{'---|' * len(sizes)}\n"

    def cell(curve: Curve, tag: str, value: Callable[..., float]) -> str:
        if tag not in curve.keep_sets:
            return "—"
        if tag == curve.reference:
            return "(ref)"
        theirs = f"{value(curve, tag, shared=True):.3f}"
        return theirs if published else f"{value(curve, tag):.3f} ({theirs})"

    tables = []
    for title, value in (("Mean", Curve.mean), ("Smallest", Curve.smallest)):
        body = "".join(f"| {_row_name(c)} | {c.keep_k} |{''.join(f' {cell(c, tag, value)} |' for tag in sizes)}\n"
                       for c in rows)
        line = "" if published else (f"{title} Jaccard index over layers with the kept experts of the largest sample: "
                                     "routed experts (with shared ones, as published)\n\n")
        tables.append(line + head + body)
    return "\n".join(tables)


def all_sizes(curves: Iterable[Curve]) -> list[str]:
    """All sample sizes, ascending."""
    tags = {tag for curve in curves for tag in curve.keep_sets}
    return sorted(tags, key=lambda tag: float("inf") if tag == ALL else int(tag))


def _row_name(curve: Curve) -> str:
    name = f"{curve.task}, {curve.note}" if curve.note else curve.task
    return " ".join(name.split()).replace("|", "\\|")
