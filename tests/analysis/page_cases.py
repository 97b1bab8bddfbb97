"""Analyses made up for the page: files as the analysis writes them, without a model behind them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from emo_select.analysis.layout import (
    Cluster,
    ClusterName,
    Document,
    ExpertView,
    FitInfo,
    LayerExperts,
    LayerInfo,
    Measure,
    ModelFolder,
    RoutingInfo,
    Share,
    Word,
    write_array,
    write_list,
    write_names,
)
from emo_select.storage import write_bytes, write_json

LAYERS, EXPERTS = 2, 8


class ByteTokenizer:
    """Token ids stand for strings of bytes, so a character can be split over tokens."""

    def __init__(self, pieces: Sequence[bytes]) -> None:
        self.pieces = list(pieces)

    def decode(self, ids: Sequence[int], **_: object) -> str:
        return b"".join(self.pieces[i] for i in ids).decode("utf-8", "replace")

    def convert_ids_to_tokens(self, number: int) -> str:
        return self.decode([number])


def make_model(root: Path, name: str, documents: Sequence[Sequence[int]], clusters: np.ndarray, k: int, *,
               labels: Sequence[str] = ("news",), names: Sequence[str] = (), words: Sequence[str] = ("word",),
               tokenizer: str = "t", layers: int = LAYERS, experts: int = EXPERTS, described: bool = True,
               seed: int = 0) -> Path:
    """A model's folder with one fit, its routing drawn at random."""
    draw, folder = np.random.default_rng(seed), ModelFolder(root / name.replace("/", ""))
    lengths = [len(one) for one in documents]
    info = RoutingInfo(
        fingerprint="r", model=name, model_fingerprint=f"f-{name}", tokenizer_fingerprint=tokenizer, texts={},
        dtype="f", tokens=sum(lengths), documents=len(documents), num_layers=layers, scoring="softmax",
        layers=tuple(LayerInfo(layer=i, experts=experts, chosen=2) for i in range(layers)))
    write_json(folder.routing / "info.json", info.model_dump(mode="json"))
    rows = [Document(index=i, length=n, labels={"source": labels[i % len(labels)]}, name=f"doc-{i}")
            for i, n in enumerate(lengths)]
    write_bytes(folder.routing / "documents.jsonl", "".join(f"{row.model_dump_json()}\n" for row in rows).encode())
    write_array(folder.routing / "tokens.npy", np.concatenate([np.asarray(one, dtype=np.int32) for one in documents]))
    write_array(folder.routing / "bounds.npy", np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))
    fit = folder.fits_folder / "probs_k"
    write_json(fit / "fit.json", FitInfo(
        fingerprint="f", routing_fingerprint="r", embedding="probs", preprocess="l2", method="spherical_kmeans", k=k,
        seed=0, restarts=2, engine="torch", rows=len(clusters), columns=layers * experts, objective=0.5,
        stability=0.75).model_dump(mode="json"))
    write_array(fit / "assignments.npy", clusters.astype(np.int32))
    if described:
        write_list(fit / "clusters.json", [_cluster(i, clusters, words, layers) for i in range(k)], "f")
        measures = [Measure(name="top", value=0.4, low=0.3, high=0.5, null=0.1, about="share of the top cluster"),
                    *(Measure(name="eta", value=0.1 * (i + 1), low=0.05, high=0.4, layer=i) for i in range(layers))]
        write_list(fit / "metrics.json", measures, "f")
        write_names(fit, {i: ClusterName(label=names[i] if i < len(names) else f"topic {i}") for i in range(k)})
        write_list(folder.path / "experts.json", [
            ExpertView(layer=i, expert=e, load=float(draw.random()), mass=1 / experts, specialisation=None, dead=e == 0,
                       words=_words(words), documents=(0,)) for i in range(layers) for e in range(experts)], "r")
    return folder.path


def _words(words: Sequence[str]) -> tuple[Word, ...]:
    return tuple(Word(word=word, score=0.5, count=3) for word in words)


def _cluster(number: int, clusters: np.ndarray, words: Sequence[str], layers: int) -> Cluster:
    size = int((clusters == number).sum())
    used = tuple(LayerExperts(layer=i, experts=(Share(name=str(number % EXPERTS), share=0.5, lift=2.0),))
                 for i in range(layers))
    return Cluster(id=number, size=size, share=size / len(clusters), survival=0.5, kind="topic", experts=used,
                   explained={"token": 0.2}, token_words=_words(words), labels=(Share(name="news", share=1, lift=1),))
