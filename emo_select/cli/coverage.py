"""`coverage`: which experts the documents of a topic use, layer by layer, as numbers and heat maps."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from emo_select.cli import clusters, common
from emo_select.cli.common import OUTPUT

if TYPE_CHECKING:
    from emo_select.analysis.coverage import Coverage

PANEL = "Analysis"
Kept = Annotated[bool, typer.Option("--published-threshold", rich_help_panel=OUTPUT, help=(
    "Count experts above 1/E in shares of tokens, too, as the published pictures do; k/E is the uniform share."))]
Order = Annotated[Path | None, typer.Option("--topic-order", rich_help_panel=OUTPUT,
                                            show_default="by entropy, the first model's",
                                            help="JSON list of topics in the order to draw.")]
Plot = Annotated[bool, typer.Option("--plot/--no-plot", help="Draw the heat maps (extra `plots`).",
                                    rich_help_panel=OUTPUT)]


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command(rich_help_panel=PANEL)(coverage)


def coverage(
    model: common.Models,
    texts: clusters.Source,
    per_label: clusters.PerLabel = 500,
    doc_tokens: clusters.DocTokens = 0,
    min_tokens: clusters.MinTokens = 1,
    label: clusters.Label = None,
    seed: clusters.SampleSeed = 42,
    scan: clusters.Scan = 100_000,
    num_examples: clusters.NumExamples = None,
    published_sampling: clusters.PublishedSampling = False,
    target_tokens: clusters.TargetTokens = 20_000_000,
    chunk_bytes: clusters.ChunkBytes = 2_000_000,
    bucket: clusters.Bucket = None,
    eos_id: clusters.EosId = None,
    published_threshold: Kept = False,
    topic_order: Order = None,
    plot: Plot = True,
    device: common.Device = "auto",
    dtype: common.Dtype = "auto",
    memory_budget: clusters.MemoryBudget = None,
    token_budget: clusters.TokenBudget = None,
    scratch: clusters.Scratch = None,
    data_dir: common.DataDir = None,
    out: clusters.Out = None,
    as_json: common.AsJson = False,
) -> None:
    """Which experts documents of each topic use: coverage, entropy, and how alike topics are, for several models.

    Documents are taken whole. Token files laid out as <topic>/vigintile_NNNN/*.npy with --published-sampling give the
    published WebOrganizer analysis.
    """
    from emo_select.analysis.tokenfiles import Published
    from emo_select.analysis.workflow import cover_all, coverage_folder

    published = Published(target_tokens, doc_tokens, seed=seed, chunk_bytes=chunk_bytes, evenly=True)
    asked = clusters.texts_of(texts, per_label, doc_tokens, min_tokens, label, seed, scan, num_examples, data_dir,
                              bucket, eos_id, published if published_sampling else None)
    options = clusters.options_of(device, dtype, memory_budget, token_budget, scratch)
    wanted = clusters.extraction(model, asked, out, False, options)
    folders = [coverage_folder(wanted, name) for name in wanted.models]
    if plot:
        _require_own_pictures(folders, wanted.out)
    done = cover_all(wanted)
    order = _order(done, topic_order)
    pictures = _pictures(done, order, wanted.out, published_threshold) if plot else []
    _show(done, order, pictures, published_threshold, as_json)


def _order(done: list[Coverage], file: Path | None) -> list[str]:
    from emo_select.analysis.coverageplots import shared_order
    from emo_select.errors import SpecError
    from emo_select.textfile import read_json

    if file is None:
        return shared_order(done)
    listed = read_json(file, SpecError)
    if not isinstance(listed, list):
        raise SpecError(f"{file} is not a list of topics.")
    return [str(topic) for topic in listed]


def _pictures(done: list[Coverage], order: list[str], out: Path, published_threshold: bool) -> list[Path]:
    from emo_select.analysis.coverageplots import draw_coverage, figure6

    drawn = [path for one in done for path in draw_coverage(one, _beside(one.path), order,
                                                            published_threshold=published_threshold)]
    return [*drawn, *(figure6(done, path, order) for path in _figures([one.path for one in done], out))]


def _beside(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}_pictures")


def _figures(folders: list[Path], out: Path) -> list[Path]:
    name = "figure6" if len(folders) > 1 else f"{folders[0].name}_topics"
    return [out / f"{name}.png", out / f"{name}.pdf"]


def _require_own_pictures(folders: list[Path], out: Path) -> None:
    """Raise `OwnershipError` where a picture would replace a file that is not ours."""
    from emo_select.analysis.coverageplots import picture_files
    from emo_select.ownership import require_own_files

    require_own_files(*_figures(folders, out), *(file for folder in folders for file in picture_files(_beside(folder))))


def _show(done: list[Coverage], order: list[str], pictures: list[Path], published: bool, as_json: bool) -> None:
    from emo_select.analysis.coverage import KINDS, heatmaps

    if as_json:
        common.emit({"topic_order": order, "pictures": [str(path) for path in pictures], "models": [
            {"model": one.info.model, "folder": str(one.path), "documents": len(one.documents), "heatmaps": {
                kind: heatmaps(one.topics(kind, published_threshold=published).ordered(order), kind)
                for kind in KINDS}} for one in done]})
        return
    for one in done:
        typer.echo(f"{one.info.model}: {len(one.documents):,} documents of {len(order)} topics ({one.path})")
        clusters.table(["MoE layer", "entropy (bits)", "experts above uniform", "cosine between topics"], _rows(one))
    for path in pictures:
        typer.echo(path)


def _rows(one: Coverage) -> list[list[str]]:
    """A row per MoE layer: means over topics of entropy, experts above the uniform probability, cosines of topics."""
    from emo_select.analysis.routingmeasures import mean_cosine

    topics, rows = one.topics("probs"), []
    for place, layer in enumerate(one.info.layers):
        cosine = mean_cosine(topics.vectors[place])
        rows.append([str(layer.layer), f"{topics.entropy[:, place].mean():.2f}",
                     f"{topics.above_uniform[:, place].mean():.1f} of {layer.experts}",
                     "—" if cosine != cosine else f"{cosine:.2f}"])
    return rows
