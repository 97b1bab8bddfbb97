"""Time to read, table and report a tree of 10,000 synthetic runs.

    python benchmarks/tables.py [--runs 10000] [--browser]

The runs have the sizes of real ones: two evaluated checkpoints each, a training history in run.json, and keep sets with
scores for 16 layers of 128 experts. Every measurement is a fresh process; files are in the page cache, since they
were just written. `--browser` also opens the report in headless Chromium and sorts its largest table.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from common import run_child, stopwatch, table

from emo_select.record import RunRecord, StageRecord
from emo_select.spec import Calibration, RunSpec
from emo_select.tables import load_layout
from emo_select.tree import Tree

LAYERS, EXPERTS, STEPS = 16, 128, 200

SUMMARY = """
import sys, time
from emo_select.tables import load_layout, load_tree, make, render
records = load_tree(sys.argv[1])
tables, problems = make(sys.argv[2], records, load_layout(), rows="found")
written = [render(one, "csv") for one in tables]
result = {"runs": len(records.runs), "rows": sum(len(one.rows) for one in tables), "cpu": time.process_time()}
"""
REPORT = """
import sys, time
from pathlib import Path
from emo_select.tables import load_layout, load_tree
from emo_select.tables.report import write_report
write_report(load_tree(sys.argv[1]), load_layout(), Path(sys.argv[2]))
result = {"bytes": Path(sys.argv[2]).stat().st_size, "cpu": time.process_time()}
"""


def specs() -> Iterator[RunSpec]:
    """Endless variety in the order of a sweep: models, keep-k, methods, calibration sizes and seeds, tasks."""
    tasks = [task for group in load_layout().groups.values() for task in group.tasks if "*" not in task]
    models = ("allenai/Emo_1b14b_1T", "allenai/StdMoE_1b14b_1T", "acme/Other-MoE")
    calibrations = [Calibration(num_examples=n, seed=seed) for n in (None, 1, 10, 100) for seed in (0, 1, 2)]
    for calibration, keep_k, method, model, task in itertools.product(
            calibrations, (128, 64, 32, 16, 8), ("layerwise", "easy_ep", "global"), models, tasks):
        yield RunSpec(model=model, task=task, keep_k=keep_k, method=method, calibration=calibration)


def write_tree(root: Path, count: int) -> None:
    """`count` runs, written plainly; keep sets of the same keep-k share one file by hard links."""
    draw = random.Random(0)
    selections = root.parent / "selections"
    selections.mkdir()
    for spec in itertools.islice(specs(), count):
        paths = Tree(root).run(spec)
        paths.directory.mkdir(parents=True)
        shared = selections / str(spec.keep_k)
        if not shared.exists():
            shared.write_text(json.dumps(selection(spec.keep_k, draw)))
        os.link(shared, paths.selection)
        paths.record.write_text(record(spec, draw).model_dump_json())
        for step in (0, STEPS):
            paths.result(step).mkdir(parents=True)
            file = paths.result(step) / f"task-{spec.task}_rc_test-metrics.json"
            file.write_text(json.dumps(metrics(spec, draw)))


def selection(keep_k: int, draw: random.Random) -> dict[str, Any]:
    """selection.json of a layerwise run."""
    return {"experts": [sorted(draw.sample(range(EXPERTS), keep_k)) for _ in range(LAYERS)], "method": "layerwise",
            "keep_k": keep_k, "num_shared": 1, "score": "router_probability",
            "scores": [[draw.random() for _ in range(EXPERTS)] for _ in range(LAYERS)]}


def record(spec: RunSpec, draw: random.Random) -> RunRecord:
    """run.json with a training history of `STEPS` steps."""
    history = [{"step": i + 1, "loss": draw.random(), "learning_rate": 5e-5, "grad_norm": draw.random(),
                "tokens_per_second": 1e4 * draw.random()} for i in range(STEPS)]
    stage = StageRecord(fingerprint="0" * 16, started="2026-01-01T00:00:00+00:00", seconds=10.0, peak_memory=10**10,
                        outputs={f"selected_model/model-{i:05}.safetensors": 5 * 10**9 for i in range(1, 4)})
    trained = stage.model_copy(update={"notes": {"history": history}, "outputs": {}})
    names = {"select": stage, "prune": stage, "finetune": trained, "eval/checkpoint-0": stage,
             f"eval/checkpoint-{STEPS}": stage}
    return RunRecord(spec=spec, stages=names)


def metrics(spec: RunSpec, draw: random.Random) -> dict[str, Any]:
    """A metrics file with the names and the size of a published one."""
    names = ("acc_raw", "acc_per_token", "acc_per_char", "acc_per_byte", "acc_uncond", "softloss_corr", "exact_match",
             "f1", "recall", "sum_logits_corr", "logits_per_char_corr", "bits_per_byte_corr", "primary_score")
    values = {name: draw.random() for name in names}
    return {"task_name": f"{spec.task}:rc_test", "task_config": {"primary_metric": "acc_raw", "filler": "x" * 1500},
            "num_instances": 1000, "metrics": values, "standard_errors": dict.fromkeys(names, 0.01)}


def measure_browser(path: Path) -> dict[str, float]:
    """Seconds from opening the page until it is ready, and for sorting the table of runs."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service
    from selenium.webdriver.support.ui import WebDriverWait

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage"):
        options.add_argument(f"--{flag}")
    page = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver") or ""))
    try:
        with stopwatch() as opening:
            page.get(path.as_uri())
            WebDriverWait(page, 120).until(lambda p: p.execute_script("return document.documentElement.dataset.ready"))
        with stopwatch() as sorting:
            page.execute_script("document.querySelectorAll('section[aria-labelledby=runs-title] th button')[7].click()")
    finally:
        page.quit()
    return {"open": opening[0], "sort": sorting[0]}


def cost(done: dict[str, Any]) -> tuple[str, str, str]:
    """Wall-clock time, time of the processor, peak memory of a child."""
    return (f"{done['seconds']:.1f} s", f"{done['result']['cpu']:.1f} s", f"{done['peak_bytes'] / 1e6:.0f} MB")


def main() -> None:
    """Make the tree, measure, print a markdown table."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--runs", type=int, default=10_000)
    options.add_argument("--browser", action="store_true")
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        root, page = Path(scratch) / "tree", Path(scratch) / "report.html"
        os.environ["XDG_CACHE_HOME"] = f"{scratch}/cache"
        write_tree(root, chosen.runs)
        rows = []
        for what, kind in (("table summary, first time", "summary"), ("table summary, again", "summary"),
                           ("table main, every run a row", "main"), ("table calibration", "calibration")):
            done = run_child(SUMMARY, str(root), kind)
            rows.append([what, *cost(done), f"{done['result']['runs']} runs, {done['result']['rows']} rows"])
        done = run_child(REPORT, str(root), str(page))
        rows.append(["report", *cost(done), f"{done['result']['bytes'] / 1e6:.1f} MB of HTML"])
        if chosen.browser:
            seen = measure_browser(page)
            rows.append(["report in headless Chromium", f"{seen['open']:.1f} s to open", "", "",
                         f"{seen['sort']:.2f} s to sort the runs"])
        print(table(rows, ["what", "time", "CPU time", "peak memory", "size"]))


if __name__ == "__main__":
    main()
