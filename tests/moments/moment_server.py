"""One warm process that runs `emo-select` commands in forked children, with a fault at a chosen change of the disk.

A request is a line of JSON on stdin, the answer one on stdout. Every call that changes the disk below `root` is a
*moment*: opening a file to write (and having opened it), writing by `pwrite`, flushing, making, renaming, linking,
cutting and removing. At moment number `at` the child is killed ("kill"), or from there on every change that needs room
fails ("full"); with "readonly" nothing below `root` may be changed.
"""

import builtins
import errno
import io
import json
import os
import signal
import sys
import time
import traceback

GROWING = ("open", "opened", "mkdir", "pwrite", "fsync", "link", "symlink", "truncate")
NAMES = {"os.rename": "rename", "os.remove": "remove", "os.rmdir": "rmdir", "os.mkdir": "mkdir", "os.link": "link",
         "os.symlink": "symlink", "os.truncate": "truncate"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Moments:
    """Counts the changes of the disk below `root` and does what was asked at one of them."""

    def __init__(self, root: str, fault: str | None, at: int) -> None:
        self.root, self.fault, self.at, self.seen = os.path.realpath(root), fault, at, []

    def place(self, path, folder=-1) -> str | None:
        """The path below the root; None for everything else."""
        if isinstance(path, int):
            path = os.readlink(f"/proc/self/fd/{path}")
        path = os.fsdecode(path)
        if not os.path.isabs(path):
            base = os.readlink(f"/proc/self/fd/{folder}") if isinstance(folder, int) and folder >= 0 else os.getcwd()
            path = os.path.join(base, path)
        path = os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))
        return os.path.relpath(path, self.root) if path.startswith(self.root + os.sep) else None

    def covers(self, path) -> bool:
        """Whether a path is the root or lies below it."""
        return self.place(path) is not None or os.path.realpath(path) == self.root

    def happens(self, kind: str, path, folder=-1) -> None:
        place = self.place(path, folder)
        if place is None:
            return
        self.seen.append((kind, place))
        if self.fault == "kill" and len(self.seen) == self.at:
            os._exit(137)
        if self.fault == "full" and len(self.seen) >= self.at and kind in GROWING:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), *([] if kind == "opened" else [str(path)]))
        if self.fault == "readonly":
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    def hook(self, event: str, args: tuple) -> None:
        if event == "open":
            path, _, flags = args
            if not isinstance(path, int) and isinstance(flags, int) and flags & WRITING and path is not None:
                self.happens("open", path)
        elif event in NAMES:
            folder = next((arg for arg in args[1:] if isinstance(arg, int) and arg >= 0), -1) \
                if event in ("os.remove", "os.rmdir") else -1
            self.happens(NAMES[event], args[1] if event in ("os.link", "os.symlink") else args[0], folder)

    def install(self) -> None:
        """From now on, in this process; there is no way back, which a forked child does not need."""
        sys.addaudithook(self.hook)
        plain = io.open

        def opened(file, mode="r", *args, **kwargs):
            found = plain(file, mode, *args, **kwargs)
            if set(mode) & set("wax+") and not isinstance(file, int):
                self.happens("opened", file)
            return found

        io.open = builtins.open = opened
        for name in ("pwrite", "fsync"):
            setattr(os, name, self.wrapped(name, getattr(os, name) if name == "pwrite" else lambda descriptor: None))
        if self.fault == "readonly":
            allowed = os.access
            os.access = lambda path, mode, **options: (
                allowed(path, mode, **options) and not (mode & os.W_OK and self.covers(path)))

    def wrapped(self, name: str, plain):
        def call(descriptor, *args):
            self.happens(name, descriptor)
            return plain(descriptor, *args)

        return call


def child(request: dict) -> None:
    """Run one command and end the process."""
    os.chdir(request["cwd"])
    os.environ.update(request["env"])
    out = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.stdout = io.TextIOWrapper(os.fdopen(1, "wb", closefd=False), line_buffering=True)
    sys.stderr = io.TextIOWrapper(os.fdopen(2, "wb", closefd=False), line_buffering=True, errors="backslashreplace")
    sys.argv = ["emo-select", *request["words"]]
    from emo_select.cli.app import main

    moments = Moments(request["root"], request["fault"], request["at"])
    code = 0
    try:
        moments.install()
        main()
    except SystemExit as done:
        code = done.code if isinstance(done.code, int) else int(done.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 99
    sys.stdout.flush()
    sys.stderr.flush()
    with open(request["log"] + ".seen", "w") as answer:
        json.dump(moments.seen, answer)
    os._exit(code)


def carry_out(request: dict) -> dict:
    """Fork, wait, and report; a child that takes too long is killed and has no code."""
    number = os.fork()
    if not number:
        child(request)
    deadline = time.monotonic() + request["timeout"]
    while not (found := os.waitpid(number, os.WNOHANG))[0]:
        if time.monotonic() > deadline:
            os.kill(number, signal.SIGKILL)
            os.waitpid(number, 0)
            return {"code": None, "seen": []}
        time.sleep(0.002)
    try:
        with open(request["log"] + ".seen") as seen:
            return {"code": os.waitstatus_to_exitcode(found[1]), "seen": json.load(seen)}
    except FileNotFoundError:  # killed
        return {"code": os.waitstatus_to_exitcode(found[1]), "seen": []}


def main() -> None:
    import gc
    import importlib

    requests, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    for name in sys.argv[1:]:
        importlib.import_module(name)
    gc.freeze()
    for line in requests:
        print(json.dumps(carry_out(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
