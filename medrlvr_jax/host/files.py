"""Files that a crash cannot leave half written: atomic replacement, and JSON lines that can be rewound.

`reading` turns what a library raises on a user's file into an error with a remedy.
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
PEEK = 256  # bytes read to recognise a file whose content is not what its name says


def write_text(path: Path, text: str | Iterable[str]) -> None:
    """Replace a file atomically: readers, and a run after a crash, see the old content or the new one. `text`
    may come in parts; an error in making one leaves the old content.
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
    """Turn an OSError (disk full, read-only or gone) into `Unwritable`."""
    try:
        yield
    except OSError as e:
        again = "the same command goes on from the newest checkpoint"
        remedy = f"what was saved before is untouched: mend that, and {again}"
        raise Unwritable(f"{path} cannot be written: {e.strerror or e}; {remedy}") from e


@contextmanager
def reading(source: str | Path, remedy: str, error: type[Exception] = ConfigError) -> Iterator[None]:
    """Turn whatever a library raises while it reads `source` into `error`: name, cause and remedy.

    Libraries raise more than they document: a bare Exception, MemoryError, a panic of Rust code. So
    everything is caught that does not ask the process to end. Put only the library's call inside, so that a
    fault of this package keeps its traceback. If the file itself shows the cause (it is empty, a git-LFS
    pointer, a web page), the message says that in place of `remedy`.
    """
    try:
        yield
    except (ConfigError, error):  # has a remedy already
        raise
    except BaseException as e:
        # PanicException is pyo3's, a BaseException
        if not isinstance(e, Exception) and type(e).__name__ != "PanicException":
            raise
        text = e.strerror or str(e) if isinstance(e, OSError) else f"{type(e).__name__}: {e}"
        cause = f"cannot be read: {text[:500].rstrip('. ')}"
        raise error(f"{source}: {cause}; {diagnose(source) or remedy}") from e


def diagnose(source: str | Path) -> str | None:
    """How a file, or one of a folder's JSON files, was damaged in transfer, and the remedy; or None."""
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
    """The object in a JSON file. Raises `ConfigError` if the file holds anything else."""
    with reading(path, remedy):
        tree = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: {type(tree).__name__} where a JSON object is needed; {remedy}")
    return tree


def write_json(path: Path, tree: Any) -> None:
    """Write atomically; arrays become lists, and NaN and ±inf null."""
    write_text(path, json.dumps(plain(tree), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def plain(value: Any) -> Any:
    """For JSON: arrays as lists, named tuples as objects; NaN and ±inf, which JSON lacks, as null."""
    if hasattr(value, "_asdict"):
        return plain(value._asdict())
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def jsonl(records: Iterable[dict[str, Any]]) -> str:
    """A line for each record; NaN and ±inf become null."""
    return "".join(json.dumps(plain(r), ensure_ascii=False, allow_nan=False) + "\n" for r in records)


def append(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Append lines to a JSONL file and wait for the disk; call it once a step."""
    text = jsonl(records)
    with named_errors(path), open(path, "a", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def read_jsonl(path: Path, most: int | None = None, always: Sequence[bytes] = ()) -> Records:
    """All complete lines. A last one without newline is dropped: a crash cut it, or it is being written.

    `most`: of more lines, about so many spread evenly, the first and the last among them, and every line that
    holds one of `always`.
    """
    *lines, _ = path.read_bytes().split(b"\n")
    numbers = list(range(len(lines)))
    if most is not None and len(lines) > most:
        every = -(-len(lines) // most)
        holding = (i for x in always for i, line in enumerate(lines) if x in line)
        numbers = sorted({*range(0, len(lines), every), *holding, len(lines) - 1})
    records = []
    for number in numbers:
        with reading(f"{path}:{number + 1}", "a crash cannot do this, so repair or remove the file"):
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
    """Drop the records after `step`, and an incomplete last line, in one atomic move; 0 drops all records."""
    if path.exists():
        write_text(path, jsonl(r for r in read_jsonl(path) if step and r["step"] <= step))
