"""The report: its data, and the page in a real browser."""

from __future__ import annotations

import base64
import gzip
import json
import re
import shutil
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from table_trees import add_run, demo_tree

from emo_select.storage import write_json
from emo_select.tables import load_layout, load_tree
from emo_select.tables.details import thinned
from emo_select.tables.report import page, report_data, write_report
from emo_select.tables.selection import as_bits

HOSTILE = "<img src=x onerror=\"document.title='owned'\">'\"&amp;</script><script>document.title='owned'</script>"
TASK = HOSTILE.replace("/", "").replace(" ", "_")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small sweep with a hostile task, a hostile model label in a record, a broken file and keep-k by the dozen."""
    root = demo_tree(tmp_path_factory.mktemp("report") / "tree")
    add_run(root, task=TASK, keep_k=8)
    hostile = add_run(root, model="evil/model", task="demo_lookup", keep_k=8)
    record = json.loads(hostile.record.read_text())
    record["spec"]["model"] = HOSTILE
    write_json(hostile.record, record)
    for keep_k in range(2, 8):
        for method in ("easy_ep", "global", "frequency", "ean", "reap"):
            add_run(root, task="demo_lookup", keep_k=keep_k, method=method)
    adapted = {"lora": {"rank": 8, "router": True}, "packing": True}
    for keep_k, task in product((8, 16), ("demo_lookup", "demo_copy")):
        add_run(root, task=task, keep_k=keep_k, training=adapted)
    broken = add_run(root, task="demo_lookup", keep_k=3, method="gate_mass")
    next(broken.result(20).glob("*metrics.json")).write_text(f'{{"metrics": "{HOSTILE[:4]}')
    return root


def test_data_of_the_page_is_that_of_the_tables(tree: Path) -> None:
    data = report_data(load_tree(tree), load_layout())
    summary = [dict(zip(data["summary"]["columns"], row, strict=True)) for row in data["summary"]["rows"]]
    pruned = next(row for row in summary if row["model"] == "demoemo" and row["keep"] == 4
                  and row["method"] == "layerwise" and row["group"] == "demo")
    # 40 documents, right where doc % 16 < keep-k - 1: 3 + 3 + 3 of 40; the full model misses doc 15 and 31
    assert pruned["before"][0] == pytest.approx(9 / 40) and pruned["drop_before"] == pytest.approx(38 / 40 - 9 / 40)
    assert pruned["disk"] == 1_000_000 and pruned["memory"] == 640_000_000
    index = next(i for i, row in enumerate(data["runs"]["rows"]) if row[0].startswith("demoemo/demo_copy_keepk_4")
                 and row[0].endswith("layerwise"))
    detail = data["details"][index]
    assert detail["spec"]["keep_k"] == 4 and detail["keep"]["total"] == 16 and len(detail["keep"]["layers"]) == 4
    assert len(detail["losses"]) == 20 and [row[0] for row in detail["stages"]][:2] == ["select", "prune"]
    # the first documents that the full model answers and this one does not
    assert [row[0] for row in detail["changed"]] == [3, 4, 5, 6, 7]
    assert detail["changed"][0] == [3, "id-3", "1", "1", "0", "1 → 0"]


def test_page_holds_everything_and_no_address(tree: Path) -> None:
    text = page(report_data(load_tree(tree), load_layout()), title="A <b>title</b>")
    assert "A &lt;b&gt;title&lt;/b&gt;" in text and "<b>" not in text
    packed = re.search(r'id="data">([^<]*)</script>', text)
    assert packed
    assert TASK in {row[2] for row in json.loads(gzip.decompress(base64.b64decode(packed[1])))["runs"]["rows"]}
    outside = text.replace(packed[1], "").replace("http://www.w3.org/2000/svg", "")
    assert "http" not in outside.replace("http-equiv", "") and "url(" not in outside and "@import" not in outside
    assert HOSTILE not in text


@pytest.mark.parametrize(("kept", "total", "bits"),
                         [([0], 4, "8"), ([3, 4], 8, "18"), ([0, 5], 6, "84"), ([], 5, "00")])
def test_keep_sets_as_bits(kept: list[int], total: int, bits: str) -> None:
    assert as_bits(kept, total) == bits


def test_long_curves_are_thinned_evenly() -> None:
    assert thinned(list(range(1000)), 4) == [0, 333, 666, 999]


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
def report_file(tree: Path) -> Path:
    path = tree.parent / "report.html"
    write_report(load_tree(tree), load_layout(), path, title=HOSTILE)
    return path


@pytest.fixture
def opened(browser: Driver, report_file: Path) -> Iterator[Driver]:
    """The page, freshly loaded; afterwards nothing may have complained, been requested or been executed."""
    from selenium.webdriver.support.ui import WebDriverWait

    browser.get("about:blank")
    browser.get_log("performance")
    browser.get(report_file.as_uri())
    WebDriverWait(browser, 120).until(
        lambda page: page.execute_script("return document.documentElement.dataset.ready === 'true'"))
    yield browser
    assert [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []
    sent = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = {m["params"]["request"]["url"].split("#")[0] for m in sent if m["method"] == "Network.requestWillBeSent"}
    assert {url for url in asked if not url.startswith("data:")} <= {report_file.as_uri(), "about:blank"}
    assert browser.title == HOSTILE
    assert browser.execute_script("return document.images.length") == 0


def rows(page: Driver, section: str) -> list[list[str]]:
    """Texts of a section's table, one list per row."""
    script = "return [...document.querySelectorAll(arguments[0])].map(r => [...r.cells].map(c => c.textContent))"
    found: list[list[str]] = page.execute_script(script, f"section[aria-labelledby={section}-title] tbody tr")
    return found


def find(page: Driver, css: str) -> Driver:
    return page.find_element("css selector", css)


def click(page: Driver, element: Driver) -> None:
    page.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
    element.click()


def head(page: Driver, section: str, name: str) -> Driver:
    heads = page.find_elements("css selector", f"section[aria-labelledby={section}-title] thead th")
    return next(h for h in heads if h.text == name or h.text.startswith(f"{name} "))


def section_ids(page: Driver) -> list[str]:
    found: list[str] = page.execute_script("return [...document.querySelectorAll('main h2')].map(h => h.id)")
    return found


@pytest.mark.browser
def test_shows_all_sections_and_pages_long_tables(opened: Driver) -> None:
    assert section_ids(opened) == ["summary", "plots", "tasks", "runs", "problems"]
    runs = rows(opened, "runs")
    assert len(runs) == 50
    click(opened, opened.find_elements("css selector", "section[aria-labelledby=runs-title] .bar button")[1])
    rest = rows(opened, "runs")
    assert 0 < len(rest) < 50 and not {tuple(row) for row in rest} & {tuple(row) for row in runs}


@pytest.mark.browser
def test_sorting_by_a_number_and_back(opened: Driver) -> None:
    cell = head(opened, "runs", "before %")
    column = opened.execute_script("return arguments[0].cellIndex", cell)
    for wanted, direction in ((True, "descending"), (False, "ascending")):
        click(opened, cell.find_element("css selector", "button"))
        assert cell.get_attribute("aria-sort") == direction
        values = [float(row[column].split()[0]) for row in rows(opened, "runs")]
        assert values == sorted(values, reverse=wanted)
    assert values[0] < values[-1]


@pytest.mark.browser
def test_filters_apply_to_every_part(opened: Driver) -> None:
    chips = opened.find_elements("css selector", "fieldset[data-facet=method] .chip")
    click(opened, next(chip for chip in chips if chip.text.startswith("random")))
    assert {row[3] for row in rows(opened, "runs")} == {"random"}
    assert {row[2] for row in rows(opened, "summary")} == {"random"}
    assert "1 active" in find(opened, "#active").text
    search = find(opened, "#search")
    search.send_keys("demo_copy stdmoe")
    assert {(row[0], row[1]) for row in rows(opened, "runs")} == {("demo_copy", "demo/stdmoe")}
    click(opened, find(opened, "#clear"))
    assert len(rows(opened, "runs")) == 50 and find(opened, "#active").text == ""


@pytest.mark.browser
def test_a_run_opens_by_keyboard_and_closes_with_escape(opened: Driver) -> None:
    from selenium.webdriver.common.keys import Keys

    find(opened, "body").send_keys("/")
    assert opened.switch_to.active_element.get_attribute("id") == "search"
    opened.switch_to.active_element.send_keys("demo_lookup_keepk_4 layerwise demoemo")
    button = find(opened, "section[aria-labelledby=runs-title] tbody button")
    button.send_keys(Keys.ENTER)
    dialog = find(opened, "dialog#run")
    assert dialog.get_attribute("open") is not None and "demo_lookup, keep-k 4" in dialog.text
    headings = {heading.text for heading in dialog.find_elements("css selector", "h3")}
    assert headings == {"Metrics", "Kept experts (rows: layers, columns: experts)", "Training loss", "Stages",
                        "Predictions that changed, full model → pruned", "Specification"}
    kept = find(opened, "dialog .kept").get_attribute("d").count("M")
    assert kept == 4 * 4 and "id-3" in dialog.text
    opened.switch_to.active_element.send_keys(Keys.ESCAPE)
    assert dialog.get_attribute("open") is None
    assert opened.switch_to.active_element == button


@pytest.mark.browser
def test_hostile_names_stay_text(opened: Driver) -> None:
    find(opened, "#search").send_keys("onerror")
    assert [row[0] for row in rows(opened, "runs")] == [TASK]
    click(opened, find(opened, "section[aria-labelledby=runs-title] tbody button"))
    assert TASK in find(opened, "dialog#run").text
    find(opened, "#close").click()
    click(opened, find(opened, "#clear"))
    assert HOSTILE in {row[1] for row in rows(opened, "runs")} | {row[0] for row in rows(opened, "summary")}


@pytest.mark.browser
def test_a_broken_file_is_listed_and_belongs_to_its_run(opened: Driver) -> None:
    listed = [row for row in rows(opened, "problems") if "gate_mass" in row[1] and row[0] == "metrics"]
    assert len(listed) == 1 and "not JSON" in listed[0][2]
    find(opened, "#search").send_keys("gate_mass")
    click(opened, find(opened, "section[aria-labelledby=runs-title] tbody button"))
    assert "not JSON" in find(opened, "dialog#run").text
    find(opened, "#close").click()


@pytest.mark.browser
def test_plots_follow_stage_and_legend_and_answer_the_keyboard(opened: Driver) -> None:
    points = len(opened.find_elements("css selector", "#charts .point"))
    click(opened, find(opened, "#plot-legend .chip"))
    fewer = len(opened.find_elements("css selector", "#charts .point"))
    assert 0 < fewer < points
    opened.execute_script("document.querySelector('#charts .point').focus()")
    assert "keep-k" in find(opened, "#tip").text and "%" in find(opened, "#tip").text
    select = find(opened, "#stage")
    select.send_keys("before")
    assert "before finetuning" in find(opened, "#charts figcaption").text


@pytest.mark.browser
@pytest.mark.parametrize(("width", "scheme"), [(390, "light"), (800, "dark"), (1400, "dark")])
def test_fits_every_width_in_light_and_dark(opened: Driver, width: int, scheme: str) -> None:
    opened.execute_cdp_cmd("Emulation.setDeviceMetricsOverride",
                           {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500})
    opened.execute_cdp_cmd("Emulation.setEmulatedMedia",
                           {"features": [{"name": "prefers-color-scheme", "value": scheme}]})
    wide = "return [...document.querySelectorAll('main *')].filter(e => !e.closest('.scroll') && " \
           "e.getBoundingClientRect().right > innerWidth + 1).length"
    assert opened.execute_script(wide) == 0
    assert opened.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    red = opened.execute_script("return getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0]")
    assert (int(red) > 128) == (scheme == "light")
    opened.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@pytest.mark.browser
def test_every_setting_is_plotted_as_a_series_of_its_own(opened: Driver) -> None:
    names = [chip.text for chip in opened.find_elements("css selector", "#plot-legend .chip")]
    assert {"demo/emo · layerwise", "demo/emo · layerwise · packed, LoRA rank 8 with router"} <= set(names)
    looks = opened.execute_script("return [...document.querySelectorAll('#plot-legend .key')].map(key => "
                                  "key.getAttribute('class') + key.innerHTML)")
    assert len(set(looks)) >= min(len(names), 20)  # colours, shapes and dashes repeat in the end


@pytest.mark.browser
def test_three_runs_of_different_groups_open_and_say_what_is_not_drawn(browser: Driver, tmp_path: Path) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    for keep_k, task in ((4, "arc_easy_merged"), (6, "squad_merged"), (8, "gsm8k_generation_8shot_merged")):
        add_run(tmp_path / "tree", task=task, keep_k=keep_k, trained=keep_k == 4)
    write_report(load_tree(tmp_path / "tree"), load_layout(), tmp_path / "report.html")
    browser.get((tmp_path / "report.html").as_uri())
    WebDriverWait(browser, 60).until(
        lambda page: page.execute_script("return document.documentElement.dataset.ready === 'true'"))
    assert len(browser.find_elements("css selector", "#charts .point")) == 3
    find(browser, "#stage").send_keys("after")
    assert find(browser, "#hidden").text == "Not drawn: 2 settings with an average before finetuning only."
