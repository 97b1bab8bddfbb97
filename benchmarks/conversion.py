"""Converting both ways against `cp` of the same bytes, in the same run, with the memory that it took.

    python benchmarks/conversion.py [--folder DIR] [--layers 4] [--rounds 3]

Everything ends on disk (fsync); sources are in the page cache for both. Memory is that above a process which only has
imported the same modules, and beside it the largest tensor, which has to be there.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from benchmarks.common import drop_page_cache, make_random_checkpoint, run_child, stopwatch, table
from emo_select.checkpoint import open_checkpoint

IMPORTS = """
import sys, time, torch
from pathlib import Path
from emo_select import progress
from emo_select.convert import to_hf, to_olmo_core
progress.configure(quiet=True)
"""
TIMED = """
start = time.perf_counter()
report = {call}
result = [time.perf_counter() - start, time.process_time(), report["memory_bytes"], report["bytes"]]
"""
TO_CORE = IMPORTS + TIMED.format(call="to_olmo_core(sys.argv[1], Path(sys.argv[2]))")
TO_HF = IMPORTS + TIMED.format(call="to_hf(Path(sys.argv[1]), Path(sys.argv[2]))")


def measure(code: str, source: Path, target: Path, rounds: int) -> dict[str, Any]:
    """Best of `rounds` for the conversion and for cp of what it wrote, taken in turn."""
    took, copied, peak = [], [], 0
    for _ in range(rounds):
        shutil.rmtree(target, ignore_errors=True)
        child = run_child(code, str(source), str(target))
        took.append(child["result"][0])
        peak = max(peak, child["peak_bytes"])
        copied.append(_copy(target, target.with_name("copy")))
    _, _, largest, size = child["result"]
    return {"seconds": min(took), "cp_seconds": min(copied), "peak": peak, "largest": largest, "bytes": size}


def _copy(source: Path, target: Path) -> float:
    with stopwatch() as seconds:
        subprocess.run(["cp", "-r", source, target], check=True)
        drop_page_cache([path for path in target.rglob("*") if path.is_file()])
    shutil.rmtree(target)
    return seconds[0]


def compared(source: Path, back: Path) -> tuple[int, int]:
    """How many tensors of `source` came back the same, one in memory at a time."""
    with open_checkpoint(source) as one, open_checkpoint(back) as other:
        names = list(one.tensors)
        same = sum(torch.equal(one.read(name), other.read(name)) for name in names if name in other.tensors)
        return same, len({*names, *other.tensors})


def main() -> None:
    """Print the comparison as a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder)")
    parser.add_argument("--layers", type=int, default=4, help="of 128 experts, 0.8 GB each")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    idle = run_child(IMPORTS)["peak_bytes"]
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        work = Path(name)
        source = make_random_checkpoint(work / "source", layers=options.layers, hidden=1024, width=512, heads=8)
        found = {"to olmo-core": measure(TO_CORE, source, work / "step0", options.rounds),
                 "to hf": measure(TO_HF, work / "step0", work / "hf", options.rounds)}
        equal, all_of_them = compared(source, work / "hf")
    rows = [(name, f"{r['bytes'] / 1e9:.2f} GB", f"{r['bytes'] / r['seconds'] / 1e6:.0f} MB/s",
             f"{r['bytes'] / r['cp_seconds'] / 1e6:.0f} MB/s", f"{r['cp_seconds'] / r['seconds']:.2f}",
             f"{(r['peak'] - idle) / 1e6:.0f} MB", f"{r['largest'] / 1e6:.0f} MB") for name, r in found.items()]
    print(table(rows, ("", "written", "convert", "cp", "convert / cp", "memory", "largest tensor")))
    print(f"{equal} of {all_of_them} tensors are the same bits after both")


if __name__ == "__main__":
    main()
