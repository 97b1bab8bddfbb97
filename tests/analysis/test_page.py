"""The page: what it holds, what it refuses, its size, and the page in a real browser."""

from __future__ import annotations

import base64
import gzip
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from page_cases import EXPERTS, LAYERS, ByteTokenizer, make_model
from typer.testing import CliRunner

from emo_select.analysis import figure5
from emo_select.analysis import page as pages
from emo_select.analysis.layout import ModelFolder, write_array
from emo_select.analysis.page import token_pieces, write_page
from emo_select.cli.app import app
from emo_select.errors import SpecError
from emo_select.experts import KeepSet

HOSTILE = "<img src=x onerror=\"document.title='owned'\">'\"&amp;</script><script>document.title='owned'</script>"
PIECES = [b"the", b" cat", b" sat", "\u2028".encode(), HOSTILE.encode(), b" caf", b"\xc3", b"\xa9", b"\n\n", b" dog",
          b"The"]
DOCUMENTS = [[0, 1, 2, 4, 3], [0, 9, 5, 6, 7, 8], [10, 1, 2], [4, 4], [0, 0, 1, 9, 2, 1]]
TOKENS = sum(map(len, DOCUMENTS))
A = np.arange(TOKENS) % 3
B = np.array([0] * 11 + [1] * (TOKENS - 11))


@pytest.fixture(scope="module", autouse=True)
def tokenizer() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for module in (pages, figure5):
            patch.setattr(module, "tokenizer_of", lambda info: ByteTokenizer(PIECES))
        yield


def make_pair(root: Path) -> list[Path]:
    words = (HOSTILE, "cat")
    return [make_model(root, "lab/emo", DOCUMENTS, A, 3, labels=("news", HOSTILE), names=(HOSTILE, "cats"),
                       words=words),
            make_model(root, "lab/std", DOCUMENTS, B, 2, labels=("news", HOSTILE), seed=1)]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return make_pair(tmp_path_factory.mktemp("page"))


def held(file: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Head and arrays of a page."""
    found = re.search(r'id="data">([^<]*)</script>', file.read_text())
    assert found
    whole = gzip.decompress(base64.b64decode(found[1]))
    size = int.from_bytes(whole[:4], "little")
    head, place, arrays = json.loads(whole[4:4 + size]), 4 + size, dict[str, np.ndarray]()
    for name, length in head["arrays"].items():
        own, byte = name.split(".")
        plane = np.frombuffer(whole[place:place + length], dtype=np.uint8).astype(np.int64) << (8 * int(byte))
        arrays[own] = arrays.get(own, -1) + plane
        place += length
    assert place == len(whole)
    return head, arrays


def test_page_holds_tokens_clusters_and_no_address(pair: list[Path], tmp_path: Path) -> None:
    file = write_page(pair, tmp_path / "out" / "page.html", title="A <b>title</b>")
    head, arrays = held(file)
    assert [model["name"] for model in head["models"]] == ["lab/emo", "lab/std"]
    assert arrays["clusters0"].tolist() == A.tolist() and arrays["clusters1"].tolist() == B.tolist()
    assert arrays["lengths"].tolist() == [len(one) for one in DOCUMENTS]
    assert head["pieces"][arrays["pieces"][1]] == " cat" and head["labels"] == sorted(["news", HOSTILE])
    text = file.read_text()
    outside = text.replace(re.search(r'id="data">([^<]*)<', text)[1], "").replace("http://www.w3.org/2000/svg", "")  # type: ignore[index]
    assert "http" not in outside.replace("http-equiv", "") and "url(" not in outside and "@import" not in outside
    assert "A &lt;b&gt;title&lt;/b&gt;" in text and HOSTILE not in text


def test_split_characters_are_joined(pair: list[Path]) -> None:
    pieces, of_token = token_pieces(ModelFolder(pair[0]))
    assert [pieces[i] for i in of_token[5:11]] == ["the", " dog", " caf", "", "é", "\n\n"]
    assert all("�" not in piece for piece in pieces) and pieces[:2] == ["the", " cat"]


def test_large_numbers_keep_their_value() -> None:
    values = np.array([-1, 0, 254, 255, 65_534, 65_535, 1_000_000])
    planes = pages._planes("x", values)
    assert list(planes) == ["x.0", "x.1", "x.2"]
    whole = sum(plane.astype(int) << (8 * i) for i, plane in enumerate(planes.values()))
    assert (whole - 1).tolist() == values.tolist()


def test_rows_that_were_not_clustered_and_undescribed_fits(tmp_path: Path) -> None:
    path = make_model(tmp_path, "m", DOCUMENTS, A[:4], 3, described=False)
    write_array(path / "fits" / "probs_k" / "rows.npy", np.array([1, 3, 5, 20]))
    head, arrays = held(write_page([path], tmp_path / "p.html"))
    assert arrays["clusters0"][[0, 1, 3, 5, 20]].tolist() == [-1, 0, 1, 2, 0]
    assert [cluster["size"] for cluster in head["models"][0]["clusters"]] == [2, 1, 1]


def test_lost_mass_of_keep_sets(tmp_path: Path) -> None:
    paths = make_pair(tmp_path)
    for layer in range(LAYERS):
        probs = np.zeros((TOKENS, EXPERTS), dtype=np.float16)
        probs[np.arange(TOKENS), A] = 1  # cluster c uses expert c only
        write_array(paths[0] / "routing" / f"probs-{layer:02d}.npy", probs)
    kept = KeepSet(experts=((0, 7), (0, 1)), method="layerwise", keep_k=2, model="lab/emo", task="t", scores=None)
    kept.save(tmp_path / "run" / "selection.json")
    head, _ = held(write_page(paths, tmp_path / "p.html", keep_sets=[tmp_path / "run"]))
    assert head["models"][0]["keep_sets"] == [
        {"name": "t, keep-k 2, layerwise", "keep_k": 2, "kept": {"0": [0, 7], "1": [0, 1]}, "lost": [0.0, 0.5, 1.0]}]
    assert head["models"][1]["keep_sets"] == []
    kept.model_copy(update={"model": "other"}).save(tmp_path / "run" / "selection.json")
    with pytest.raises(SpecError, match="not on this page"):
        write_page(paths, tmp_path / "p.html", keep_sets=[tmp_path / "run"])


def test_models_that_do_not_go_together_are_refused(tmp_path: Path) -> None:
    one = make_model(tmp_path, "one", DOCUMENTS, A, 3)
    other = make_model(tmp_path, "two", DOCUMENTS, A, 3, tokenizer="u")
    fewer = make_model(tmp_path, "three", DOCUMENTS[:4], A[:16], 3)
    empty = make_model(tmp_path, "four", DOCUMENTS, A, 3)
    shutil.rmtree(empty / "fits")
    for folders, words in (([one, other], "different tokenizers"), ([one, fewer], "different documents"),
                           ([empty], "no clusters yet"), ([], "no model")):
        with pytest.raises(SpecError, match=words):
            write_page(folders, tmp_path / "p.html")
    with pytest.raises(SpecError, match="no fit 'x'"):
        write_page([one], tmp_path / "p.html", "x")
    assert not (tmp_path / "p.html").exists()


def test_command_writes_beside_the_models(pair: list[Path]) -> None:
    result = CliRunner().invoke(app, ["clusters", "page", str(pair[0].parent)])
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == str(pair[0].parent / "clusters.html") and Path(result.stdout.strip()).exists()


# ---- Figure 5 ----


def test_figure_5_shows_largest_clusters_and_a_document(pair: list[Path], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install 'emo-select[plots]'")
    files, shown = figure5.draw_figure5(pair, tmp_path / "one", formats=["svg", "pdf", "png"])
    assert [file.read_bytes()[:4] for file in files] == [b"<?xm", b"%PDF", b"\x89PNG"]
    drawn = files[0].read_text()
    assert "lab/emo: 3 of 3 clusters" in drawn and "&lt;img src=x" in drawn and "cats" in drawn
    # B's document 3 is of one cluster, and so are 0 and 2; A's are spread: 2 of 5, 1 of 2 in document 3
    assert shown == 3 and "document 3" in drawn
    again, _ = figure5.draw_figure5(pair, tmp_path / "two", document=1, formats=["svg"])
    assert "café"[:3] in again[0].read_text() and "document 1" in again[0].read_text()
    with pytest.raises(SpecError, match="no document 9"):
        figure5.draw_figure5(pair, tmp_path, document=9)


def test_lines_are_as_wide_as_the_figure_and_keep_line_ends() -> None:
    lines = figure5._lines(["one", " two\n\n", "x" * 130, " three", "", "\n", "end"])
    assert [text for _, _, text in lines[0]] == ["one", " two↵↵"]
    assert all(column + len(text) <= figure5.COLUMNS for line in lines for _, column, text in line)
    joined = "".join(text for line in lines for _, _, text in line)
    assert joined.count("x") == 130 and joined.endswith("three↵end")


# ---- in a browser ----

Driver = Any


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Driver]:
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium: pip install selenium")
    program, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if program is None or driver is None:
        pytest.skip("needs a browser: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "window-size=1280,900",
                 f"user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    from selenium.webdriver.chrome.service import Service

    opened = webdriver.Chrome(options=options, service=Service(driver))
    yield opened
    opened.quit()


@pytest.fixture(scope="module")
def file(pair: list[Path]) -> Path:
    return write_page(pair, pair[0].parent / "page.html", title=HOSTILE)


def show(page: Driver, file: Path, address: str = "") -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    page.get("about:blank")
    page.get(file.as_uri() + address)
    ready = "return document.documentElement.dataset.ready === 'true'"
    WebDriverWait(page, 60).until(lambda driver: driver.execute_script(ready))


@pytest.fixture
def opened(browser: Driver, file: Path) -> Iterator[Driver]:
    """The page, freshly loaded; afterwards nothing may have complained, been requested or been executed."""
    browser.get("about:blank")
    browser.get_log("performance")
    show(browser, file)
    yield browser
    assert [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []
    sent = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = {m["params"]["request"]["url"].split("#")[0] for m in sent if m["method"] == "Network.requestWillBeSent"}
    assert {url for url in asked if not url.startswith("data:")} <= {file.as_uri(), "about:blank"}
    assert browser.title == HOSTILE
    made = "return document.images.length + document.querySelectorAll('main script').length"
    assert browser.execute_script(made) == 0


def texts(page: Driver, css: str) -> list[str]:
    script = "return [...document.querySelectorAll(arguments[0])].map(e => e.textContent)"
    found: list[str] = page.execute_script(script, css)
    return found


def find(page: Driver, css: str) -> Driver:
    return page.find_element("css selector", css)


def hash_of(page: Driver) -> str:
    return str(page.execute_script("return decodeURIComponent(location.hash)"))


@pytest.mark.browser
def test_clusters_search_and_detail(opened: Driver) -> None:
    assert len(texts(opened, ".item")) == 3
    assert HOSTILE in texts(opened, "#detail h2")[0] and HOSTILE in texts(opened, "#detail .word")[0]
    find(opened, "#search").send_keys("cats")
    [item] = opened.find_elements("css selector", ".item")
    item.click()
    assert hash_of(opened) == "#view=clusters&model=A&cluster=1" and texts(opened, "#detail h2") == ["cats"]
    # tokens 1, 4, 7 … are of cluster 1: two of the five of document 0, none of document 3
    listed = [text for text in texts(opened, "#detail p.small") if "tokens" in text]
    assert [text.split(",")[0] for text in listed] == ["no. 0", "no. 1", "no. 2", "no. 4"]
    assert "40 % of 5 tokens" in listed[0]


@pytest.mark.browser
def test_addresses_open_documents_and_back_goes_back(opened: Driver, file: Path) -> None:
    show(opened, file, "#cluster=1&doc=1&model=A")
    assert texts(opened, "#tabs [aria-current]") == ["Documents"]
    readers = texts(opened, "#readers .text")
    assert readers == ["the dog café↵↵\n"] * 2
    assert len(texts(opened, "#readers section:first-child .t.dim")) == 3  # tokens 5 to 10; 7 and 10 are of cluster 1
    find(opened, "#next").click()
    assert hash_of(opened) == "#view=documents&doc=2&model=A" and texts(opened, "#readers .text")[0] == "The cat sat"
    opened.back()
    assert texts(opened, "#readers .text")[0].startswith("the dog")
    opened.execute_script("location.hash = '#doc=99999&model=nobody'")
    assert texts(opened, "main h2")[0].startswith("Document no. 0")


@pytest.mark.browser
def test_legend_isolates_a_cluster(opened: Driver, file: Path) -> None:
    show(opened, file, "#doc=0")
    assert texts(opened, "#readers section:last-child .t.dim") == []
    legend = opened.find_elements("css selector", "#readers section:first-child .key")
    assert len(legend) == 3 and HOSTILE in legend[0].text
    legend[0].click()
    assert len(texts(opened, "#readers section:first-child .t.dim")) == 3
    assert texts(opened, "#readers section:last-child .t.dim") == []
    assert HOSTILE in texts(opened, "#readers .text")[0] and "\u2028" in texts(opened, "#readers .text")[0]


@pytest.mark.browser
def test_where_a_word_goes(opened: Driver, file: Path) -> None:
    show(opened, file, "#view=tokens&word=cat")
    assert texts(opened, "#detail h2") == ["“cat”"] and texts(opened, "#detail p")[0] == "4 times in 3 documents"
    # tokens 1, 12, 18, 21: clusters 1, 0, 0, 0 of A; 0, 1, 1, 1 of B
    assert [re.sub(r"\s+", " ", text).strip() for text in texts(opened, "#detail summary")] == [
        f"{HOSTILE} 75 % (3)", "cats 25 % (1)", "topic 1 75 % (3)", "topic 0 25 % (1)"]
    find(opened, "#search").send_keys("zebra")
    assert texts(opened, ".list p") == ["No token contains this."]


@pytest.mark.browser
def test_keyboard_reaches_views_search_and_experts(opened: Driver) -> None:
    from selenium.webdriver.common.keys import Keys

    body = find(opened, "body")
    body.send_keys("/")
    assert opened.switch_to.active_element.get_attribute("id") == "search"
    opened.switch_to.active_element.send_keys(Keys.ESCAPE)
    find(opened, "body").send_keys("2")
    find(opened, "body").send_keys(Keys.ARROW_RIGHT)
    assert hash_of(opened) == "#view=documents&doc=1&model=A"
    find(opened, "body").send_keys("4")
    find(opened, ".cell[tabindex='0']").send_keys(Keys.ARROW_DOWN)
    opened.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
    opened.switch_to.active_element.send_keys(Keys.ENTER)
    assert texts(opened, "#detail h2") == ["Layer 1, expert 1"]
    assert texts(opened, "#detail h3")[:2] == ["Words", "Clusters that use it most"]


@pytest.mark.browser
def test_comparison_counts_and_measures(opened: Driver, file: Path) -> None:
    show(opened, file, "#view=comparison")
    cells = opened.execute_script("return [...document.querySelectorAll('#contingency td')].map(e => e.title)")
    assert len(cells) == 6 and sum(int(re.search(r": (\d+) tokens", text)[1]) for text in cells) == TOKENS  # type: ignore[index]
    assert "0.400 [0.300, 0.500]shuffled 0.100" in texts(opened, "#measures td")[0]
    assert len(texts(opened, "figure svg")) == 1
    words = " ".join(texts(opened, "main")).lower()
    assert "syntax" not in words and "learns" not in words


@pytest.mark.browser
@pytest.mark.parametrize(("width", "scheme"), [(390, "light"), (800, "dark"), (1400, "dark")])
def test_fits_every_width_in_light_and_dark(opened: Driver, file: Path, width: int, scheme: str) -> None:
    opened.execute_cdp_cmd("Emulation.setDeviceMetricsOverride",
                           {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500})
    opened.execute_cdp_cmd("Emulation.setEmulatedMedia",
                           {"features": [{"name": "prefers-color-scheme", "value": scheme}]})
    wide = "return [...document.querySelectorAll('main *')].filter(e => !e.closest('.scroll') && " \
           "e.getBoundingClientRect().right > innerWidth + 1).map(e => e.className + e.tagName)"
    for view in ("clusters", "documents", "tokens", "experts", "comparison"):
        show(opened, file, f"#view={view}")
        assert opened.execute_script(wide) == [], view
        assert opened.execute_script("return document.documentElement.scrollWidth <= innerWidth"), view
    red = opened.execute_script("return getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0]")
    assert (int(red) > 128) == (scheme == "light")
    opened.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@pytest.mark.browser
def test_one_model_alone(browser: Driver, pair: list[Path], tmp_path: Path) -> None:
    show(browser, write_page(pair[1:], tmp_path / "one.html"), "#view=comparison")
    assert texts(browser, "#contingency") == [] and texts(browser, "nav .models button") == []
    assert texts(browser, "main .card h3") == ["lab/std"]
