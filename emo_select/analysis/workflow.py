"""An analysis from texts to numbers, for one model or several, and what it would take."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emo_select.analysis.corpus import Corpus, say_taken
from emo_select.analysis.fit import Fitting, fit
from emo_select.analysis.label import label
from emo_select.analysis.layout import FitFolder, Measure, ModelFolder, RoutingInfo, model_folders
from emo_select.analysis.sources import TASK, Texts, read_corpus
from emo_select.errors import SpecError
from emo_select.spec import model_directory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from emo_select.analysis.coverage import Coverage
    from emo_select.checkpoint import Checkpoint
    from emo_select.experts import StreamOptions


@dataclass(frozen=True)
class Extraction:
    """Which models see which texts, and where the result goes.

    Attributes:
        models: Hub ids, folders or demo/NAME; they must cut texts into the same tokens.
        out: parent of the models' folders.
        logits: keep router logits beside the probabilities.
    """

    models: Sequence[str]
    texts: Texts
    out: Path
    logits: bool = False
    options: StreamOptions | None = None

    def folder(self, model: str) -> Path:
        """Where a model's part lies: a folder named by the last two parts of its name or path, as published."""
        return self.out / model_directory("/".join(Path(model).parts[-2:]))

    @cached_property
    def checkpoints(self) -> dict[str, Checkpoint]:
        """The models, opened. ModelError, SpecError where they have no routers or other tokenizers."""
        from emo_select.analysis.routing import layer_infos, require_same_tokenizer, tokenizer_fingerprint
        from emo_select.checkpoint import open_checkpoint

        if not self.models:
            raise SpecError("There is no model to analyse; name one with --model.")
        opened = {model: open_checkpoint(model) for model in self.models}
        for checkpoint in opened.values():
            layer_infos(checkpoint.config)
        require_same_tokenizer([(model, tokenizer_fingerprint(one.directory)) for model, one in opened.items()])
        return opened

    @cached_property
    def corpus(self) -> Corpus:
        """The documents in the tokens of the models."""
        model, checkpoint = next(iter(self.checkpoints.items()))
        found = read_corpus(self.texts, _tokenizer(model, checkpoint), _end_token(checkpoint.config))
        published, sampling = self.texts.published, self.texts.sampling
        say_taken(found, None if published else sampling.per_label,
                  published.doc_tokens if published else sampling.doc_tokens)
        return found


@dataclass(frozen=True)
class Planned:
    """What an extraction of one model would do."""

    info: RoutingInfo
    folder: Path
    bytes: int
    done: bool


@dataclass(frozen=True)
class Analysed:
    """A model's folder and its fits."""

    folder: ModelFolder
    fits: list[FitFolder] = field(default_factory=list)


def texts_name(texts: Texts) -> str:
    """Folder name of a set of texts; "pretraining" for the published sampler, as published."""
    if texts.published is not None:
        return "weborganizer" if texts.published.evenly else "pretraining"
    bare = texts.source.removeprefix(TASK).rstrip("/").rpartition("/")[2]
    return re.sub(r"[^A-Za-z0-9_-]+", "-", bare.split(".")[0]).strip("-") or "texts"


def plan(wanted: Extraction) -> list[Planned]:
    """Reads texts and headers, no weights."""
    from emo_select.analysis.routing import describe, extracted_bytes, is_extracted
    from emo_select.experts import StreamOptions

    found = []
    for model, checkpoint in wanted.checkpoints.items():
        info = describe(checkpoint, wanted.corpus, model, wanted.options or StreamOptions(), logits=wanted.logits)
        done = is_extracted(wanted.folder(model), info)
        found.append(Planned(info, wanted.folder(model), extracted_bytes(info), done))
    return found


def extract_all(wanted: Extraction) -> list[ModelFolder]:
    """Extract every model; those that are there already are left alone.

    Raises:
        SpecError: models with different tokenizers, a folder with the routing of other texts; before any work.
    """
    from emo_select.analysis.routing import extract

    plan(wanted)
    for model, checkpoint in wanted.checkpoints.items():
        extract(checkpoint, wanted.corpus, model, wanted.folder(model), logits=wanted.logits, options=wanted.options)
    return [ModelFolder(wanted.folder(model)) for model in wanted.checkpoints]


def _tokenizer(model: str, checkpoint: Checkpoint) -> PreTrainedTokenizerBase | None:
    from emo_select.analysis.routing import tokenizer_fingerprint
    from emo_select.models import load_tokenizer

    return load_tokenizer(model) if tokenizer_fingerprint(checkpoint.directory) else None


def _end_token(config: dict[str, Any]) -> int | None:
    found = config.get("eos_token_id")
    first = found[0] if isinstance(found, list) and found else found
    return first if isinstance(first, int) else None


def cover_all(wanted: Extraction) -> list[Coverage]:
    """Collect the topic coverage of every model below `<out>/<model>_coverage`."""
    from emo_select.analysis.coverage import collect

    return [collect(checkpoint, wanted.corpus, model, coverage_folder(wanted, model), wanted.options)
            for model, checkpoint in wanted.checkpoints.items()]


def coverage_folder(wanted: Extraction, model: str) -> Path:
    """Where the topic coverage of a model lies."""
    return wanted.out / f"{wanted.folder(model).name}_coverage"


def fit_all(folders: Sequence[ModelFolder], wanted: Fitting) -> list[Analysed]:
    """Cluster every model's routing."""
    return [Analysed(folder, fit(folder, wanted)) for folder in folders]


def label_all(analysed: Sequence[Analysed], command: str | None = None) -> list[Analysed]:
    """Describe, name and measure."""
    return [Analysed(ModelFolder(one.folder.path), label(one.folder, one.fits or None, command)) for one in analysed]


def folders_at(path: Path) -> list[ModelFolder]:
    """The model folder `path`, or those right below it."""
    return [ModelFolder(path)] if (path / "routing" / "info.json").exists() else model_folders(path)


def comparison(folders: Sequence[ModelFolder], fit_name: str) -> list[tuple[Measure, list[Measure | None]]]:
    """Measures that are of no single layer, side by side: (the first model's, each model's or None)."""
    from emo_select.analysis.clustermeasures import headline

    each = [{one.name: one for one in headline([*folder.fit(fit_name).measures, *folder.measures])}
            for folder in folders]
    names = list(dict.fromkeys(name for measures in each for name in measures))
    return [(next(measures[name] for measures in each if name in measures), [one.get(name) for one in each])
            for name in names]
