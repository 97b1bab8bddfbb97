"""One HTML file to explore an analysis: clusters, documents, tokens, experts, and models side by side.

It opens from disk and asks the network for nothing. The data is one block, compressed and in base64: a JSON head and
the tokens' pieces and clusters as byte arrays, so that 1.2 million tokens of two models stay below 8 MB. The script
shows everything as text nodes; the page's own policy forbids every other script and every request. It draws what the
files hold and says nothing that was not measured.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emo_select import __version__
from emo_select.analysis.layout import Cluster, FitFolder, Measure, ModelFolder
from emo_select.analysis.words import Pieces, tokenizer_of
from emo_select.errors import SpecError
from emo_select.experts.inspect import find_selections
from emo_select.experts.keepset import KeepSet
from emo_select.ownership import require_own_files
from emo_select.progress import track
from emo_select.storage import write_output

ASSETS = Path(__file__).with_name("assets")
LEVEL = 6  # of gzip; more takes long and gains little
ROWS = 200_000  # of a layer's columns read at a time


def write_page(folders: Sequence[Path], out: Path, fit: str | None = None, *, keep_sets: Sequence[Path] = (),
               title: str = "What the experts know") -> Path:
    """Write the page about some models' folders, by rename.

    Args:
        folders: `ModelFolder` paths; all of the same documents and tokenizer. The page letters them A, B, …
        out: the HTML file.
        fit: name of the fit to show; None takes each model's only or largest (most clusters).
        keep_sets: selection.json files, or folders above them: which clusters lose experts.
        title: heading of the page.

    Raises:
        SpecError: no model, no fit, models of different texts. CheckpointError: a damaged file.
    """
    require_own_files(out)
    models = [ModelFolder(Path(folder)) for folder in folders]
    fits = [fit_of(model, fit) for model in models]
    require_same_texts(models)
    selections = _selections(models, keep_sets)
    head, arrays = _texts(models[0])
    with track("Collecting what the page shows", total=len(models)) as bar:
        head["models"] = []
        for number, (model, one) in enumerate(zip(models, fits, strict=True)):
            clusters = model.token_clusters(one)
            arrays |= _planes(f"clusters{number}", clusters)
            head["models"].append(_model(model, one, clusters, selections[number]))
            bar.advance()
    head |= {"title": title, "version": __version__, "written": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")}
    write_output(out, render(title, pack(head, arrays)).encode())
    return out


def pack(head: Mapping[str, Any], arrays: Mapping[str, NDArray[np.uint8]]) -> str:
    """One block: length of the head (4 bytes), head, arrays one after the other; gzip, base64."""
    text = json.dumps({**head, "arrays": {name: len(values) for name, values in arrays.items()}},
                      separators=(",", ":"), allow_nan=False, ensure_ascii=False).encode("utf-8", "replace")
    whole = b"".join([len(text).to_bytes(4, "little"), text, *(values.tobytes() for values in arrays.values())])
    return base64.b64encode(gzip.compress(whole, compresslevel=LEVEL, mtime=0)).decode()


def render(title: str, data: str) -> str:
    """The HTML text around the data."""
    from jinja2 import Environment, FileSystemLoader

    style, script = ((ASSETS / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    template = Environment(loader=FileSystemLoader(ASSETS), autoescape=True).get_template("page.html.jinja")
    return template.render(title=title, style=style, script=script, style_hash=_hash(style),
                           script_hash=_hash(script), data=data)


def _hash(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


# ---- which fits, which models ----


def fit_of(model: ModelFolder, name: str | None) -> FitFolder:
    """A model's fit of that name, else the one with the most clusters. SpecError if there is none."""
    if name is not None:
        return model.fit(name)
    fits = model.fits()
    if not fits:
        raise SpecError(f"{model.path} has no clusters yet; run `emo-select clusters fit` and `clusters label` first.")
    return max(fits, key=lambda one: (one.info.k, one.name))


def require_same_texts(models: Sequence[ModelFolder]) -> None:
    """SpecError unless all models saw the same tokens of the same documents."""
    if not models:
        raise SpecError("There is no model to show; name the folder of one.")
    first = models[0]
    for other in models[1:]:
        if other.info.tokenizer_fingerprint != first.info.tokenizer_fingerprint:
            raise SpecError(f"{first.info.model} and {other.info.model} have different tokenizers, so their tokens "
                            "cannot stand side by side; write a page for each.")
        if not (np.array_equal(first.bounds, other.bounds) and np.array_equal(first.tokens, other.tokens)):
            raise SpecError(f"{first.path} and {other.path} were extracted from different documents; extract both "
                            "from the same texts.")


def _selections(models: Sequence[ModelFolder], paths: Sequence[Path]) -> list[dict[str, KeepSet]]:
    """Keep sets of each model, by name; one that belongs to none is an error."""
    found = find_selections(paths) if paths else {}
    per_model: list[dict[str, KeepSet]] = [{} for _ in models]
    for name, keep_set in found.items():
        owners = [i for i, model in enumerate(models)
                  if keep_set.fingerprint == model.info.model_fingerprint or keep_set.model == model.info.model]
        if not owners:
            raise SpecError(f"The selection {name} belongs to {keep_set.model}, which is not on this page.")
        for i in owners:
            words = [keep_set.task, f"keep-k {keep_set.keep_k}", keep_set.method]
            per_model[i][", ".join(word for word in words if word) or name] = keep_set
    return per_model


# ---- texts ----


def _texts(model: ModelFolder) -> tuple[dict[str, Any], dict[str, NDArray[np.uint8]]]:
    """Documents, labels and the pieces of text that the tokens stand for."""
    pieces, of_token = token_pieces(model)
    labels = model.labels()
    names = sorted(set(labels))
    number = {name: i for i, name in enumerate(names)}
    head = {
        "label_key": model.info.label_key, "labels": names, "pieces": pieces,
        "names": [document.name for document in model.documents], "tokens": len(model.tokens),
        "texts": {key: value for key, value in model.info.texts.items() if isinstance(value, str | int | float)},
    }
    return head, {
        **_planes("lengths", np.diff(model.bounds).astype(np.int64)), **_planes("pieces", of_token),
        **_planes("labels", np.asarray([number[label] for label in labels])),
    }


def token_pieces(model: ModelFolder) -> tuple[list[str], NDArray[np.int64]]:
    """The distinct pieces of text, commonest first, and (T,) which one each token stands for.

    A character that is split over tokens goes to the last of them, so no piece is half a character.
    """
    splitter, known = Pieces(tokenizer_of(model.info)), dict[str, int]()
    of_token = np.empty(len(model.tokens), dtype=np.int64)
    for start, stop in zip(model.bounds[:-1], model.bounds[1:], strict=True):
        of_token[start:stop] = [known.setdefault(piece, len(known))
                                for piece in splitter.split(model.tokens[start:stop].tolist())]
    order = np.argsort(-np.bincount(of_token, minlength=len(known)), kind="stable")
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    listed = list(known)
    return [listed[i] for i in order], place[of_token]


def _planes(name: str, values: NDArray[Any]) -> dict[str, NDArray[np.uint8]]:
    """Numbers from -1 up as byte arrays, lowest bytes first; each is 1 more than the number. Planes pack better."""
    shifted = np.asarray(values).astype(np.int64) + 1
    width = max(1, (int(shifted.max(initial=0)).bit_length() + 7) // 8)
    return {f"{name}.{byte}": ((shifted >> (8 * byte)) & 255).astype(np.uint8) for byte in range(width)}


# ---- one model ----


def _model(model: ModelFolder, fit: FitFolder, clusters: NDArray[np.int32], keep_sets: Mapping[str, KeepSet]
           ) -> dict[str, Any]:
    info, names = fit.info, fit.names
    described = {cluster.id: cluster for cluster in fit.clusters}
    sizes = np.bincount(clusters[clusters >= 0], minlength=info.k)
    shown = [described.get(i) or Cluster(id=i, size=int(sizes[i]), share=float(sizes[i] / max(1, sizes.sum())))
             for i in range(info.k)]
    return {
        "name": model.info.model, "fit": fit.name, "k": info.k, "objective": _short(info.objective),
        "stability": _short(info.stability), "components": info.components, "variance": _short(info.variance),
        "layers": [{"layer": one.layer, "experts": one.experts, "chosen": one.chosen, "shared": one.shared}
                   for one in model.info.layers],
        "clusters": [{**_rounded(one.model_dump(mode="json", exclude={"exemplars"})), "name": names[one.id].label,
                      "category": names[one.id].category} for one in shown],
        "experts": [_rounded(one.model_dump(mode="json")) for one in model.experts],
        "measures": [_rounded(one.model_dump(mode="json")) for one in _measures(model, fit)],
        "keep_sets": [_lost(model, clusters, info.k, name, keep_set) for name, keep_set in keep_sets.items()],
    }


def _measures(model: ModelFolder, fit: FitFolder) -> Iterable[Measure]:
    return [*fit.measures, *model.measures]


def _lost(model: ModelFolder, clusters: NDArray[np.int32], k: int, name: str, keep_set: KeepSet) -> dict[str, Any]:
    """What a keep set takes from every cluster: 1 - the mean probability of its tokens that stays, mean over layers."""
    lost, kept = [], {}
    for layer in model.info.layers:
        chosen = keep_set.experts[layer.layer] if layer.layer < len(keep_set.experts) else None
        if chosen is not None:
            routed = [expert for expert in chosen if expert < layer.experts]
            kept[str(layer.layer)] = routed
            lost.append(1 - _kept_share(model.probs(layer.layer), clusters, k, routed))
    mean = np.mean(lost, axis=0) if lost else np.zeros(k)
    return {"name": name, "keep_k": keep_set.keep_k, "kept": kept,
            "lost": [None if value != value else _short(float(value)) for value in mean]}


def _kept_share(probs: NDArray[np.float16], clusters: NDArray[np.int32], k: int, experts: Sequence[int]
                ) -> NDArray[np.float64]:
    """(k,) mean over a cluster's tokens of the probability that goes to `experts`; NaN for an empty cluster."""
    total, count = np.zeros(k), np.zeros(k)
    for start in range(0, len(clusters), ROWS):
        own = clusters[start:start + ROWS]
        known = own >= 0
        mass = np.asarray(probs[start:start + ROWS][:, list(experts)], dtype=np.float32).sum(axis=1)
        total += np.bincount(own[known], weights=mass[known], minlength=k)
        count += np.bincount(own[known], minlength=k)
    with np.errstate(invalid="ignore"):
        return np.asarray(total / count)


def _short(value: float | None) -> float | None:
    """Four significant digits: what the page shows, at most. JSON has no NaN."""
    return None if value is None or not np.isfinite(value) else float(f"{value:.4g}")


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return _short(value)
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    return [_rounded(inner) for inner in value] if isinstance(value, list | tuple) else value
