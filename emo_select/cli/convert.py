"""`convert`: training checkpoints to released ones and back."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from emo_select.cli import common
from emo_select.cli.common import OUTPUT, RUN

if TYPE_CHECKING:
    from emo_select.convert.check import Agreement

TO_HF, TO_CORE = "To hf", "To olmo-core"


class Format(StrEnum):
    """What a checkpoint can become."""

    HF = "hf"
    OLMO_CORE = "olmo-core"
    SAFETENSORS = "safetensors"


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command(rich_help_panel="Pretraining")(convert)


def convert(
    checkpoint: Annotated[str, typer.Argument(
        metavar="CHECKPOINT", help="A training's folder step<N>; a released checkpoint: folder, Hub id or demo/NAME; "
                                   "a folder with pytorch_model.bin.")],
    to: Annotated[Format, typer.Option("--to", help="hf: training to released; olmo-core: the other way; safetensors: "
                                                   "from pickled weights (*.bin).",
                                       rich_help_panel=RUN)],
    out: Annotated[Path, typer.Option("--out", help="Folder to write.", rich_help_panel=OUTPUT)],
    dtype: Annotated[str | None, typer.Option("--dtype", show_default="hf: as stored, olmo-core: float32",
                                              help="float32, bfloat16 or float16.", rich_help_panel=OUTPUT)] = None,
    cut_vocabulary: Annotated[bool, typer.Option(
        "--cut-vocabulary", help="Leave out the rows that pad the tokenizer's vocabulary.", rich_help_panel=TO_HF)
    ] = False,
    max_length: Annotated[int | None, typer.Option("--max-length", min=1, show_default="the training's",
                                                   help="Longest text, in tokens.", rich_help_panel=TO_HF)] = None,
    tokenizer: Annotated[str | None, typer.Option(
        "--tokenizer", show_default="beside the checkpoint, or its config's", rich_help_panel=TO_HF,
        help="Folder or Hub id of the tokenizer, or none.")] = None,
    published_config: Annotated[bool, typer.Option(
        "--published-config", help="Config values of the published converter: balance weight 0.01, pad_token.",
        rich_help_panel=TO_HF)] = False,
    pool: Annotated[str | None, typer.Option(
        "--pool", metavar="MIN-MAX", show_default="as conversion.json says, else none", rich_help_panel=TO_CORE,
        help="EMO router with such document pools, as 8-128; none: standard.")] = None,
    eval_pool: Annotated[int | None, typer.Option("--eval-pool", min=1, show_default="middle of --pool",
                                                  help="Pool at evaluation.", rich_help_panel=TO_CORE)] = None,
    pad_to: Annotated[int, typer.Option("--pad-vocabulary-to", min=1, rich_help_panel=TO_CORE,
                                        help="Fill the vocabulary with zero rows to a multiple of this.")] = 128,
    max_shard_size: Annotated[str | None, typer.Option("--max-shard-size", show_default="5GB", rich_help_panel=OUTPUT,
                                                       help="Largest file, such as 500MB.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Afterwards compare logits of both on random tokens.",
                                        rich_help_panel=RUN)] = False,
    dry_run: common.DryRun = False,
    as_json: common.AsJson = False,
) -> None:
    """Convert a checkpoint between the trainer's format and that of transformers, in the memory of one tensor.

    Needs neither the training engine nor a GPU. Pickles are read with an allow list; nothing in them is run. The
    optimiser's state is left out. An interrupted call goes on where it was.
    """
    from emo_select.experts.prune import parse_size

    limit = parse_size(max_shard_size)
    hf_only = {"--cut-vocabulary": cut_vocabulary, "--max-length": max_length, "--tokenizer": tokenizer,
               "--published-config": published_config}
    if to is Format.SAFETENSORS:
        _only_for(TO_CORE, {"--pool": pool, "--eval-pool": eval_pool})
        _only_for(TO_HF, {**hf_only, "--dtype": dtype, "--check": check})
        _to_safetensors(checkpoint, out, limit, dry_run=dry_run, as_json=as_json)
        return
    if to is Format.HF:
        _only_for(TO_CORE, {"--pool": pool, "--eval-pool": eval_pool})
        report = _to_hf(Path(checkpoint), out, dry_run, dtype=dtype, cut_vocabulary=cut_vocabulary,
                        max_length=max_length, tokenizer=tokenizer, published_config=published_config,
                        max_shard_bytes=limit)
    else:
        _only_for(TO_HF, hf_only)
        report = _to_olmo_core(checkpoint, out, dry_run, dtype or "float32", _pools(pool, eval_pool), pad_to, limit)
    agreement = _compare(checkpoint, out, to, report["dtype"]) if check and not dry_run else None
    _report(report, out, agreement, written=not dry_run, as_json=as_json)


def _to_safetensors(checkpoint: str, out: Path, limit: int | None, *, dry_run: bool, as_json: bool) -> None:
    from emo_select.convert.torch_files import to_safetensors
    from emo_select.progress import say

    report = to_safetensors(checkpoint, out, limit, dry_run=dry_run)
    if as_json:
        common.emit({**report, "directory": str(out), "written": not dry_run})
        return
    say(f"{'Would write' if dry_run else 'Wrote'} {out}: {report['tensors']} tensors, {common.size(report['bytes'])}, "
        f"with at most {common.size(report['memory_bytes'])} in memory.")


def _to_hf(checkpoint: Path, out: Path, dry_run: bool, **options: Any) -> dict[str, Any]:
    from emo_select.convert.hf import HfOptions, describe, plan_hf, to_hf

    if dry_run:
        return describe(plan_hf(checkpoint, HfOptions(**options), download=False))
    return to_hf(checkpoint, out, HfOptions(**options))


def _to_olmo_core(source: str, out: Path, dry_run: bool, dtype: str, pools: Any, multiple: int, limit: int | None
                  ) -> dict[str, Any]:
    from emo_select.convert.olmo_core import CoreOptions, describe, plan_olmo_core, to_olmo_core

    options = CoreOptions(dtype=dtype, multiple=multiple, pools=pools, max_part_bytes=limit)
    if dry_run:
        return describe(plan_olmo_core(source, options, download=False))
    return to_olmo_core(source, out, options)


def _only_for(panel: str, given: dict[str, Any]) -> None:
    from emo_select.errors import SpecError

    for option, value in given.items():
        if value:
            raise SpecError(f"{option} belongs to --to {panel.removeprefix('To ')}; leave it out.")


def _pools(pool: str | None, evaluation: int | None) -> Any:
    from emo_select.convert.experiment import Pools
    from emo_select.convert.olmo_core import AS_TRAINED
    from emo_select.errors import SpecError

    if pool in (None, "none"):
        _only_for("To olmo-core with --pool MIN-MAX", {"--eval-pool": evaluation})
        return None if pool else AS_TRAINED
    least, dash, most = pool.partition("-")
    if not (least.isdigit() and (most.isdigit() or not dash)):
        raise SpecError(f"{pool!r} is neither none nor a range of pool sizes; write 8-128, or 32 for a fixed size.")
    low, high = int(least), int(most or least)
    return Pools(low, high, evaluation or (low + high) // 2)


def _compare(checkpoint: str, out: Path, to: Format, dtype: str) -> Agreement:
    from emo_select.checkpoint import resolve
    from emo_select.convert.check import compare

    training, released = (Path(checkpoint), out) if to is Format.HF else (out, resolve(checkpoint))
    return compare(training, released, dtype=dtype)


def _report(report: dict[str, Any], out: Path, agreement: Agreement | None, *, written: bool, as_json: bool) -> None:
    from dataclasses import asdict

    from emo_select.errors import NumericError
    from emo_select.progress import say

    if as_json:
        found = {**asdict(agreement), "holds": agreement.holds} if agreement else None
        common.emit({**report, "directory": str(out), "written": written, "check": found})
    else:
        shared = f" ({report['shared']} shared)" if report["shared"] else ""
        experts = f"{report['experts']} experts{shared}" if report["experts"] else "no experts"
        if pools := report.get("pools"):
            experts += f", pools of {pools['least']} to {pools['most']}"
        say(f"{'Wrote' if written else 'Would write'} {out}: {report['layers']} layers, {experts}, vocabulary "
            f"{report['vocabulary']}, {report['dtype']}, {common.size(report['bytes'])}, with at most "
            f"{common.size(report['memory_bytes'])} in memory.")
    if agreement and not as_json:
        say(f"Largest difference of a logit on {agreement.tokens} random tokens: {agreement.difference:.1e} "
            f"(up to {agreement.tolerance:.1e} is rounding).")
    if agreement and not agreement.holds:
        raise NumericError(f"The two checkpoints do not compute the same: logits differ by {agreement.difference:.2g}; "
                           "please report this with both config.json.")
