"""Names for clusters: made from their words, by a program of the user's, or edited by hand in labels.yaml."""

from __future__ import annotations

import json
import shlex
import subprocess
from collections.abc import Sequence
from typing import Any

from emo_select import progress
from emo_select.analysis.describe import Clustered
from emo_select.analysis.layout import Cluster, ClusterName, read_names, write_names
from emo_select.analysis.words import Pieces
from emo_select.errors import SpecError

NAME_WORDS = 3
CONTEXT_TOKENS = 10
TIMEOUT_S = 600


def made_name(cluster: Cluster) -> str:
    """Three words of the better list; what is known of the cluster where it has no words."""
    words = ", ".join(word.word for word in cluster.words[:NAME_WORDS])
    if cluster.kind == "position" and not words:
        return "a position"
    return words or (f"mostly {cluster.labels[0].name}" if cluster.labels else "empty")


def name_clusters(clustered: Clustered, clusters: Sequence[Cluster], pieces: Pieces, command: str | None = None
                  ) -> dict[int, ClusterName]:
    """Write labels.yaml and return it. Labels that were edited stay.

    With `command`, each other cluster's summary (JSON) goes to that program's stdin; its first line is the label, and a
    second one the category.

    Raises:
        SpecError: the program does not exist, fails, or says nothing.
    """
    path, k = clustered.fit.path, clustered.k
    there = read_names(path, k) if _has_names(clustered) else {}
    names: dict[int, ClusterName] = {}
    with progress.track("Naming clusters", total=len(clusters)) as bar:
        for cluster in clusters:
            old = there.get(cluster.id)
            if old is not None and old.label != old.made:
                names[cluster.id] = old
            else:
                names[cluster.id] = _new_name(clustered, cluster, pieces, command)
            bar.advance(1)
    write_names(path, names)
    return names


def _has_names(clustered: Clustered) -> bool:
    return any((clustered.fit.path / name).exists() for name in ("labels.yaml", "cluster_labels.json"))


def _new_name(clustered: Clustered, cluster: Cluster, pieces: Pieces, command: str | None) -> ClusterName:
    if command is None:
        name = made_name(cluster)
        return ClusterName(label=name, category=cluster.kind, made=name)
    label, category = _asked(command, json.dumps(summary(clustered, cluster, pieces), ensure_ascii=False))
    return ClusterName(label=label, category=category or cluster.kind, made=label)


def summary(clustered: Clustered, cluster: Cluster, pieces: Pieces) -> dict[str, Any]:
    """What a person or a program needs to name a cluster."""
    return {
        "cluster": cluster.id, "share": round(cluster.share, 4), "kind": cluster.kind,
        "words_of_tokens": [word.word for word in cluster.token_words],
        "words_of_documents": [word.word for word in cluster.document_words],
        "labels": {share.name: round(share.share, 3) for share in cluster.labels},
        "contexts": [context(clustered, row, pieces) for row in cluster.contexts],
    }


def context(clustered: Clustered, row: int, pieces: Pieces, window: int = CONTEXT_TOKENS) -> str:
    """The text around a token, which is put in double brackets."""
    folder = clustered.folder
    document = int(folder.document_of[row])
    first, last = int(folder.bounds[document]), int(folder.bounds[document + 1])
    texts = pieces.split(folder.tokens[first:last].tolist())
    place = row - first
    before, after = texts[max(0, place - window):place], texts[place + 1:place + 1 + window]
    return f"{''.join(before)}[[{texts[place]}]]{''.join(after)}"


def _asked(command: str, text: str) -> tuple[str, str]:
    try:
        found = subprocess.run(shlex.split(command), input=text, capture_output=True, text=True, timeout=TIMEOUT_S,
                               check=False)
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        raise SpecError(f"--label-command {command!r} cannot be run ({error}).") from None
    lines = [line.strip() for line in found.stdout.splitlines() if line.strip()]
    if found.returncode or not lines:
        said = (found.stderr.strip().splitlines() or ["it printed nothing"])[-1]
        raise SpecError(f"--label-command {command!r} gave no label ({said}); it must print one on its first line.")
    return lines[0], lines[1] if len(lines) > 1 else ""
