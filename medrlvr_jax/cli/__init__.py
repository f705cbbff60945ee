"""The command line: `medrlvr COMMAND …`, the same as `python -m medrlvr_jax COMMAND …`.

Each command is a typed function. cyclopts makes its parser and its help from signature and docstring. A
command imports settings and JAX only when it runs, so that `--help` and error messages appear at once. `main`
runs one command and turns errors into exit statuses.
"""

import inspect
import io
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

from cyclopts import App

from medrlvr_jax.cli import create, evaluate, examine  # noqa: F401  (they register their commands)
from medrlvr_jax.cli.app import app
from medrlvr_jax.host import environment
from medrlvr_jax.host.errors import ConfigError, MedrlvrError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Return its exit status: 0 done, 1 failed, 2 invalid input, or as its help says."""
    for stream in (sys.stdout, sys.stderr):  # print \\u2026 if the terminal's encoding has no …
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    argv = sys.argv[1:] if argv is None else argv
    function, arguments, _ = app.parse_args(argv)  # invalid arguments end the process here with status 2
    if not function.__module__.startswith(__name__):  # --help, --version
        function(*arguments.args, **arguments.kwargs)
        names, _, _ = app.parse_commands(argv)
        if names and takes_settings(app[names[0]]):
            from medrlvr_jax.config import describe

            describe.show(app.console, names[0])
        return 0 if argv else 2
    from medrlvr_jax.config import check

    name, distributed = function.__name__.strip("_"), bool(arguments.arguments.get("distributed"))
    # Without a cache if distributed: JAX would let one process compile first, and the others would wait.
    environment.prepare(cache=not distributed)
    for setting in arguments.arguments.get("settings", ()):
        if not check.reads(name, setting.partition("=")[0]):
            print(f"medrlvr {name}: {setting}: this command does not read this setting", file=sys.stderr)
    try:
        with _process_context(distributed):
            return function(*arguments.args, **arguments.kwargs)
    except MedrlvrError as e:
        print(f"medrlvr {name}: {e}", file=sys.stderr)
        return 2 if isinstance(e, ConfigError) else 1


def _process_context(distributed: bool) -> AbstractContextManager[None]:
    if not distributed:
        return exit_on_interrupt()
    from medrlvr_jax.host.processes import distributed_run

    return distributed_run()


@contextmanager
def exit_on_interrupt() -> Iterator[None]:
    """Let Ctrl-C end the process at once, unless a run handles it (`runs.log.Run`).

    Python's own handler would raise KeyboardInterrupt and wait until XLA's threads have finished compiling.
    """

    def stop(number: int, _: object) -> None:
        sys.stdout.flush()
        # Erase the progress line and show the cursor again. A print would draw the progress line once more.
        clear = "\r\x1b[2K\x1b[?25h" if os.isatty(2) else "\n"
        os.write(2, f"{clear}stopped at once\n".encode())
        os._exit(128 + number)

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def takes_settings(sub: App) -> bool:
    return sub.default_command is not None and "settings" in inspect.signature(sub.default_command).parameters
