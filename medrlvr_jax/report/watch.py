"""`medrlvr watch RUN …`: the report as a page that follows its runs, from a small server on this machine.

The server answers two requests, `GET /` with the page and `GET /version` with a number that changes when a
run has new records. It reads no other path, takes no input, and serves the named runs alone. A request under
another host name is refused, so that no page of the web can read it through the user's browser.
"""

import tempfile
import threading
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from medrlvr_jax.host.errors import ConfigError
from medrlvr_jax.report.page import read_run, write_page

WATCHED = ("metrics.jsonl", "summary.json", "eval.json")


class Pages:
    """The page of some runs, made again when they have changed."""

    def __init__(self, folders: Sequence[Path]):
        self._folders, self._lock = list(folders), threading.Lock()
        self._made, self._page = "", b""

    def version(self) -> str:
        """Changes with the files of the runs."""
        files = [folder / name for folder in self._folders for name in WATCHED]
        stats = [file.stat() for file in files if file.exists()]
        return "-".join(f"{stat.st_mtime_ns:x}.{stat.st_size:x}" for stat in stats)

    def page(self) -> bytes:
        with self._lock:  # two browsers do not make it twice
            version = self.version()
            if version != self._made:
                with tempfile.TemporaryDirectory() as folder:
                    out = Path(folder) / "report.html"
                    write_page(self._folders, out, live=version)
                    self._made, self._page = version, out.read_bytes()
            return self._page


def server(folders: Sequence[Path], host: str, port: int) -> ThreadingHTTPServer:
    """The server, not started yet. `port` 0 takes a free one. Raises `ConfigError` for what is no run."""
    for folder in folders:
        read_run(folder)
    pages = Pages(folders)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name = (self.headers.get("Host") or "").rsplit(":", 1)[0]
            if name not in (host, "localhost", "127.0.0.1", "[::1]"):
                self.send_error(403)
            elif self.path == "/":
                self._send(pages.page(), "text/html; charset=utf-8")
            elif self.path == "/version":
                self._send(pages.version().encode(), "text/plain")
            else:
                self.send_error(404)

        def _send(self, body: bytes, kind: str) -> None:
            self.send_response(200)
            headers = {"Content-Type": kind, "Content-Length": str(len(body)), "Cache-Control": "no-store"}
            for header, value in (headers | {"X-Content-Type-Options": "nosniff"}).items():
                self.send_header(header, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass  # the terminal stays as it is

    try:
        return ThreadingHTTPServer((host, port), Handler)
    except OSError as e:
        raise ConfigError(f"--port {port}, --host {host}: {e.strerror}; give another --port") from None
