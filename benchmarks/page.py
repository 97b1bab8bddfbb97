"""Size and opening time of the clusters page at the published size: 12,000 documents × 100 tokens × 2 models.

Tokens follow Zipf's law over 50,000 pieces, as hard to compress as text is; clusters are drawn per document, and a
fifth of the tokens at random. Needs Chromium and its driver for the opening time.

    python benchmarks/page.py [--documents 12000] [--tokens 100] [--models 2] [--k 32]
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "analysis"))
from page_cases import ByteTokenizer, make_model

from emo_select.analysis import page

PIECES = 50_000


def build(root: Path, documents: int, tokens: int, models: int, k: int) -> list[Path]:
    draw = np.random.default_rng(0)
    zipf = 1 / np.arange(1, PIECES + 1)
    ids = draw.choice(PIECES, size=(documents, tokens), p=zipf / zipf.sum())
    words = [f"word{i}" for i in range(12)]
    labels = ["dclm", "starcoder", "pes2o", "proofpile", "wikipedia"]
    made = []
    for number in range(models):
        topic = draw.integers(k, size=(documents, 1)) + draw.integers(3, size=(documents, tokens))
        stray = draw.integers(k, size=(documents, tokens))
        clusters = np.where(draw.random((documents, tokens)) < 0.2, stray, topic % k).ravel()
        made.append(make_model(root, f"model{number}", ids, clusters, k, labels=labels, words=words, layers=16,
                               experts=127, seed=number))
    return made


def opening_seconds(file: Path) -> tuple[float, float]:
    """Seconds until the page is drawn, and until a document of it is."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage"):
        options.add_argument(f"--{flag}")
    browser = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    try:
        times = []
        for address in ("", "#doc=1624"):
            browser.get("about:blank")
            browser.get(file.as_uri() + address)
            while browser.execute_script("return document.documentElement.dataset.ready") != "true":
                time.sleep(0.01)
            times.append(float(browser.execute_script("return performance.now()")) / 1000)
        return times[0], times[1]
    finally:
        browser.quit()


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, default in (("documents", 12_000), ("tokens", 100), ("models", 2), ("k", 32)):
        parser.add_argument(f"--{name}", type=int, default=default)
    wanted = parser.parse_args()
    draw = np.random.default_rng(1)
    letters = np.array(list("etaoinshrdlucmfwypvbgkqjxz"))
    pieces = [" ".join(["", "".join(draw.choice(letters, size=draw.integers(2, 9)))]).encode() for _ in range(PIECES)]
    page.tokenizer_of = lambda info: ByteTokenizer(pieces)  # type: ignore[assignment]
    with tempfile.TemporaryDirectory() as folder:
        models = build(Path(folder), wanted.documents, wanted.tokens, wanted.models, wanted.k)
        begun = time.process_time()
        file = page.write_page(models, Path(folder) / "page.html")
        print(f"page: {file.stat().st_size / 1e6:.2f} MB, written in {time.process_time() - begun:.1f} s of CPU")
        if shutil.which("chromium") and shutil.which("chromedriver"):
            whole, document = opening_seconds(file)
            print(f"opens in {whole:.2f} s, on a document in {document:.2f} s")


if __name__ == "__main__":
    main()
