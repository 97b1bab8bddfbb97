"""The golden clusterings, each with the arrays that it was made from."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emo_select.analysis.layout import LayerInfo


@dataclass(frozen=True)
class Run:
    """A golden run: its files, the embedding as it is and as it was clustered, metadata of all rows."""

    folder: Path
    values: NDArray[Any]
    prepared: NDArray[np.float32] | None
    rows: list[dict[str, Any]]

    @property
    def info(self) -> dict[str, Any]:
        return dict(json.loads((self.folder / "run_info.json").read_text()))

    @property
    def assignments(self) -> NDArray[np.int32]:
        return np.load(self.folder / "assignments.npy").astype(np.int32)

    @property
    def kept(self) -> NDArray[np.int64] | None:
        file = self.folder / "kept_rows.npy"
        return np.load(file) if file.exists() else None


@dataclass(frozen=True)
class Golden:
    """Golden arrays of one model."""

    folder: Path

    def derived(self, name: str) -> NDArray[Any]:
        if name == "topk_binary":
            packed = np.load(self.folder / "derived" / "embeddings_topk_binary.packed.npy")
            return np.unpackbits(packed, axis=1)[:, :self.logits.shape[1]]
        if name == "layer0_probs":
            return self.derived("probs")[:, :self.layers[0].experts]
        return np.load(self.folder / "derived" / f"embeddings_{name}.npy")

    @property
    def logits(self) -> NDArray[np.float16]:
        return np.load(self.folder / "embeddings_logits.npy")

    @property
    def bounds(self) -> NDArray[np.int64]:
        return np.load(self.folder / "doc_boundaries.npy")

    @property
    def tokens(self) -> NDArray[np.int32]:
        return np.load(self.folder / "documents.npy")

    @property
    def layers(self) -> list[LayerInfo]:
        info = json.loads((self.folder / "info.json").read_text())
        return [LayerInfo(layer=layer, experts=info["num_standard_experts"], chosen=info["routed_top_k"])
                for layer in range(info["num_layers"])]

    @property
    def documents(self) -> list[dict[str, Any]]:
        packed = (self.folder / "metadata_docs.jsonl.gz").read_bytes()
        return [json.loads(line) for line in gzip.decompress(packed).splitlines()]

    def token_rows(self) -> list[dict[str, Any]]:
        tokens, bounds = self.tokens, self.bounds
        return [{"source": one["source"], "doc_index": i, "token_position": place,
                 "token_id": int(tokens[bounds[i] + place])}
                for i, one in enumerate(self.documents) for place in range(one["doc_len"])]

    def runs(self) -> Iterator[Run]:
        """Every run."""
        token_rows, documents = self.token_rows(), self.documents
        for folder in sorted(path for path in (self.folder / "runs").iterdir() if path.is_dir()):
            info = json.loads((folder / "run_info.json").read_text())
            values = self.derived(info["embedding"])
            rows = documents if info["embedding"].startswith("doc_") else token_rows
            yield Run(folder, values, self._prepared(folder, info, values), rows)

    def _prepared(self, folder: Path, info: dict[str, Any], values: NDArray[Any]) -> NDArray[np.float32] | None:
        name = f"{info['embedding']}.{info['preprocess']}.npy"
        for file in (folder / "preprocessed.npy", self.folder / "pca" / name):
            if file.exists():
                return np.load(file)
        return values.astype(np.float32) if info["preprocess"] == "identity" else None
