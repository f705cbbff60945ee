"""`medrlvr watch RUN …`: the report as a page that follows its runs, served by this machine.

The server answers two requests: `GET /` with the page, and `GET /version` with a text that changes when a run
starts or has new records. The page polls the second, and loads the first when it has changed. The server
reads no other path, takes no input, and serves only the named runs. It refuses requests under another host
name, so that no web page can read it through the user's browser.
"""

import threading
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from medrlvr_jax.host.errors import ConfigError
from medrlvr_jax.report.page import Run, html, read_run

WATCHED = ("config.yaml", "metrics.jsonl", "summary.json", "eval.json")  # a run's folder has one of them


class Pages:
    """The page of some runs. It is made again when they have changed; only changed runs are read again."""

    def __init__(self, folders: Sequence[Path]):
        self._folders = list(dict.fromkeys(folder.resolve() for folder in folders))
        self._lock = threading.Lock()
        self._made, self._page = "", b""  # the version of the page, and the page
        self._runs: dict[
            Path, tuple[str, Run]
        ] = {}  # the last reading of each run, and its files' state then

    def version(self) -> str:
        """Return a text that changes when the files of the runs do."""
        return " ".join(map(files_of, self._folders))

    def page(self) -> bytes:
        with self._lock:  # so that two browsers do not make it twice
            version = self.version()
            if version != self._made:
                states = {folder: state for folder in self._folders if (state := files_of(folder)) != "-"}
                for folder, state in states.items():
                    state = f"{state} of {len(states)}"  # the number of runs limits the steps read of each
                    if self._runs.get(folder, ("",))[0] != state:
                        self._runs[folder] = state, read_run(folder, len(states))
                awaited = [folder for folder in self._folders if folder not in states]
                page = html([self._runs[folder][1] for folder in states], version, awaited)
                self._made, self._page = version, page.encode()
            return self._page


def files_of(folder: Path) -> str:
    """Return the times and sizes of a run's files; "-" if it has none yet."""
    stats = [file.stat() for name in WATCHED if (file := folder / name).exists()]
    return ",".join(f"{stat.st_mtime_ns:x}.{stat.st_size:x}" for stat in stats) or "-"


def server(folders: Sequence[Path], host: str, port: int) -> ThreadingHTTPServer:
    """Return the server, which is not started yet. `port` 0 takes a free port.

    The page waits for folders that do not exist. Raises `ConfigError` if a folder exists but is no run, or if
    it cannot be read.
    """
    for folder in folders:
        if folder.exists() and files_of(folder) == "-":
            read_run(folder)  # raises the error
    pages = Pages(folders)
    pages.page()

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
            pass  # requests are not logged

    try:
        return ThreadingHTTPServer((host, port), Handler)
    except OSError as e:
        raise ConfigError(f"--port {port}, --host {host}: {e.strerror}; give another --port") from None
