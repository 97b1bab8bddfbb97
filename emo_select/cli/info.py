"""`models` and `version`: what is built in, and what is installed."""

from __future__ import annotations

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
    from emo_select.models.families import DENSE_TYPES, SCORING

    found = {
        "shipped": demo_names(),
        "published": list(PUBLISHED),
        "families": list(SCORING),
        "dense (skip selection)": list(DENSE_TYPES),
    }
    if as_json:
        return emit(found)
    for title, names in found.items():
        typer.echo(f"{title}: {', '.join(names)}")
    typer.echo("Any local folder or Hub id of these families works as --model.")
    return None
