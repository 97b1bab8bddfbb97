"""A small local stand-in for the Hub's web server, so that huggingface_hub itself runs in the tests.

Serves `root/{datasets,models}/OWNER/NAME/REVISION/…` and counts what is asked.
"""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Hub(BaseHTTPRequestHandler):
    root: Path
    cut_after: dict[str, int]  # file name → bytes after which the first download breaks
    asked: list[str]

    def log_message(self, *args: object) -> None:
        """Quiet."""

    def do_HEAD(self) -> None:
        self.do_GET(body=False)

    def do_GET(self, body: bool = True) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        self.asked.append(f"{self.command} {path} {self.headers.get('Range', '')}".strip())
        if path.startswith("api/"):
            self._api(path.removeprefix("api/").split("/"))
        else:
            self._file(path if path.startswith("datasets/") else f"models/{path}", body)

    def _api(self, parts: list[str]) -> None:
        kind, repository, rest = parts[0], "/".join(parts[1:3]), parts[3:]
        revision = "/".join(rest[1:]) or "main"
        folder = self._folder(kind, repository, revision)
        if folder is None:
            self._json({"error": "no such revision"}, 404, "RevisionNotFound")
            return
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        if rest[:1] == ["tree"]:
            entries = [{"type": "file", "path": file.relative_to(folder).as_posix(), "size": file.stat().st_size,
                        "oid": "0"} for file in files]
            self._json(entries)
            return
        siblings = [{"rfilename": file.relative_to(folder).as_posix(), "size": file.stat().st_size} for file in files]
        self._json({"id": repository, "sha": folder.name, "siblings": siblings, "tags": [], "private": False})

    def _folder(self, kind: str, repository: str, revision: str) -> Path | None:
        """Revisions are folders named by their commit; the file REFS maps branch names to them."""
        base = self.root / kind / repository
        refs = json.loads((base / "REFS").read_text()) if (base / "REFS").exists() else {}
        folder = base / refs.get(revision, revision)
        return folder if folder.is_dir() else None

    def _file(self, path: str, body: bool) -> None:
        front, _, rest = path.partition("/resolve/")
        commit, _, name = rest.partition("/")
        file = self.root / front / commit / name
        if not file.is_file():
            self._json({"error": "no such entry"}, 404, "EntryNotFound")
            return
        data = file.read_bytes()
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0]) if body else 0
        self.send_response(206 if start else 200)
        self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", commit)
        self.send_header("Content-Length", str(len(data) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        if body:
            self.wfile.write(data[start: self.cut_after.pop(name, len(data))])
            self.close_connection = True

    def _json(self, value: object, status: int = 200, error: str = "") -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        if error:
            self.send_header("X-Error-Code", error)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


@contextmanager
def serve(root: Path, cut_after: dict[str, int] | None = None) -> Iterator[tuple[str, list[str]]]:
    """Serve `root`; gives the endpoint and the list of what was asked."""
    asked: list[str] = []
    handler = type("Bound", (Hub,), {"root": root, "cut_after": dict(cut_after or {}), "asked": asked})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
