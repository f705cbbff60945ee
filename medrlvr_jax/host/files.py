"""Files that a crash cannot leave half written: whole ones by an atomic move, JSON lines by appending and rewinding.

And files that others wrote: `reading` says in words what a library could not read.
"""

import json
import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from medrlvr_jax.host.errors import ConfigError, Unwritable

PEEK = 256  # bytes of a file, by which one that holds something else than its name says is recognised


def write_text(path: Path, text: str) -> None:
    """All or nothing: a reader, or a run after a crash, sees the old file or the new one, never half of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with named_errors(path):
        try:
            with open(temporary, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise


@contextmanager
def named_errors(path: Path) -> Iterator[None]:
    """A disk that is full, read-only or gone, in words. What is on it already stays: nothing here is overwritten in place."""
    try:
        yield
    except OSError as e:
        remedy = "what was saved before is untouched: mend that, and the same command goes on from the newest checkpoint"
        raise Unwritable(f"{path} cannot be written: {e.strerror or e}; {remedy}") from e


@contextmanager
def reading(source: str | Path, remedy: str, error: type[Exception] = ConfigError) -> Iterator[None]:
    """Around one call of a library that reads what a user named (`source`): whatever it raises becomes an `error` that holds the name,
    the cause and the remedy, with the library's own error chained to it.

    Libraries raise more than they document: a bare Exception, a MemoryError, a panic of code in Rust. So all is taken that does not ask
    the process to end. Only the library's call belongs inside, for a fault of this package must keep its traceback. Where the file itself
    shows what went wrong with it (it is empty, a git-LFS pointer, a web page), the message says that instead of `remedy`.
    """
    try:
        yield
    except (ConfigError, error):  # in words already
        raise
    except BaseException as e:
        if not isinstance(e, Exception) and type(e).__name__ != "PanicException":  # pyo3's is no Exception
            raise
        cause = e.strerror or str(e) if isinstance(e, OSError) else f"{type(e).__name__}: {e}"
        raise error(f"{source}: cannot be read: {cause[:500].rstrip('. ')}; {what_else(source) or remedy}") from e


def what_else(source: str | Path) -> str | None:
    """What a file, or one of a folder's JSON files, holds that went wrong on its way here, and the remedy; None where nothing shows."""
    try:
        if (folder := Path(source)).is_dir():
            wrong = ((file.name, what_else(file) or _no_json(file)) for file in sorted(folder.glob("*.json")))
            return next((f"{name}: {why}" for name, why in wrong if why), None)
        with open(source, "rb") as file:
            start = file.read(PEEK).lstrip().lower()
    except (OSError, ValueError):  # no file, or no name of one
        return None
    if not start:
        return "the file is empty; copy or download it again"
    if start.startswith(b"version https://git-lfs"):
        return "it is a git-LFS pointer, not the file itself; run git lfs pull in its folder, or download the file"
    if start.startswith((b"<!doctype html", b"<html")):
        return "it is a web page, not the file itself; download the file again, by its direct address"
    return None


def _no_json(path: Path) -> str | None:
    try:
        json.loads(path.read_bytes())
    except (ValueError, RecursionError) as e:
        return f"not JSON ({e}); repair it, or download it again"
    return None


def read_json(path: Path, remedy: str = "repair it, or copy it again") -> dict[str, Any]:
    """The object that a JSON file holds."""
    with reading(path, remedy):
        tree = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: {type(tree).__name__} where a JSON object is needed; {remedy}")
    return tree


def write_json(path: Path, tree: Any) -> None:
    write_text(path, json.dumps(_plain(tree), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def _plain(value: Any) -> Any:
    """For JSON: arrays as lists, and NaN and ±inf, which JSON does not have, as null; the key stays."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def append(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Add lines to a JSONL file; on the disk when this returns. Call it once a step: each call waits for the disk."""
    lines = [json.dumps(_plain(r), ensure_ascii=False, allow_nan=False) + "\n" for r in records]
    with named_errors(path), open(path, "a", encoding="utf-8") as file:
        file.write("".join(lines))
        file.flush()
        os.fsync(file.fileno())


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """All whole lines. A last line without its newline was torn by a crash, or is being written: it does not count."""
    *lines, _ = path.read_text(encoding="utf-8", errors="replace").split("\n")
    records = []
    for number, line in enumerate(lines, 1):
        with reading(f"{path}:{number}", "a crash cannot do this, so repair or remove the file"):
            records.append(json.loads(line))
    return records


def rewind(path: Path, step: int) -> None:
    """Drop what was logged after `step`, and a torn last line, in one atomic move; 0 is a new start, and keeps nothing."""
    if path.exists():
        records = [r for r in read_jsonl(path) if step and r["step"] <= step]
        write_text(path, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records))
