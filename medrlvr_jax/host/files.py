"""Crash-safe files: atomic replacement, and JSONL files that can be cut back to a step.

`reading` turns what a library raises for a user's file into an error with a remedy.
"""

import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from medrlvr_jax.host.errors import ConfigError, Unwritable

Records = list[dict[str, Any]]  # of a JSONL file
PEEK = 256  # bytes from which damaged files are recognised


def write_text(path: Path, text: str | Iterable[str]) -> None:
    """Replace a file atomically: after a crash, it has either its old content or the new one.

    `text` may be an iterable of parts. If it raises an error, the old content stays.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with named_errors(path):
        try:
            with open(temporary, "w", encoding="utf-8") as file:
                file.writelines([text] if isinstance(text, str) else text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def named_errors(path: Path) -> Iterator[None]:
    """Turn an OSError, such as a full or read-only disk, into `Unwritable`."""
    try:
        yield
    except OSError as e:
        remedy = "solve that, and run the same command again: it resumes from the newest intact checkpoint"
        raise Unwritable(f"{path} cannot be written: {e.strerror or e}; {remedy}") from e


@contextmanager
def reading(source: str | Path, remedy: str, error: type[Exception] = ConfigError) -> Iterator[None]:
    """Turn whatever a library raises while it reads `source` into `error`, with source, cause and remedy.

    Libraries raise more than they document: a bare Exception, MemoryError, a panic of Rust code. So all
    exceptions are caught, except those that end the process. Put only the library's call into the block, so
    that an error of this package keeps its traceback. If the file is visibly damaged (empty, a git-LFS
    pointer, a web page), the message says so in place of `remedy`.
    """
    try:
        yield
    except (ConfigError, error):  # it already has a remedy
        raise
    except BaseException as e:
        # pyo3's PanicException is a BaseException
        if not isinstance(e, Exception) and type(e).__name__ != "PanicException":
            raise
        text = e.strerror or str(e) if isinstance(e, OSError) else f"{type(e).__name__}: {e}"
        cause = f"cannot be read: {text[:500].rstrip('. ')}"
        raise error(f"{source}: {cause}; {diagnose(source) or remedy}") from e


def diagnose(source: str | Path) -> str | None:
    """Say how a file, or one of a folder's JSON files, is damaged, with the remedy; None if it is not."""
    try:
        if (folder := Path(source)).is_dir():
            causes = ((file, diagnose(file) or _not_json(file)) for file in sorted(folder.glob("*.json")))
            return next((f"{file.name}: {cause}" for file, cause in causes if cause), None)
        with open(source, "rb") as file:
            start = file.read(PEEK).lstrip().lower()
    except (OSError, ValueError):  # no such file, or not a path
        return None
    if not start:
        return "the file is empty; copy or download it again"
    if start.startswith(b"version https://git-lfs"):
        remedy = "run git lfs pull in its folder, or download the file"
        return f"it is a git-LFS pointer, not the file itself; {remedy}"
    if start.startswith((b"<!doctype html", b"<html")):
        return "it is a web page, not the file itself; download the file again, by its direct address"
    return None


def _not_json(path: Path) -> str | None:
    try:
        json.loads(path.read_bytes())
    except (ValueError, RecursionError) as e:
        return f"not JSON ({e}); repair it, or download it again"
    return None


def read_json(path: Path, remedy: str = "repair it, or copy it again") -> dict[str, Any]:
    """Return the object in a JSON file. Raises `ConfigError` if the file has anything else."""
    with reading(path, remedy):
        tree = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: it has a {type(tree).__name__} where a JSON object is required; {remedy}")
    return tree


def write_json(path: Path, tree: Any) -> None:
    """Write a JSON file atomically; see `json_tree` for arrays and NaN."""
    write_text(path, json.dumps(json_tree(tree), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def json_tree(value: Any) -> Any:
    """Convert a value for JSON: arrays to lists, named tuples to dicts; NaN and ±inf to None."""
    if hasattr(value, "_asdict"):
        return json_tree(value._asdict())
    if isinstance(value, dict):
        return {str(k): json_tree(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [json_tree(v) for v in value]
    if hasattr(value, "tolist"):
        return json_tree(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def jsonl(records: Iterable[dict[str, Any]]) -> str:
    """Return a line of JSON for each record; NaN and ±inf become null."""
    return "".join(json.dumps(json_tree(r), ensure_ascii=False, allow_nan=False) + "\n" for r in records)


def append(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Append lines to a JSONL file and wait until they are on the disk."""
    text = jsonl(records)
    with named_errors(path), open(path, "a", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def read_jsonl(path: Path, most: int | None = None, always: Sequence[bytes] = ()) -> Records:
    """Read all complete lines. A last one without a newline is dropped: it was cut, or is being written.

    `most`: if there are more lines, read about this many, evenly spread, the first and the last included, and
    every line that contains one of `always`.
    """
    *lines, _ = path.read_bytes().split(b"\n")
    numbers = list(range(len(lines)))
    if most is not None and len(lines) > most:
        every = -(-len(lines) // most)
        required = (i for x in always for i, line in enumerate(lines) if x in line)
        numbers = sorted({*range(0, len(lines), every), *required, len(lines) - 1})
    records = []
    for number in numbers:
        with reading(f"{path}:{number + 1}", "a crash does not cause this; repair or remove the file"):
            records.append(json.loads(lines[number].decode("utf-8", "replace")))
    return records


def short_names(folders: Sequence[Path], least: int = 1) -> list[str]:
    """Return the last `least` parts of each path, or as many as distinguish it from the others."""
    paths, out = [folder.resolve().parts for folder in folders], []
    for parts in paths:
        depth, others = least, [other for other in paths if other != parts]
        while depth < len(parts) and any(other[-depth:] == parts[-depth:] for other in others):
            depth += 1
        out.append("/".join(parts[-depth:]))
    return out


def rewind(path: Path, step: int) -> None:
    """Drop records after `step` and an incomplete last line, atomically; step 0 drops all records."""
    if path.exists():
        write_text(path, jsonl(r for r in read_jsonl(path) if step and r["step"] <= step))
