"""The guides as a site: built strictly, readable without network, usable on a phone."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    folder = tmp_path_factory.mktemp("site")
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", folder]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "NO_MKDOCS_2_WARNING": "1"})
    assert done.returncode == 0, done.stderr
    return folder


def test_pages_load_nothing_from_elsewhere(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 15
    for page in pages:
        text = page.read_text()
        loaded = re.findall(r"<(?:script|img|iframe|source)[^>]+src=.?(?:https?:)?//", text)
        styles = re.findall(r"<link[^>]+rel=.?(?:stylesheet|preconnect|icon)[^>]+href=.?https?://", text)
        assert not loaded and not styles, page.name


def test_the_search_index_is_local_and_knows_the_api(site):
    index = (site / "search" / "search_index.json").read_text()
    assert "select_experts" in index and "From paper to command" in index


def test_the_api_page_shows_types_and_the_changelog_is_there(site):
    api = re.sub(r"<[^>]+>", "", (site / "api.html").read_text())
    assert "output_dir: str | Path | None = None" in api
    assert "keep_k" in api and "Experts kept per layer" in api
    assert "The first version" in (site / "changelog.html").read_text()


def test_notebooks_come_along(site):
    assert (site / "notebooks" / "demo.ipynb").is_file()
