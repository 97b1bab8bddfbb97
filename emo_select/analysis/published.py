"""An analysis in the published layout: its file names, dtypes and JSON keys, so that the published pages read it.

    <target>/<model>/
      embeddings_logits.npy    (T, L·E) float16, column layer · E + expert
      documents.npy  doc_boundaries.npy  metadata_tokens.jsonl.gz  metadata_docs.jsonl.gz  info.json
      embeddings_<name>.npy    what a fit clustered, derived from the float16 logits as published
      <fit>/                   assignments.npy  run_info.json  summary.json  cluster_labels.json  cluster_samples/

Different from published files on purpose: chosen experts of equal logits are the lowest-numbered ones; balanced fits
also have kept_rows.npy and a name of their own, and their samples show the tokens that were clustered.
"""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emo_select import progress
from emo_select.analysis.describe import sums_by_group
from emo_select.analysis.layout import FitFolder, LayerInfo, ModelFolder, write_array
from emo_select.analysis.words import tokenizer_of
from emo_select.errors import SpecError
from emo_select.spec import digest
from emo_select.storage import require_space, staged_directory, write_bytes, write_json

BLOCK_ROWS = 8192
REPRESENTATIVES, TOP_EXPERTS = 5, 10
SAMPLES, WINDOW, TOP_TOKENS, LEAST_COUNT, SEED = 200, 10, 30, 3, 42
CONTEXT_CHARACTERS = 100
Decode = Callable[[Sequence[int], bool], str]  # (ids, leave out special tokens) → text


def write_published(folder: ModelFolder, fits: Sequence[FitFolder], target: Path) -> Path:
    """Write `folder`, and `fits` of it, as `target`. What was written from the same columns is left alone.

    Raises:
        SpecError: the router logits were not kept, or `target` holds something else.
    """
    columns = sum(layer.experts for layer in folder.info.layers)
    folder.logits(folder.info.layers[0].layer)
    if not _is_ours(target, folder):
        require_space(target.parent, folder.info.tokens * columns * 4, "The published layout")
        with staged_directory(target, folder.info.fingerprint) as work:
            _write_extraction(folder, work)
    for fit in fits:
        _write_derived(folder, fit.info.embedding, target)
        with staged_directory(target / fit.name, fit.info.fingerprint + digest([fit.measures != []])) as work:
            _write_fit(folder, fit, target, work)
    return target


MARK = "emo_select.json"


def _is_ours(target: Path, folder: ModelFolder) -> bool:
    if not target.exists() or not any(target.iterdir()):
        return False
    mark = target / MARK
    if mark.exists() and json.loads(mark.read_text())["made_from"] == folder.info.fingerprint:
        return True
    raise SpecError(f"{target} holds something else; choose another folder with --published-layout, or delete it.")


# ---- extraction


def _write_extraction(folder: ModelFolder, work: Path) -> None:
    write_array(work / "documents.npy", np.asarray(folder.tokens))
    write_array(work / "doc_boundaries.npy", np.asarray(folder.bounds))
    _write_lines(work / "metadata_docs.jsonl.gz", document_rows(folder))
    _write_lines(work / "metadata_tokens.jsonl.gz", token_rows(folder))
    write_json(work / "info.json", info(folder))
    _write_blocks(work / "embeddings_logits.npy", folder, np.float16, _all_columns(folder),
                  lambda block: block)
    _write_derived(folder, "probs", work)
    write_json(work / MARK, {"made_from": folder.info.fingerprint})


def info(folder: ModelFolder) -> dict[str, Any]:
    """`info.json` with the published keys."""
    told, about = folder.info, folder.info.texts
    sources = folder.labels("source")
    lengths = np.diff(folder.bounds)
    tokens: Counter[str] = Counter()
    for source, length in zip(sources, lengths, strict=True):
        tokens[source] += int(length)
    experts = {layer.experts for layer in told.layers}
    published = about.get("sampling") == "published"
    return {
        "source": "pretraining" if published else folder.path.parent.name, "num_tokens": told.tokens,
        "num_docs": told.documents, "num_layers": len(told.layers), "num_standard_experts": max(experts),
        "routed_top_k": max(layer.chosen for layer in told.layers), "emb_dim": _all_columns(folder),
        "model_path": told.model, "source_token_counts": dict(tokens), "source_doc_counts": dict(Counter(sources)),
        "max_tokens_per_doc": about.get("doc_tokens", 0),
        **({"target_tokens": about["target_tokens"]} if published else {}), "shuffle_seed": about.get("seed", SEED),
        **({} if len(experts) == 1 else {"experts_per_layer": [layer.experts for layer in told.layers]}),
        **({} if told.num_layers == len(told.layers) else {"moe_layers": [layer.layer for layer in told.layers]}),
    }


def document_rows(folder: ModelFolder) -> Iterator[dict[str, Any]]:
    """metadata_docs: one object per document."""
    for document in folder.documents:
        yield {"doc_index": document.index, "source": document.labels["source"], "doc_len": document.length}


def token_rows(folder: ModelFolder) -> Iterator[dict[str, Any]]:
    """metadata_tokens: one object per token."""
    for document in folder.documents:
        start = int(folder.bounds[document.index])
        for position, token in enumerate(folder.tokens[start:start + document.length].tolist()):
            yield {"source": document.labels["source"], "doc_index": document.index, "token_position": position,
                   "token_id": token}


def _write_lines(file: Path, rows: Iterator[dict[str, Any]]) -> None:
    with file.open("wb") as raw, gzip.GzipFile("", "wb", fileobj=raw, mtime=0) as packed:
        for row in rows:
            packed.write((json.dumps(row) + "\n").encode())


def _all_columns(folder: ModelFolder) -> int:
    return sum(layer.experts for layer in folder.info.layers)


def _write_blocks(file: Path, folder: ModelFolder, dtype: Any, columns: int,
                  change: Callable[[NDArray[np.float16]], NDArray[Any]], layers: Sequence[LayerInfo] | None = None
                  ) -> None:
    """An array of all tokens, made from blocks of their logits."""
    chosen = folder.info.layers if layers is None else layers
    partial = file.with_name(f".{file.name}.partial")
    array = np.lib.format.open_memmap(partial, mode="w+", dtype=dtype, shape=(folder.info.tokens, columns))
    for start in range(0, folder.info.tokens, BLOCK_ROWS):
        rows = slice(start, start + BLOCK_ROWS)
        array[rows] = change(np.concatenate([folder.logits(layer.layer)[rows] for layer in chosen], axis=1))
    array.flush()
    partial.replace(file)


# ---- derivations


def derive(logits: NDArray[np.float16], layers: Sequence[LayerInfo], kind: str) -> NDArray[Any]:
    """float16 logits (T, columns of `layers`) → "probs" (float16, softmax per layer) or "topk_binary" (uint8)."""
    parts, start = [], 0
    for layer in layers:
        values = logits[:, start:start + layer.experts].astype(np.float32)
        parts.append(_softmax(values) if kind == "probs" else _top(values, layer.chosen))
        start += layer.experts
    return np.concatenate(parts, axis=1)


def document_means(values: NDArray[Any], bounds: NDArray[np.int64], dtype: Any) -> NDArray[Any]:
    """(T, D) → (N, D) means over each document's tokens; zeros for an empty one."""
    lengths = np.diff(bounds)
    sums = sums_by_group(values, np.repeat(np.arange(len(lengths)), lengths), len(lengths))
    return np.asarray(sums / np.maximum(lengths, 1)[:, None]).astype(dtype)


def _softmax(values: NDArray[np.float32]) -> NDArray[np.float16]:
    shifted = np.exp(values - values.max(axis=1, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=1, keepdims=True), dtype=np.float16)


def _top(values: NDArray[np.float32], chosen: int) -> NDArray[np.uint8]:
    mask = np.zeros(values.shape, dtype=np.uint8)
    np.put_along_axis(mask, np.argsort(-values, axis=1, kind="stable")[:, :chosen], 1, axis=1)
    return mask


def _write_derived(folder: ModelFolder, name: str, target: Path) -> None:
    """`embeddings_<name>.npy`, unless it is there."""
    name = "topk_binary" if name == "topk" else name
    file = target / f"embeddings_{name}.npy"
    if file.exists():
        return
    bare = name.removeprefix("doc_")
    number = bare.removeprefix("layer").removesuffix("_probs") if bare.startswith("layer") else None
    layers = [layer for layer in folder.info.layers if number is None or layer.layer == int(number)]
    kind = "topk_binary" if "topk" in bare else "logits" if bare == "logits" else "probs"
    columns = sum(layer.experts for layer in layers)
    token_file = file if not name.startswith("doc_") else target / f".{file.name}.tokens"
    _write_blocks(token_file, folder, {"topk_binary": np.uint8}.get(kind, np.float16), columns,
                  lambda block: block if kind == "logits" else derive(block, layers, kind), layers)
    if name.startswith("doc_"):
        dtype = np.float32 if name == "doc_topk_freq" else np.float16
        write_array(file, document_means(np.load(token_file, mmap_mode="r"), folder.bounds, dtype))
        token_file.unlink()


# ---- fits


def _write_fit(folder: ModelFolder, fit: FitFolder, target: Path, work: Path) -> None:
    told = fit.info
    write_array(work / "assignments.npy", np.asarray(fit.assignments))
    if told.balance:
        write_array(work / "kept_rows.npy", np.asarray(fit.rows))
    write_json(work / "run_info.json", {"embedding": told.embedding, "preprocess": told.preprocess,
                                        "method": told.method, "k": told.k, "metrics": told.quality})
    name = "topk_binary" if told.embedding == "topk" else told.embedding
    values = np.load(target / f"embeddings_{name}.npy", mmap_mode="r")
    of_rows = np.full(len(values), -1, dtype=np.int32)
    of_rows[fit.rows] = fit.assignments
    rows = list(document_rows(folder)) if fit.of_documents else _TokenRows(folder)
    place = {int(row): i for i, row in enumerate(fit.rows)} if told.balance else None
    nearest = [[int(row) for row in one[:REPRESENTATIVES] if row >= 0] for one in fit.nearest]
    write_json(work / "summary.json", summary(of_rows, sums_by_group(values, of_rows, told.k), nearest, rows, place))
    names = fit.names
    write_json(work / "cluster_labels.json", {str(c): {"label": names[c].label, "category": names[c].category}
                                              for c in range(told.k)})
    if not fit.of_documents:
        _write_samples(folder, fit, work / "cluster_samples")


class _TokenRows(Sequence[dict[str, Any]]):
    """Rows of metadata_tokens by number, without making all of them."""

    def __init__(self, folder: ModelFolder) -> None:
        self.folder, self.sources = folder, folder.labels("source")

    def __len__(self) -> int:
        return self.folder.info.tokens

    def __getitem__(self, row: Any) -> Any:
        document = int(self.folder.document_of[row])
        return {"source": self.sources[document], "token_position": int(self.folder.positions[row]),
                "token_id": int(self.folder.tokens[row]), "doc_index": document}


def summary(assignments: NDArray[np.int32], sums: NDArray[np.floating], nearest: Sequence[Sequence[int]],
            rows: Sequence[Mapping[str, Any]], place: Mapping[int, int] | None = None) -> list[dict[str, Any]]:
    """`summary.json`: size, sources, the experts with the largest column sums, and the rows nearest to the mean.

    Args:
        assignments: of every row, -1 for one that was not clustered.
        sums: (k, L·E) of the embedding as it is before any preprocessing.
        nearest: rows nearest to each cluster's mean.
        rows: metadata by row.
        place: what a row is called, where only some were clustered.
    """
    sources = np.array([row["source"] for row in rows])
    found: list[dict[str, Any]] = []
    for c in range(len(sums)):
        members = assignments == c
        if not members.any():
            found.append({"cluster": c, "size": 0})
            continue
        names, counts = np.unique(sources[members], return_counts=True)
        found.append({
            "cluster": c, "size": int(members.sum()),
            "source_counts": {str(name): int(count) for name, count in zip(names, counts, strict=True)},
            "top10_experts_global": np.argsort(sums[c])[::-1][:TOP_EXPERTS].tolist(),
            "representative_samples": [_sample(rows[row], row if place is None else place[row])
                                       for row in nearest[c]]})
    return found


def _sample(row: Mapping[str, Any], number: int) -> dict[str, Any]:
    keys = ("doc_len", "preview", "token_position", "token_id", "doc_index", "category")
    return {"idx": number, "source": row["source"], **{key: row[key] for key in keys if key in row}}


# ---- the label aid


def _write_samples(folder: ModelFolder, fit: FitFolder, target: Path) -> None:
    tokenizer = tokenizer_of(folder.info)
    sources, of_token = np.asarray(folder.labels("source")), folder.token_clusters(fit)
    with progress.track("Sampling contexts", total=fit.info.k) as bar:
        for c, text in cluster_samples(of_token, folder.tokens, folder.bounds, sources, fit.info.k,
                                       _decoder(tokenizer)):
            write_bytes(target / f"cluster_{c:02d}.txt", text.encode())
            bar.advance(1)


def _decoder(tokenizer: Any) -> Decode:
    if tokenizer is None:
        return lambda ids, skip: " ".join(map(str, ids))
    return lambda ids, skip: str(tokenizer.decode(list(ids), skip_special_tokens=skip))


def cluster_samples(of_token: NDArray[np.int32], tokens: NDArray[np.int32], bounds: NDArray[np.int64],
                    sources: NDArray[Any], k: int, decode: Decode, samples: int = SAMPLES) -> Iterator[tuple[int, str]]:
    """(cluster, text) of what a person reads to name it: sources, commonest and enriched tokens, sampled contexts."""
    generator, everywhere = np.random.RandomState(SEED), Counter(tokens[of_token >= 0].tolist())
    lengths = np.diff(bounds)
    of_document = np.repeat(np.arange(len(lengths)), lengths)
    for c in range(k):
        members = np.flatnonzero(of_token == c)
        if not len(members):
            continue
        drawn = generator.choice(members, size=min(samples, len(members)), replace=False)
        counts = Counter(tokens[members].tolist())
        lines = [f"=== Cluster {c} (size {len(members)}) ===", "Source distribution:",
                 *_source_lines(Counter(sources[of_document[members]].tolist())), "",
                 f"Top {TOP_TOKENS} frequent tokens (within-cluster):", f"  {_frequent(counts, decode)}", "",
                 f"Top {TOP_TOKENS} enriched tokens (within/background ratio):",
                 f"  {_enriched(counts, everywhere, decode)}", "", f"=== {len(drawn)} Sampled contexts ==="]
        lines += [_context(int(row), tokens, bounds, of_document, sources, decode) for row in drawn]
        yield c, "\n".join(lines) + "\n"


def _source_lines(counts: Mapping[str, int]) -> list[str]:
    total = sum(counts.values())
    ordered = sorted(sorted(counts.items()), key=lambda entry: -entry[1])
    return [f"  {source:<30s} {count:>8,}  ({100 * count / total:5.1f}%)" for source, count in ordered]


def _shown(token: int, decode: Decode) -> str:
    return repr(decode([token], False).replace("\n", "\\n"))


def _frequent(counts: Counter[int], decode: Decode) -> str:
    return ", ".join(f"{_shown(token, decode)}:{count}" for token, count in counts.most_common(TOP_TOKENS))


def _enriched(counts: Counter[int], everywhere: Counter[int], decode: Decode) -> str:
    size, total = counts.total(), everywhere.total()
    found = [(token, count, count / size / (everywhere[token] / total))
             for token, count in counts.most_common() if count >= LEAST_COUNT]
    found.sort(key=lambda entry: -entry[2])
    return ", ".join(f"{_shown(token, decode)}:{ratio:.1f}x(n={count})" for token, count, ratio in found[:TOP_TOKENS])


def _context(row: int, tokens: NDArray[np.int32], bounds: NDArray[np.int64], of_document: NDArray[np.integer],
             sources: NDArray[Any], decode: Decode) -> str:
    document = int(of_document[row])
    first, last = max(int(bounds[document]), row - WINDOW), min(int(bounds[document + 1]), row + WINDOW + 1)
    before, after = tokens[first:row].tolist(), tokens[row + 1:last].tolist()
    left = decode(before, True).replace("\n", " ")[-CONTEXT_CHARACTERS:] if before else ""
    right = decode(after, True).replace("\n", " ")[:CONTEXT_CHARACTERS] if after else ""
    middle = decode([int(tokens[row])], True).replace("\n", "\\n")
    return f"[{sources[document]}] ...{left}[[{middle}]]{right}..."
