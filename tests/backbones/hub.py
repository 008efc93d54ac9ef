"""A model hub on this machine that speaks the part of the Hugging Face protocol that downloads use.

`MODELS` is a folder of `owner/name` folders. Requests for a file in `broken` are cut after half of it.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class _Hub(ThreadingHTTPServer):
    models: Path
    broken: set[str]
    gated: set[str]


class _Handler(BaseHTTPRequestHandler):
    server: _Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def log_message(self, *arguments: object) -> None:
        pass

    def _answer(self, body: bool) -> None:
        parts = self.path.split("?")[0].strip("/").split("/")
        name = "/".join(parts[2:4] if parts[:2] == ["api", "models"] else parts[:2])
        folder = self.server.models / name
        if name in self.server.gated:
            return self._send(403, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": "gated"}, body)
        if not folder.is_dir():
            return self._send(401, b"", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "not found"}, body)
        if parts[0] == "api":
            files = sorted(path for path in folder.iterdir())
            siblings = [{"rfilename": path.name, "size": path.stat().st_size} for path in files]
            tree = [{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": _etag(f)} for f in files]
            answer = tree if "tree" in parts else {"id": name, "sha": COMMIT, "siblings": siblings}
            return self._send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"}, body)
        file = folder / "/".join(parts[4:])
        if not file.is_file():
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound"}, body)
        headers = {"ETag": f'"{_etag(file)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "none"}
        return self._send(200, file.read_bytes(), headers, body, cut=file.name in self.server.broken)

    def _send(self, status: int, content: bytes, headers: dict[str, str], body: bool, cut: bool = False) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(content[: len(content) // 2] if cut else content)
        self.close_connection = cut


def _etag(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


@contextmanager
def hub(models: Path, broken: set[str] | None = None, gated: set[str] | None = None) -> Iterator[str]:
    """Serve until the block ends; gives the address to put into HF_ENDPOINT."""
    server = _Hub(("127.0.0.1", 0), _Handler)
    server.models, server.broken, server.gated = models, broken or set(), gated or set()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
