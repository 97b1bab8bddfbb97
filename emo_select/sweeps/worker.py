"""A worker of the local executor: does one unit after the other, so that heavy imports are paid once.

Reads the path of a unit's file per line from stdin, answers each with `done` or `failed` on stdout; what the unit
itself prints goes to its log. The end of stdin, and so the death of who started it, stops it.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from pathlib import Path
from queue import SimpleQueue
from types import FrameType

from emo_select.sweeps import work


def main() -> None:
    """Serve until stdin ends."""
    signal.signal(signal.SIGTERM, _stop)
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    asked: SimpleQueue[str] = SimpleQueue()
    threading.Thread(target=_listen, args=(asked,), daemon=True).start()
    while True:
        unit_file, log = asked.get().split("\t")
        answers.write(_attempt(Path(unit_file), Path(log)) + "\n")


def _listen(asked: SimpleQueue[str]) -> None:
    for line in sys.stdin:
        asked.put(line.rstrip("\n"))
    os.kill(os.getpid(), signal.SIGTERM)


def _attempt(unit_file: Path, log: Path) -> str:
    os.environ[work.LOG_VARIABLE] = str(log)
    with log.open("a") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
        try:
            work.perform(unit_file)
        except Exception:
            traceback.print_exc()
            return "failed"
        return "done"


def _stop(signum: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + signum)  # unwinds the stack, so that the attempt is recorded and locks are released


if __name__ == "__main__":
    main()
