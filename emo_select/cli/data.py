"""`tokenize` and `mix`: texts become the token files that trainings read, and those are checked."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from emo_select.cli import common
from emo_select.cli.common import MACHINE, OUTPUT, RUN


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command(rich_help_panel="Pretraining")(tokenize)
    app.command(rich_help_panel="Pretraining")(mix)


def tokenize(
    sources: Annotated[list[str], typer.Argument(
        metavar="TEXTS", help="Files (.jsonl, .json.gz, .jsonl.zst, .parquet, .txt), folders of them, or hf:ID.")],
    out: Annotated[Path, typer.Option("--out", help="Folder of the token files.", rich_help_panel=OUTPUT)],
    tokenizer: Annotated[str, typer.Option("--tokenizer", help="Folder, Hub id or demo/NAME.", rich_help_panel=RUN)],
    train_tokenizer: Annotated[int | None, typer.Option(
        "--train-tokenizer", metavar="SIZE", show_default="use what is there", rich_help_panel=RUN,
        help="First make a tokenizer of this many tokens from the texts, in the folder --tokenizer.")] = None,
    field: Annotated[str, typer.Option("--field", help="Where the text is in JSON lines, parquet and Hub data sets.",
                                       rich_help_panel=RUN)] = "text",
    lines: Annotated[bool, typer.Option("--lines", help="Each line of a plain text file is a document.",
                                        rich_help_panel=RUN)] = False,
    label: Annotated[str, typer.Option("--label", help="In the mix list.", rich_help_panel=OUTPUT)] = "text",
    limit: Annotated[int | None, typer.Option("--limit", min=1, show_default="all",
                                              help="Documents per file or data set.", rich_help_panel=RUN)] = None,
    config: Annotated[str | None, typer.Option("--config", show_default="default", rich_help_panel=RUN,
                                               help="Configuration of a Hub data set.")] = None,
    split: Annotated[str, typer.Option("--split", help="Split of a Hub data set.", rich_help_panel=RUN)] = "train",
    chunk_tokens: Annotated[int, typer.Option("--tokens-per-file", min=1, rich_help_panel=OUTPUT,
                                              help="A token file ends once it has so many.")] = 1 << 28,
    workers: Annotated[int | None, typer.Option("--workers", min=1, show_default="one per core",
                                                help="Processes, at most one per file.",
                                                rich_help_panel=MACHINE)] = None,
    dry_run: common.DryRun = False,
    as_json: common.AsJson = False,
) -> None:
    """Make the token files that `pretrain` reads from texts, with a manifest and a mix list.

    Numbers are stored raw, little-endian, in the smallest unsigned type; an end-of-text token follows each document.
    An interrupted call goes on after the last whole file.
    """
    from emo_select.errors import SpecError
    from emo_select.pretrain.texts import find_sources
    from emo_select.pretrain.tokenize import Options, estimate

    if "," in label or "\n" in label:
        raise SpecError(f"The label {label!r} has a comma or a line break in it, which a mix list cannot hold.")
    found = find_sources(sources, config, split)
    options = Options(field, label, lines, limit, chunk_tokens, workers)
    if dry_run:
        _report_plan(estimate(found, tokenizer, train_tokenizer), as_json=as_json)
        return
    _report(_made(found, out, tokenizer, train_tokenizer, options), out, as_json=as_json)


def _made(sources: list[Any], out: Path, tokenizer: str, size: int | None, options: Any) -> dict[str, Any]:
    from emo_select.pretrain.own_tokenizer import train_tokenizer
    from emo_select.pretrain.tokenize import tokenize as make

    if size is not None:
        train_tokenizer(sources, Path(tokenizer), size, field=options.field, lines=options.lines)
    return make(sources, out, tokenizer, options)


def _report_plan(plan: dict[str, Any], *, as_json: bool) -> None:
    from emo_select.progress import say

    if as_json:
        common.emit(plan)
        return
    hub = f" and {plan['hub_sources']} data sets on the Hub, of unknown size" if plan["hub_sources"] else ""
    say(f"Would read {plan['sources'] - plan['hub_sources']} files ({common.size(plan['text_bytes'])} as they lie)"
        f"{hub}: about {plan['tokens_about']:,} tokens, {common.size(plan['bytes_about'])} as {plan['dtype']}; packed "
        "files hold several times as many.")


def _report(manifest: dict[str, Any], out: Path, *, as_json: bool) -> None:
    from emo_select.progress import say

    if as_json:
        common.emit({**{key: value for key, value in manifest.items() if key != "made_from"}, "directory": str(out)})
        return
    files = len(manifest["files"])
    empty = f", {manifest['empty_documents']:,} empty ones left out" if manifest["empty_documents"] else ""
    say(f"{out}: {manifest['tokens']:,} tokens of {manifest['documents']:,} documents in {files} "
        f"file{'s' if files > 1 else ''} ({manifest['dtype']}, vocabulary {manifest['vocab_size']:,}){empty}.")


def mix(
    data: Annotated[Path, typer.Argument(metavar="MIX", help="A list of `label,path` lines, a folder that `tokenize` "
                                                             "wrote, or a token file.")],
    root: Annotated[Path | None, typer.Option("--data-root", show_default="where the list lies",
                                              help="Where its paths begin.", rich_help_panel=RUN)] = None,
    tokenizer: Annotated[str | None, typer.Option(
        "--tokenizer", show_default="the manifest's", rich_help_panel=RUN,
        help="Folder, Hub id or demo/NAME; also takes the place of {TOKENIZER} in paths.")] = None,
    checksums: Annotated[bool, typer.Option("--checksums", help="Read every byte and compare with the manifests.",
                                            rich_help_panel=RUN)] = False,
    as_json: common.AsJson = False,
) -> None:
    """Check the token files of a mix as a training would, and show what share each label has."""
    from emo_select.pretrain.tokens import read_mix, shares, verify

    found = read_mix(data, root, tokenizer)
    checked = verify(found) if checksums else None
    counted = shares(found)
    if as_json:
        common.emit({"labels": counted, "files": len(found.files), "tokens": found.tokens, "dtype": found.dtype,
                     "vocab_size": found.vocab_size, "eos_token_id": found.eos_token_id,
                     "fingerprint": found.fingerprint, "checksums": checked})
        return
    _show_shares(counted, found.tokens)
    if checked is not None:
        _say_checked(checked, len(found.files))


def _show_shares(counted: dict[str, dict[str, int]], total: int) -> None:
    from emo_select.cli.columns import Column, show

    rows = [[label, f"{entry['files']:,}", f"{entry['tokens']:,}", f"{entry['tokens'] / total:.1%}"]
            for label, entry in counted.items()]
    show([Column("label"), Column("files", right=True), Column("tokens", right=True), Column("share", right=True)],
         [*rows, ["all", f"{sum(e['files'] for e in counted.values()):,}", f"{total:,}", "100.0%"]])


def _say_checked(checked: int, files: int) -> None:
    from emo_select.progress import say

    without = f"; {files - checked} have no manifest beside them" if checked < files else ""
    say(f"{checked} files have the checksums of their manifests{without}.")
