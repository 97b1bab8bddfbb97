"""`export`: a pruned model in the format of another program."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from emo_select.cli import common, completion
from emo_select.cli.common import OUTPUT, RUN

if TYPE_CHECKING:
    from emo_select.export.gguf import GgufPlan


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    exports = typer.Typer(no_args_is_help=True, help="A pruned model, or which experts it keeps, for another program.")
    exports.command()(gguf)
    exports.command("keep-list")(keep_list)
    app.add_typer(exports, name="export", rich_help_panel="Single stages")


def gguf(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=common.MODEL_HELP)],
    out: Annotated[Path, typer.Option("--out", callback=common.writable, help="Folder to write model.gguf into.",
                                      rich_help_panel=OUTPUT)],
    dtype: Annotated[str, typer.Option("--dtype", help="auto (as stored), f32, f16, bf16 or q8_0.",
                                       rich_help_panel=OUTPUT)] = "auto",
    tokenizer_pre: Annotated[str | None, typer.Option(
        "--tokenizer-pre", show_default="by tokenizer.json", rich_help_panel=RUN,
        help="llama.cpp's name for how texts are split, such as gpt-2.")] = None,
    data_dir: common.DataDir = None,
    force: Annotated[bool, typer.Option("--force", help="Replace what is there.", rich_help_panel=OUTPUT)] = False,
    dry_run: common.DryRun = False,
    as_json: common.AsJson = False,
) -> None:
    """Write an EMO as a GGUF file for llama.cpp, which runs it as its glm4moe: the same operations, the same numbers.

    Other families are for llama.cpp's own convert_hf_to_gguf.py. A model that llama.cpp has no operations for is
    refused.
    """
    from emo_select.errors import SpecError
    from emo_select.export.gguf import export_gguf, plan_gguf
    from emo_select.storage import is_unfinished

    if out.exists() and not (force or dry_run or is_unfinished(out)):
        raise SpecError(f"{out} is already there; pass --force to replace it, or choose another with --out.")
    make = partial(plan_gguf, download=False) if dry_run else partial(export_gguf, out=out)
    plan = make(model, dtype=dtype, tokenizer_pre=tokenizer_pre)
    _report(plan, out, written=not dry_run, as_json=as_json)


def _report(plan: GgufPlan, out: Path, *, written: bool, as_json: bool) -> None:
    from emo_select.export.gguf import ARCHITECTURE, FILE
    from emo_select.progress import say

    if as_json:
        common.emit({"file": str(out / FILE), "architecture": ARCHITECTURE, "dtype": plan.stored, "bytes": plan.bytes,
                     "tensors": len(plan.entries), "tokenizer_pre": plan.vocabulary.pre, "written": written})
        return
    say(f"{'Wrote' if written else 'Would write'} {out / FILE}: {ARCHITECTURE}, {plan.stored}, "
        f"{common.size(plan.bytes)}, texts split as in {plan.vocabulary.pre}.")


def keep_list(
    selection: Annotated[Path, typer.Argument(help="A run directory, a selection.json or a pruned model.",
                                              autocompletion=completion.runs)],
    form: Annotated[str, typer.Option("--format", "-f", help="mask, jsonl, ordered or profile.",
                                      rich_help_panel=OUTPUT)] = "jsonl",
    model: Annotated[str | None, typer.Option("--model", "-m", show_default="the one selected on",
                                              help=common.MODEL_HELP, rich_help_panel=RUN)] = None,
    data_dir: common.DataDir = None,
    to: Annotated[Path | None, typer.Option("--to", callback=common.writable_file, show_default="stdout",
                                            help="File to write.", rich_help_panel=OUTPUT)] = None,
) -> None:
    """Write which experts were kept as engines read it that load the unpruned model and leave out the others."""
    from emo_select.export.keep_list import keep_list as text_of
    from emo_select.storage import write_output

    text = text_of(selection, form, model)
    if to is None:
        typer.echo(text, nl=False)
    else:
        write_output(to, text.encode())
        typer.echo(to)
