"""`models` and `version`: what is built in, and what is installed."""

from __future__ import annotations

import shutil
import textwrap

import typer

from emo_select.cli.common import AsJson, emit


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command(rich_help_panel="Look around")(models)
    app.command(rich_help_panel="Look around")(version)


def version(as_json: AsJson = False) -> None:
    """Show the versions of emo-select and of what its numbers depend on."""
    from emo_select import record

    found = {**record.versions(), "commit": record.commit()}
    if as_json:
        return emit(found)
    for name, value in found.items():
        typer.echo(f"{name} {value or 'unknown'}")
    return None


def models(as_json: AsJson = False) -> None:
    """List the models known by name and the families of Mixture-of-Experts models that can be pruned."""
    from emo_select.checkpoint import PUBLISHED, demo_names
    from emo_select.models.census import census
    from emo_select.models.families import DENSE_TYPES, EMO_TYPES

    release, families = census()
    names = {"shipped": demo_names(), "published": list(PUBLISHED), "dense (skip selection)": list(DENSE_TYPES)}
    if as_json:
        table = {one.family: {"tested": list(one.tested), "remarks": one.remarks} for one in families}
        return emit({**names, "own": list(EMO_TYPES), "transformers": release, "families": table})
    for title, listed in names.items():
        _paragraph(f"{title}: {', '.join(listed)}")
    _paragraph(f"Mixtures of experts, as tested with transformers {release}; {', '.join(EMO_TYPES)} are our own and do "
               "all of it:")
    for one in families:
        _paragraph(f"{one.family:<19}{', '.join(one.tested) or 'refused':<15}{one.remarks}", hanging=34)
    _paragraph("Any local folder or Hub id of these works as --model. Families that a newer transformers adds are "
               "found out when they are asked for: docs/families.md.")
    return None


def _paragraph(text: str, hanging: int = 2) -> None:
    width = shutil.get_terminal_size().columns
    typer.echo(textwrap.fill(text, max(60, width), subsequent_indent=" " * hanging, break_long_words=False,
                             break_on_hyphens=False))
