"""Pruning against `cp` of the same bytes, in the same run, with the memory that pruning took.

    python benchmarks/pruning.py [--folder DIR] [--layers 4] [--keep-k 64] [--rounds 6]

Both sides end with everything on disk (fsync); the source is in the page cache for both.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.common import make_random_checkpoint, run_child, stopwatch, table
from emo_select.checkpoint import open_checkpoint
from emo_select.experts.keepset import KeepSet

PRUNE = """
import sys, time
from pathlib import Path
from emo_select import progress
from emo_select.experts.keepset import KeepSet
from emo_select.experts.prune import prune_checkpoint
progress.configure(quiet=True)
start = time.perf_counter()
prune_checkpoint(sys.argv[1], KeepSet.load(Path(sys.argv[2])), Path(sys.argv[3]))
result = time.perf_counter() - start
"""


def compare(source: Path, keep_k: int, work: Path, rounds: int = 3) -> dict[str, Any]:
    """Best of `rounds` for prune and for cp of what prune wrote, taken in turn.

    Returns: seconds of each, bytes written, bytes/s of each, their ratio, peak resident memory of the pruning process.
    """
    config = open_checkpoint(source).config
    kept = (*range(0, 2 * (keep_k - 1), 2), config["num_experts"] - 1)  # every other expert: nothing is contiguous
    KeepSet(experts=(kept,) * config["num_hidden_layers"], method="random", keep_k=keep_k, num_shared=1,
            model=str(source)).save(work / "selection.json")
    prune_s, copy_s, peak = [], [], 0
    for _ in range(rounds):
        os.sync()  # else the disk is still busy with what was written before
        child = run_child(PRUNE, str(source), str(work / "selection.json"), str(work / "pruned"))
        prune_s.append(child["result"])
        peak = max(peak, child["peak_bytes"])
        os.sync()
        copy_s.append(_copy(work / "pruned", work / "copy"))
    size = open_checkpoint(work / "pruned").total_bytes
    return {"bytes": size, "prune_s": min(prune_s), "cp_s": min(copy_s), "prune_rate": size / min(prune_s),
            "cp_rate": size / min(copy_s), "ratio": min(copy_s) / min(prune_s), "peak_bytes": peak}


def _copy(source: Path, target: Path) -> float:
    shutil.rmtree(target, ignore_errors=True)
    with stopwatch() as seconds:
        subprocess.run(["cp", "-r", source, target], check=True)
        for path in target.iterdir():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
    return seconds[0]


def main() -> None:
    """Print the comparison as a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder)")
    parser.add_argument("--layers", type=int, default=4, help="of 128 experts")
    parser.add_argument("--hidden", type=int, default=1024, help="with --width 512 matrices of 2 MB: 0.8 GB a layer")
    parser.add_argument("--width", type=int, default=512, help="of an expert")
    parser.add_argument("--keep-k", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=6)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as work:
        source = make_random_checkpoint(Path(work) / "source", layers=options.layers, hidden=options.hidden,
                                        width=options.width, heads=8)
        found = compare(source, options.keep_k, Path(work), options.rounds)
    rows = [("bytes written", f"{found['bytes'] / 1e9:.2f} GB"), ("prune", f"{found['prune_rate'] / 1e6:.0f} MB/s"),
            ("cp", f"{found['cp_rate'] / 1e6:.0f} MB/s"), ("prune / cp", f"{found['ratio']:.2f}"),
            ("peak memory of prune", f"{found['peak_bytes'] / 1e6:.0f} MB")]
    print(table(rows, ("", "")))


if __name__ == "__main__":
    main()
