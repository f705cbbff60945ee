"""The command line: `medrlvr COMMAND …`, the same as `python -m medrlvr_jax COMMAND …`.

Each command is a typed function: cyclopts makes its parser and its help from the signature and the docstring.
A command imports what it needs, the settings and JAX, when it runs: so `--help` and a refusal come at once.
`main` runs one command, and is the one place where errors become exit statuses.
"""

import inspect
import io
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from cyclopts import App

from medrlvr_jax.cli import create, evaluate, examine  # noqa: F401  (each registers its commands)
from medrlvr_jax.cli.app import app
from medrlvr_jax.host import environment
from medrlvr_jax.host.errors import ConfigError, MedrlvrError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns its exit status: 0 done, 1 failed, 2 unusable input; its help has others."""
    for stream in (sys.stdout, sys.stderr):  # a terminal whose encoding lacks … or β shows \\u2026 instead
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    argv = sys.argv[1:] if argv is None else argv
    function, arguments, _ = app.parse_args(argv)  # unusable arguments end the process here, with status 2
    if not function.__module__.startswith(__name__):  # --help, --version
        function(*arguments.args, **arguments.kwargs)
        names, _, _ = app.parse_commands(argv)
        if names and takes_settings(app[names[0]]):
            from medrlvr_jax.config import describe

            describe.show(app.console, names[0])
        return 0 if argv else 2
    from medrlvr_jax.config import check

    name, distributed = function.__name__.strip("_"), bool(arguments.arguments.get("distributed"))
    environment.prepare(cache=not distributed)  # JAX would fill one process's cache, and the others wait
    for setting in arguments.arguments.get("settings", ()):
        if not check.reads(name, setting.partition("=")[0]):
            print(f"medrlvr {name}: {setting}: this command does not read it", file=sys.stderr)
    try:
        with together() if distributed else stopped_without_traceback():
            return function(*arguments.args, **arguments.kwargs)
    except MedrlvrError as e:
        print(f"medrlvr {name}: {e}", file=sys.stderr)
        return 2 if isinstance(e, ConfigError) else 1


@contextmanager
def together() -> Iterator[None]:
    """Run as one of several processes."""
    from medrlvr_jax.host.processes import distributed_run

    with distributed_run():
        yield


@contextmanager
def stopped_without_traceback() -> Iterator[None]:
    """While no other handler takes it (see `runs.log.Run`), Ctrl-C ends the process at once.

    Python's own handler would raise KeyboardInterrupt and wait until XLA's threads have compiled.
    """

    def stop(number: int, _: object) -> None:
        sys.stdout.flush()
        # in place of the progress line, which hides the cursor and would be drawn again below a print
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
