"""`clusters`: what the experts know, from texts to token clusters, their words and numbers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from emo_select import progress
from emo_select.cli import common
from emo_select.cli.common import MACHINE, OUTPUT

if TYPE_CHECKING:
    from emo_select.analysis.fit import Fitting
    from emo_select.analysis.layout import ModelFolder
    from emo_select.analysis.sources import Texts
    from emo_select.analysis.workflow import Analysed, Extraction
    from emo_select.experts import StreamOptions

PANEL = "Analysis"
TEXTS, FITS = "Texts", "Clusters"
PAGE = "clusters.html"

Source = Annotated[str, typer.Option("--texts", rich_help_panel=TEXTS, help=(
    "Folder or URL of token files or of .jsonl, .parquet, .txt (also .gz, .zst); a published mix; hf:DATASET; "
    "task:NAME; demo."))]
PerLabel = Annotated[int, typer.Option("--per-label", min=0, rich_help_panel=TEXTS,
                                       help="At most so many documents of each label; 0 takes all.")]
DocTokens = Annotated[int, typer.Option("--doc-tokens", min=0, rich_help_panel=TEXTS,
                                        help="Tokens of each document; 0 takes documents whole.")]
MinTokens = Annotated[int, typer.Option("--min-tokens", min=1, rich_help_panel=TEXTS,
                                        help="Shorter documents are left out.")]
Label = Annotated[str | None, typer.Option("--label", show_default="topic, format or source", rich_help_panel=TEXTS,
                                           help="Which label of the documents to go by.")]
SampleSeed = Annotated[int, typer.Option("--seed", min=0, help="Seed of the draw of documents.",
                                         rich_help_panel=TEXTS)]
Scan = Annotated[int, typer.Option("--scan", min=1, rich_help_panel=TEXTS,
                                   help="Documents of rows that are looked at, at most.")]
NumExamples = Annotated[int | None, typer.Option("--num-examples", "-n", min=1, show_default="all",
                                                 help="Texts to draw from a task.", rich_help_panel=TEXTS)]
PublishedSampling = Annotated[bool, typer.Option(
    "--published-sampling", rich_help_panel=TEXTS,
    help="Draw from token files as the published scripts do, document for document.")]
TargetTokens = Annotated[int, typer.Option("--target-tokens", min=1, rich_help_panel=TEXTS,
                                           help="With --published-sampling: its target.")]
ChunkBytes = Annotated[int, typer.Option("--chunk-bytes", min=4, rich_help_panel=TEXTS,
                                         help="With --published-sampling: bytes read at a time.")]
Bucket = Annotated[str | None, typer.Option("--bucket", rich_help_panel=TEXTS,
                                            help="Folder or URL that stands for s3://ai2-llm in published lists.")]
EosId = Annotated[int | None, typer.Option("--eos-id", min=0, show_default="the model's", rich_help_panel=TEXTS,
                                           help="Token that ends a document in token files.")]
Logits = Annotated[bool, typer.Option("--logits", help="Keep router logits, too (twice the size).",
                                      rich_help_panel=OUTPUT)]
Out = Annotated[Path | None, typer.Option("--out", rich_help_panel=OUTPUT,
                                          show_default="cluster_eval_final/<texts>, or below CLUSTER_ROOT",
                                          help="Folder for the models' folders.")]
Published = Annotated[Path | None, typer.Option("--published-layout", metavar="FOLDER", rich_help_panel=OUTPUT,
                                                help="Write the published files as well, below this folder.")]
MemoryBudget = Annotated[str | None, typer.Option(
    "--memory-budget", show_default="half of the free memory", rich_help_panel=MACHINE,
    help="Memory for hidden states, such as 8GB; the rest goes to a scratch file.")]
TokenBudget = Annotated[int | None, typer.Option("--token-budget", min=1, show_default="suits the device",
                                                 help="Tokens per batch.", rich_help_panel=MACHINE)]
Scratch = Annotated[Path | None, typer.Option("--scratch", show_default="the system's", rich_help_panel=MACHINE,
                                              help="Folder of the scratch file.")]
Embedding = Annotated[str, typer.Option("--embedding", rich_help_panel=FITS, help=(
    "probs, topk, logits, layerN_probs; of documents: doc_probs, doc_topk_freq, doc_logits, doc_layerN_probs."))]
Preprocess = Annotated[str, typer.Option("--preprocess", help="identity, l2, mean_pca or mean_pca_l2.",
                                         rich_help_panel=FITS)]
Method = Annotated[str, typer.Option("--method", help="spherical_kmeans, kmeans, hierarchical or gmm.",
                                     rich_help_panel=FITS)]
Ks = Annotated[list[str], typer.Option("--k", help="Numbers of clusters, such as 16,32,64.", rich_help_panel=FITS)]
Restarts = Annotated[int, typer.Option("--restarts", min=1, help="Of k-means; the best is kept.",
                                       rich_help_panel=FITS)]
FitSeed = Annotated[int, typer.Option("--fit-seed", min=0, help="Seed of the clustering.", rich_help_panel=FITS)]
Engine = Annotated[str, typer.Option("--engine", help="torch, or faiss (extra `analysis`).", rich_help_panel=FITS)]
BalanceBy = Annotated[str | None, typer.Option("--balance-by", rich_help_panel=FITS, show_default="all rows",
                                               help="A label; as many rows of each of its values.")]
BalanceN = Annotated[int | None, typer.Option("--balance-n", min=1, show_default="as many as the smallest has",
                                              rich_help_panel=FITS, help="At most so many rows of each value.")]
LabelCommand = Annotated[str | None, typer.Option(
    "--label-command", rich_help_panel=FITS,
    help="Program that reads a cluster's summary (JSON) and prints a label, then maybe a category.")]
Root = Annotated[Path, typer.Argument(help="A model's folder, or the folder above several (the --out of extract).")]
Fits = Annotated[list[str] | None, typer.Option("--fit", show_default="all", help="Name of a fit.",
                                                rich_help_panel=FITS)]


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    group = typer.Typer(no_args_is_help=True, help=(
        "Cluster tokens by the experts they use, say what the clusters are, and measure it."))
    for command in (run, extract, fit, label, page, figure, demo):
        group.command()(command)
    app.add_typer(group, name="clusters", rich_help_panel=PANEL)


def run(
    model: common.Models,
    texts: Source,
    k: Ks = ["32"],  # noqa: B006 - typer copies it
    per_label: PerLabel = 500,
    doc_tokens: DocTokens = 100,
    min_tokens: MinTokens = 1,
    label: Label = None,
    seed: SampleSeed = 42,
    scan: Scan = 100_000,
    num_examples: NumExamples = None,
    published_sampling: PublishedSampling = False,
    target_tokens: TargetTokens = 1_000_000,
    chunk_bytes: ChunkBytes = 2_000_000,
    bucket: Bucket = None,
    eos_id: EosId = None,
    embedding: Embedding = "probs",
    preprocess: Preprocess = "mean_pca_l2",
    method: Method = "spherical_kmeans",
    restarts: Restarts = 8,
    fit_seed: FitSeed = 42,
    engine: Engine = "torch",
    balance_by: BalanceBy = None,
    balance_n: BalanceN = None,
    label_command: LabelCommand = None,
    device: common.Device = "auto",
    dtype: common.Dtype = "auto",
    memory_budget: MemoryBudget = None,
    token_budget: TokenBudget = None,
    scratch: Scratch = None,
    data_dir: common.DataDir = None,
    out: Out = None,
    published_layout: Published = None,
    dry_run: common.DryRun = False,
    as_json: common.AsJson = False,
) -> None:
    """All of it, for one model or several: extract, fit, label, and the numbers side by side."""
    asked = texts_of(texts, per_label, doc_tokens, min_tokens, label, seed, scan, num_examples, data_dir, bucket,
                     eos_id, _published(published_sampling, target_tokens, doc_tokens, seed, chunk_bytes))
    wanted = extraction(model, asked, out, _needs_logits(embedding, published_layout),
                         options_of(device, dtype, memory_budget, token_budget, scratch))
    fitting = _fitting(embedding, preprocess, method, k, restarts, fit_seed, engine, balance_by, balance_n)
    fitting.check()
    common.only_process(None)
    if dry_run:
        _show_plan(wanted, as_json)
        return
    _finish(wanted, fitting, label_command, published_layout, as_json)


def extract(
    model: common.Models,
    texts: Source,
    per_label: PerLabel = 500,
    doc_tokens: DocTokens = 100,
    min_tokens: MinTokens = 1,
    label: Label = None,
    seed: SampleSeed = 42,
    scan: Scan = 100_000,
    num_examples: NumExamples = None,
    published_sampling: PublishedSampling = False,
    target_tokens: TargetTokens = 1_000_000,
    chunk_bytes: ChunkBytes = 2_000_000,
    bucket: Bucket = None,
    eos_id: EosId = None,
    logits: Logits = False,
    device: common.Device = "auto",
    dtype: common.Dtype = "auto",
    memory_budget: MemoryBudget = None,
    token_budget: TokenBudget = None,
    scratch: Scratch = None,
    data_dir: common.DataDir = None,
    out: Out = None,
    published_layout: Published = None,
    dry_run: common.DryRun = False,
    as_json: common.AsJson = False,
) -> None:
    """Stream documents through models, one layer in memory, and store what every router says.

    A killed extraction goes on after the last finished layer when the same command is given again. torchrun shares the
    documents among its processes.
    """
    asked = texts_of(texts, per_label, doc_tokens, min_tokens, label, seed, scan, num_examples, data_dir, bucket,
                     eos_id, _published(published_sampling, target_tokens, doc_tokens, seed, chunk_bytes))
    wanted = extraction(model, asked, out, logits or published_layout is not None,
                         options_of(device, dtype, memory_budget, token_budget, scratch))
    if dry_run:
        _show_plan(wanted, as_json)
        return
    from emo_select.analysis.workflow import extract_all

    folders = extract_all(wanted)
    if common.is_first():
        _write_published([(folder, []) for folder in folders], published_layout)
    _say_folders(folders, as_json)


def fit(
    folder: Root,
    k: Ks = ["32"],  # noqa: B006 - typer copies it
    embedding: Embedding = "probs",
    preprocess: Preprocess = "mean_pca_l2",
    method: Method = "spherical_kmeans",
    restarts: Restarts = 8,
    fit_seed: FitSeed = 42,
    engine: Engine = "torch",
    balance_by: BalanceBy = None,
    balance_n: BalanceN = None,
    published_layout: Published = None,
    as_json: common.AsJson = False,
) -> None:
    """Cluster what was extracted, for several k in one go, with the stability of each."""
    from emo_select.analysis.workflow import fit_all, folders_at

    fitting = _fitting(embedding, preprocess, method, k, restarts, fit_seed, engine, balance_by, balance_n)
    done = fit_all(folders_at(folder), fitting)
    _write_published([(one.folder, one.fits) for one in done], published_layout)
    if as_json:
        common.emit([{"model": one.folder.info.model, "folder": str(fit.path), **fit.info.model_dump(mode="json")}
                     for one in done for fit in one.fits])
        return
    for one in done:
        _show_fits(one)


def label(
    folder: Root,
    fit: Fits = None,
    label_command: LabelCommand = None,
    published_layout: Published = None,
    as_json: common.AsJson = False,
) -> None:
    """Say what clusters and experts are: words, kinds, names, and numbers with a null and an interval.

    Names go to labels.yaml beside each fit; what you change there is kept.
    """
    from emo_select.analysis.workflow import Analysed, folders_at, label_all

    chosen = [Analysed(one, [one.fit(name) for name in common.listed(fit or [])]) for one in folders_at(folder)]
    done = label_all(chosen, label_command)
    _write_published([(one.folder, one.fits) for one in done], published_layout)
    _show_results(done, as_json)


def page(
    folder: Annotated[list[Path], typer.Argument(help="Models' folders, or the folder above them.")],
    fit: Annotated[str | None, typer.Option("--fit", show_default="the one with the most clusters",
                                            rich_help_panel=FITS, help="Name of the fit to show.")] = None,
    keep_sets: Annotated[list[Path] | None, typer.Option(
        "--keep-sets", help="selection.json files or folders above them: which clusters lose experts.",
        rich_help_panel=FITS)] = None,
    title: Annotated[str, typer.Option("--title", help="Heading of the page.",
                                       rich_help_panel=OUTPUT)] = "What the experts know",
    out: Annotated[Path | None, typer.Option("--out", show_default="clusters.html above the models", help="The file.",
                                             rich_help_panel=OUTPUT)] = None,
) -> None:
    """Write a page that opens from disk: clusters, documents, tokens and experts of one model or several."""
    from emo_select.analysis.page import write_page
    from emo_select.analysis.workflow import folders_at

    folders = [one.path for path in folder for one in folders_at(path)]
    typer.echo(write_page(folders, out or folders[0].parent / PAGE, fit, keep_sets=keep_sets or (), title=title))


def figure(
    folder: Annotated[list[Path], typer.Argument(help="Models' folders, or the folder above them.")],
    fit: Annotated[str | None, typer.Option("--fit", show_default="the one with the most clusters",
                                            rich_help_panel=FITS, help="Name of the fit to show.")] = None,
    document: Annotated[int | None, typer.Option("--document", min=0, rich_help_panel=TEXTS, show_default="chosen",
                                                 help="Number of the document to show.")] = None,
    out: Annotated[Path | None, typer.Option("--out", show_default="the folder above the models", help="Folder.",
                                             rich_help_panel=OUTPUT)] = None,
) -> None:
    """Draw Figure 5 as PDF and PNG: the largest clusters, and a document coloured by them."""
    from emo_select.analysis.figure5 import draw_figure5
    from emo_select.analysis.workflow import folders_at

    folders = [one.path for path in folder for one in folders_at(path)]
    files, shown = draw_figure5(folders, out or folders[0].parent, fit, document=document)
    progress.say(f"It shows document {shown}.")
    for file in files:
        typer.echo(file)


def demo(
    out: Annotated[Path | None, typer.Option("--out", show_default="cluster_eval_final/demo", rich_help_panel=OUTPUT,
                                             help="Folder for the result.")] = None,
    as_json: common.AsJson = False,
) -> None:
    """The shipped pair of tiny models on the demo's eight domains: offline, in two minutes."""
    from emo_select.analysis.sources import Texts

    texts = Texts("demo")
    wanted = extraction(["demo/emo,demo/stdmoe"], texts, out, False, None)
    _finish(wanted, _fitting("probs", "mean_pca_l2", "spherical_kmeans", ["16"], 8, 42, "torch", None, None), None,
            None, as_json)


# ---- what was asked


def texts_of(source: str, per_label: int, doc_tokens: int, min_tokens: int, label: str | None, seed: int, scan: int,
           num_examples: int | None, data_dir: str | None, bucket: str | None, eos: int | None, published: Any
           ) -> Texts:
    """Which texts were asked for."""
    from emo_select.analysis.corpus import Sampling
    from emo_select.analysis.sources import Texts

    sampling = Sampling(per_label or None, doc_tokens, min_tokens, seed, scan)
    return Texts(source, sampling, published, bucket, eos, label, num_examples, data_dir)


def _published(asked: bool, target_tokens: int, doc_tokens: int, seed: int, chunk_bytes: int) -> Any:
    from emo_select.analysis.tokenfiles import Published

    return Published(target_tokens, doc_tokens, seed=seed, chunk_bytes=chunk_bytes) if asked else None


def options_of(device: str, dtype: str, memory_budget: str | None, token_budget: int | None, scratch: Path | None
             ) -> StreamOptions:
    """How the pass is to run."""
    from emo_select.experts import StreamOptions

    return StreamOptions(device, dtype, memory_budget, token_budget, scratch)


def extraction(models: list[str], texts: Texts, out: Path | None, logits: bool, options: StreamOptions | None
                ) -> Extraction:
    """Which models see which texts, and where the result goes."""
    import os

    from emo_select.analysis.layout import DEFAULT_ROOT, ROOT_VARIABLE
    from emo_select.analysis.workflow import Extraction, texts_name

    root = Path(os.environ.get(ROOT_VARIABLE) or DEFAULT_ROOT)
    return Extraction(common.listed(models), texts, out or root / texts_name(texts), logits, options)


def _needs_logits(embedding: str, published_layout: Path | None) -> bool:
    return "logits" in embedding or published_layout is not None


def _fitting(embedding: str, preprocess: str, method: str, k: list[str], restarts: int, seed: int, engine: str,
             balance_by: str | None, balance_n: int | None) -> Fitting:
    from emo_select.analysis.fit import Fitting
    from emo_select.errors import SpecError

    listed = common.listed(k)
    if not all(one.isdigit() for one in listed):
        raise SpecError(f"--k is whole numbers such as 16,32,64, not {', '.join(listed)!r}.")
    return Fitting(embedding, preprocess, method, tuple(dict.fromkeys(map(int, listed))), seed, restarts, engine,
                   balance_by=balance_by, balance_n=balance_n)


def _finish(wanted: Extraction, fitting: Fitting, label_command: str | None, published_layout: Path | None,
            as_json: bool) -> None:
    """Extract, fit, label, and show the numbers."""
    from emo_select.analysis.workflow import extract_all, fit_all, label_all
    from emo_select.ownership import require_own_files

    require_own_files(wanted.out / PAGE)
    done = label_all(fit_all(extract_all(wanted), fitting), label_command)
    _write_published([(one.folder, one.fits) for one in done], published_layout)
    _show_results(done, as_json, _page_of(done))


def _page_of(done: Sequence[Analysed]) -> Path:
    """The page about what was fitted with the most clusters."""
    from emo_select.analysis.page import write_page

    folders = [one.folder.path for one in done]
    largest = max(done[0].fits, key=lambda fit: fit.info.k).name
    return write_page(folders, folders[0].parent / PAGE, largest)


def _write_published(done: Sequence[tuple[ModelFolder, list[Any]]], target: Path | None) -> None:
    from emo_select.analysis.published import write_published

    if target is not None:
        for folder, fits in done:
            write_published(folder, fits, target / folder.path.name)


# ---- what is shown


def _show_plan(wanted: Extraction, as_json: bool) -> None:
    from emo_select.analysis.workflow import plan

    planned = plan(wanted)
    if as_json:
        common.emit([{"model": one.info.model, "folder": str(one.folder), "documents": one.info.documents,
                      "tokens": one.info.tokens, "layers": len(one.info.layers), "bytes": one.bytes,
                      "done": one.done} for one in planned])
        return
    for one in planned:
        typer.echo(f"{one.info.model}: {'there already' if one.done else 'to extract'}, {one.info.documents:,} "
                   f"documents, {one.info.tokens:,} tokens, {len(one.info.layers)} MoE layers, "
                   f"{one.bytes / 1e6:,.1f} MB")
        typer.echo(f"  {one.folder}")


def _say_folders(folders: Sequence[ModelFolder], as_json: bool) -> None:
    if not common.is_first():
        return
    if as_json:
        common.emit([{"folder": str(one.path), **one.info.model_dump(mode="json")} for one in folders])
        return
    for one in folders:
        typer.echo(one.path)


def _show_fits(one: Analysed) -> None:
    from emo_select.analysis.fit import SWEEP_HEADER, sweep_table

    typer.echo(f"{one.folder.info.model} ({one.folder.path})")
    table(list(SWEEP_HEADER), sweep_table(one.fits))


def _show_results(done: Sequence[Analysed], as_json: bool, place: Path | None = None) -> None:
    if as_json:
        common.emit({"page": str(place) if place else None, "models": [
            {"model": one.folder.info.model, "folder": str(one.folder.path),
             "measures": [measure.model_dump(mode="json") for measure in one.folder.measures],
             "fits": [_fit_data(fit) for fit in one.fits]} for one in done]})
        return
    for name in dict.fromkeys(fit.name for one in done for fit in one.fits):
        having = [one for one in done if any(fit.name == name for fit in one.fits)]
        for one in having:
            _show_clusters(one, name)
        _show_measures(having, name)
    if place:
        typer.echo(place)


def _fit_data(fit: Any) -> dict[str, Any]:
    names = fit.names
    return {"fit": fit.name, "folder": str(fit.path),
            "measures": [measure.model_dump(mode="json") for measure in fit.measures],
            "clusters": [{"id": cluster.id, "label": names[cluster.id].label, "kind": cluster.kind,
                          "share": cluster.share} for cluster in fit.clusters]}


MOST_CLUSTERS = 12


def _show_clusters(one: Analysed, name: str) -> None:
    fit = one.folder.fit(name)
    typer.echo(f"{one.folder.info.model}: {fit.name}")
    rows = [[f"{cluster.share:.1%}", cluster.kind, _number(cluster.survival), fit.names[cluster.id].label,
             ", ".join(f"{share.name} {share.share:.0%}" for share in cluster.labels[:1])]
            for cluster in fit.clusters[:MOST_CLUSTERS]]
    table(["share", "kind", "stable", "words", "mostly"], rows)
    if len(fit.clusters) > MOST_CLUSTERS:
        typer.echo(f"  … and {len(fit.clusters) - MOST_CLUSTERS} more in {fit.path.name}/clusters.json")


def _show_measures(done: Sequence[Analysed], name: str) -> None:
    """A row per number: what it is, then for each model value, half the 95 % interval, and in brackets the null."""
    from emo_select.analysis.workflow import comparison

    rows = [[first.about, *(_cell(one) for one in each)] for first, each in
            comparison([one.folder for one in done], name)]
    table(["", *(f"{one.folder.path.name} (null)" for one in done)], rows)


def _cell(one: Any) -> str:
    if one is None:
        return "—"
    interval = "" if one.low is None else f" ±{(one.high - one.low) / 2:.2f}"
    return f"{_short(one.value)}{interval}" + ("" if one.null is None else f" ({_short(one.null)})")


def _short(value: float) -> str:
    return f"{round(value, 2) + 0.0:.2f}"  # no minus before a zero


def table(header: list[str], rows: list[list[str]]) -> None:
    """Aligned columns; at 80 columns long texts are wrapped, never cut."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in header:
        table.add_column(Text(name), overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    Console(soft_wrap=False).print(table)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
