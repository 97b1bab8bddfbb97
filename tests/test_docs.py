"""What the documents say exists: links, commands, options, public names, shipped files."""

import re
import shlex
from pathlib import Path

import pytest
import typer

import emo_select

ROOT = Path(__file__).resolve().parents[1]
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
        if not target.startswith("http"):
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
        for word in words:
            if re.fullmatch(r"--?[a-z][a-z-]*(=.*)?", word):
                assert word.split("=")[0] in known | {"--help", "-h"}, f"{word} in: {line}"


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
