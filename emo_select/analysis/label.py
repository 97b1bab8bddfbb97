"""The last step of an analysis: words, kinds, names, experts and numbers of what was clustered."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from emo_select import progress
from emo_select.analysis.clustermeasures import cluster_measures
from emo_select.analysis.describe import Clustered, describe_clusters
from emo_select.analysis.expertviews import expert_views
from emo_select.analysis.layout import FitFolder, ModelFolder, is_made_from, read_names, write_list
from emo_select.analysis.naming import name_clusters
from emo_select.analysis.routingmeasures import routing_measures
from emo_select.analysis.words import Pieces, TokenWords, token_words, tokenizer_of
from emo_select.errors import SpecError


class Labelling:
    """Makes what is missing or older than what it is made from."""

    def __init__(self, folder: ModelFolder) -> None:
        self.folder = folder

    @cached_property
    def pieces(self) -> Pieces:
        """Text of the model's tokens."""
        tokenizer = tokenizer_of(self.folder.info)
        if tokenizer is None:
            progress.say(f"There is no tokenizer for {self.folder.info.model}; tokens are shown as numbers.")
        return Pieces(tokenizer)

    @cached_property
    def words(self) -> TokenWords:
        """Words of all tokens."""
        return token_words(self.folder, self.pieces.tokenizer)

    def model(self) -> None:
        """experts.json and metrics.json of the model."""
        made_from = self.folder.info.fingerprint
        if not is_made_from(self.folder.path / "experts.json", made_from):
            write_list(self.folder.path / "experts.json", expert_views(self.folder, self.words), made_from)
        if not is_made_from(self.folder.path / "metrics.json", made_from):
            write_list(self.folder.path / "metrics.json", routing_measures(self.folder), made_from)

    def fit(self, fit: FitFolder, command: str | None = None) -> None:
        """clusters.json, metrics.json and labels.yaml of a fit."""
        require_same(self.folder, fit)
        clustered, made_from = Clustered(self.folder, fit, self.words), fit.info.fingerprint
        if not is_made_from(fit.path / "clusters.json", made_from):
            write_list(fit.path / "clusters.json", describe_clusters(clustered), made_from)
        if not is_made_from(fit.path / "metrics.json", made_from):
            write_list(fit.path / "metrics.json", cluster_measures(clustered), made_from)
        if command is not None or not (fit.path / "labels.yaml").exists():
            name_clusters(clustered, FitFolder(fit.path).clusters, self.pieces, command)
        read_names(fit.path, fit.info.k)  # what was edited can be read


def label(folder: ModelFolder, fits: Sequence[FitFolder] | None = None, command: str | None = None) -> list[FitFolder]:
    """Describe, measure and name `fits` (all that there are by default) and the model's experts.

    Raises:
        SpecError: there is no fit, or one was made from other columns than those that are there now.
    """
    chosen = folder.fits() if fits is None else list(fits)
    if not chosen:
        raise SpecError(f"{folder.path} has no fit to label; run `emo-select clusters fit` first.")
    work = Labelling(folder)
    work.model()
    for fit in chosen:
        work.fit(fit, command)
    return [FitFolder(fit.path) for fit in chosen]


def require_same(folder: ModelFolder, fit: FitFolder) -> None:
    """SpecError where a fit belongs to an earlier extraction."""
    if fit.info.routing_fingerprint != folder.info.fingerprint:
        raise SpecError(f"{fit.path} was made from other columns than {folder.routing} holds now; fit it again with "
                        "`emo-select clusters fit`.")
