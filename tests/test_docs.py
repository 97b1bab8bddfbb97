"""What the documents say exists: links, commands, options, public names, shipped files."""

import re
import shlex
from pathlib import Path

import pytest
import typer

import emo_select

ROOT = Path(__file__).resolve().parents[1]
BLOB = "https://github.com/emo-select/emo-select/blob/main/"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def program():
    from emo_select.cli.app import app

    return typer.main.get_command(app)


def command_lines(text):
    """Every `emo-select …` line of the code blocks, with continued lines joined."""
    for block in re.findall(r"```[a-z]*\n(.*?)```", text, flags=re.S):
        for line in block.replace("\\\n", " ").splitlines():
            found = re.search(r"(?:^|[\s/$])emo-select\s+(.*)", line)
            if found:
                yield found[1].split("  #")[0].split(" | ")[0].split(" > ")[0].strip()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text()):
        if target.startswith(BLOB):
            assert (ROOT / target.removeprefix(BLOB)).exists(), target
        elif not target.startswith("http"):
            assert page.name != "README.md", f"{target} leads nowhere on a package index; write {BLOB}…"
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_options_exist(page):
    for line in command_lines(page.read_text()):
        command, words = program(), shlex.split(line)
        while words and hasattr(command, "commands") and words[0] in command.commands:
            command = command.commands[words.pop(0)]
        alone = getattr(command, "invoke_without_command", True)
        assert not hasattr(command, "commands") or alone or words[:1] in ([], ["--help"]), line
        known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        for word in words[: words.index("--")] if "--" in words else words:  # what follows is another program's
            if re.fullmatch(r"--?[a-z][a-z-]*(=.*)?", word):
                assert word.split("=")[0] in known | {"--help", "-h"}, f"{word} in: {line}"


def test_commands_in_tables_exist():
    """Also those that a page has in a sentence or a table: `emo-select plot --paper figure4`."""
    for page in PAGES:
        for words in re.findall(r"`emo-select ([^`]+)`", page.read_text()):
            command, rest = program(), shlex.split(words)
            while rest and hasattr(command, "commands") and rest[0] in command.commands:
                command = command.commands[rest.pop(0)]
            assert command is not program() and not (rest and hasattr(command, "commands")), f"{words} in {page.name}"
            known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
            wrong = [word for word in rest if re.fullmatch(r"--?[a-z][a-z-]*(=.*)?", word)
                     and word.split("=")[0] not in known | {"--help", "-h"}]
            assert not wrong, f"{wrong} of {words} in {page.name}"


def test_every_page_is_on_the_site():
    """And every row of the paper's page has a command or a reason."""
    listed = set(re.findall(r": ([a-z]+\.md)$", (ROOT / "mkdocs.yml").read_text(), flags=re.M))
    assert listed == {page.name for page in (ROOT / "docs").glob("*.md")}
    rows = [line for line in (ROOT / "docs" / "paper.md").read_text().splitlines()
            if line.startswith("| ") and not line.startswith(("| in the paper", "| artefact", "| published |"))]
    assert len(rows) > 20
    for row in rows:
        assert "`" in row or ("not here" in row and "because" in row), row


def test_the_package_carries_its_files():
    """What is read at run time is among the package's data files."""
    import tomllib

    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["emo_select"]
    package = ROOT / "emo_select"
    carried = {file for pattern in patterns for file in package.glob(pattern)}
    for needed in ("sweeps/shipped/main.yaml", "models/released.json", "tasks/lengths.json"):
        assert package / needed in carried, needed
    others = {file for file in package.rglob("*") if file.is_file() and file.suffix not in (".py", ".pyc")}
    assert others == carried


def test_public_names():
    assert emo_select.__all__ == [
        "Calibration", "Evaluation", "Execution", "Lora", "RunResult", "RunSpec", "Score", "Selection", "Training",
        "__version__", "load_tree", "prune_checkpoint", "run", "select_experts"]
    assert set(emo_select.__all__) <= set(dir(emo_select))
    for name in emo_select.__all__:
        assert getattr(emo_select, name)


def test_the_version_is_said_once():
    text = (ROOT / "pyproject.toml").read_text()
    assert f'version = "{emo_select.__version__}"' in text


def test_no_machine_paths_in_documents():
    for page in PAGES:
        assert not re.search(r"/(work|root|home)/\w", page.read_text()), page.name
