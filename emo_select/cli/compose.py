"""`compose`: several pruned models in one checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from emo_select.cli import common, completion
from emo_select.cli.common import OUTPUT, RUN


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command(rich_help_panel="Single stages")(compose)


def compose(
    models: Annotated[list[Path], typer.Argument(
        metavar="RUN", help="Run directories (their last checkpoint) or checkpoints, pruned from one model.",
        autocompletion=completion.runs)],
    model: Annotated[str, typer.Option("--model", "-m", help=f"The model that was pruned: {common.MODEL_HELP}",
                                       rich_help_panel=RUN, autocompletion=completion.models)],
    out: Annotated[Path, typer.Option("--out", callback=common.writable, help="Folder of the composed model.",
                                      rich_help_panel=OUTPUT)],
    revision: common.Revision = None,
    data_dir: common.DataDir = None,
    finetuned: Annotated[bool, typer.Option("--finetuned", help="Take the routed experts that finetuning changed.",
                                            rich_help_panel=RUN)] = False,
    router: Annotated[bool, typer.Option("--router", help="Their router rows, too.", rich_help_panel=RUN)] = False,
    shared: Annotated[bool, typer.Option("--shared", help="Shared experts, too.", rich_help_panel=RUN)] = False,
    rest: Annotated[bool, typer.Option("--rest", help="Attention, norms, embeddings, head and dense layers, too.",
                                       rich_help_panel=RUN)] = False,
    collisions: Annotated[str, typer.Option("--collisions", rich_help_panel=RUN,
                                            help="What several models changed: refuse, or average.")] = "refuse",
    uniform: Annotated[bool, typer.Option(
        "--uniform", help="Fill every layer up to the largest, with the next best experts.",
        rich_help_panel=RUN)] = False,
    max_shard_size: Annotated[str | None, typer.Option("--max-shard-size", show_default="5GB", rich_help_panel=OUTPUT,
                                                       help="Largest file, such as 500MB.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace what is there.", rich_help_panel=OUTPUT)] = False,
    dry_run: common.DryRun = False,
    as_json: common.AsJson = False,
) -> None:
    """Put the experts of several pruned models into one checkpoint, for the tasks of all of them.

    Experts come from the full model, in its order; with --finetuned from the models that changed them.
    """
    from emo_select.errors import SpecError
    from emo_select.finetune.compose import ComposeOptions
    from emo_select.finetune.compose import compose as composed
    from emo_select.storage import is_unfinished

    if collisions not in ("refuse", "average"):
        raise SpecError(f"--collisions is refuse or average, not {collisions!r}.")
    if out.exists() and not (force or dry_run or is_unfinished(out)):
        raise SpecError(f"{out} is already there; pass --force to replace it, or choose another with --out.")
    options = ComposeOptions(finetuned=finetuned, router=router, shared=shared, rest=rest, uniform=uniform,
                             collisions=collisions, max_shard_size=max_shard_size)  # type: ignore[arg-type]
    [full] = common.models([model], revision)
    _report(composed(models, full, out, options, dry_run=dry_run), out, written=not dry_run, as_json=as_json)


def _report(summary: dict[str, Any], out: Path, *, written: bool, as_json: bool) -> None:
    from emo_select.progress import say

    if as_json:
        common.emit({"directory": str(out), "written": written, **summary})
        return
    smallest, largest = summary["smallest_layer"], summary["largest_layer"]
    kept = f"{largest}" if smallest == largest else f"{smallest} to {largest}"
    say(f"{'Wrote' if written else 'Would write'} {out}: {kept} experts per layer of {summary['experts_before']}, "
        f"{common.size(summary['bytes'])} of {common.size(summary['bytes_before'])}.")
