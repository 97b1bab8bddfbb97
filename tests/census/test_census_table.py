"""`emo-select models` says what the census finds; `python tests/census/test_census_table.py` writes it anew."""

import json

import pytest
import transformers
from test_census import REFUSED, UNSTREAMED
from tiny_models import moe_types, tiny_config
from typer.testing import CliRunner

from emo_select.cli.app import app
from emo_select.models.census import RECORD, census, remarks
from emo_select.models.families import family_of


def entry(model_type: str) -> dict[str, object]:
    """What the table has to say of a family."""
    if model_type in REFUSED:
        return {"tested": [], "remarks": REFUSED[model_type]}
    family = family_of(json.loads(tiny_config(model_type).to_json_string(use_diff=False)))
    if model_type in UNSTREAMED:
        return {"tested": ["prune"], "remarks": f"{remarks(family)}; not selected layer by layer: "
                                                f"{UNSTREAMED[model_type]}"}
    return {"tested": ["select", "prune"], "remarks": remarks(family)}


def test_the_table_is_what_the_census_finds() -> None:
    found = json.loads(RECORD.read_text())
    if found["transformers"] != transformers.__version__:
        pytest.skip(f"the table is that of transformers {found['transformers']}")
    assert found["families"] == {name: entry(name) for name in sorted(moe_types())}
    assert sum("prune" in one["tested"] for one in found["families"].values()) >= 48


def test_the_command_shows_it_at_eighty_columns() -> None:
    shown = CliRunner().invoke(app, ["models"], env={"COLUMNS": "80"})
    assert shown.exit_code == 0 and all(len(line) <= 80 for line in shown.stdout.splitlines())
    release, families = census()
    assert release in shown.stdout and all(one.family in shown.stdout for one in families)
    listed = json.loads(CliRunner().invoke(app, ["models", "--json"]).stdout)
    assert listed["families"]["nemotron_h"]["tested"] == ["select", "prune"] and "jetmoe" in listed["families"]


if __name__ == "__main__":
    table = {"transformers": transformers.__version__, "families": {name: entry(name) for name in sorted(moe_types())}}
    RECORD.write_text(json.dumps(table, indent=1) + "\n")
