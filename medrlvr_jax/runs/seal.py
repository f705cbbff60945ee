"""The seal of a checkpoint, `digests.json`: size and CRC-32 of every file.

Orbax does not detect damage: it would read a flipped bit in an array file as a weight. So the seal is written
before the checkpoint gets its name, and checked before anything is restored. With several processes, each one
computes the digests of its own files, and each one checks a part of the files before a restore.
"""

import json
import math
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import orbax.checkpoint as ocp

from medrlvr_jax.host.errors import MedrlvrError
from medrlvr_jax.host.files import write_json
from medrlvr_jax.host.processes import from_leader, gather

Digests = dict[str, list[int]]  # [bytes, CRC-32] by file name
SEAL = "digests.json"
SMALL = 1 << 16  # bytes


class CheckpointError(MedrlvrError, RuntimeError):
    """A checkpoint cannot be written or read, or belongs to another model."""


class DigestingHandler(ocp.PyTreeCheckpointHandler):
    """Orbax's handler for pytrees, which also computes the digests of the files that this process wrote."""

    async def async_save(self, directory, *args, **kwargs):
        return [*(await super().async_save(directory, *args, **kwargs) or []), _DigestFuture(Path(directory))]


class _DigestFuture:
    """Computes the digests after the files are written: Orbax awaits a save's futures in order."""

    def __init__(self, state: Path):
        self._state = state

    def result(self, timeout: float | None = None) -> None:
        process = jax.process_index()
        names = _names(self._state, (self._state / f"ocdbt.process_{process}").rglob("*"))
        written = {f"state/{name}": digest for name, digest in compute_digests(self._state, names).items()}
        write_json(self._state.parent / f"{SEAL}.{process}", written)


def write(folder: Path) -> None:
    """Merge the digests of all processes into the seal. Process 0 calls this when all files are written."""
    sealed: Digests = {}
    for process in range(jax.process_count()):
        part = folder / f"{SEAL}.{process}"
        sealed |= json.loads(part.read_text(encoding="utf-8"))
        part.unlink()
    small = [name for name in _names(folder, folder.glob("*/**/*")) if name not in sealed]
    write_json(folder / SEAL, dict(sorted((sealed | compute_digests(folder, small)).items())))


def _names(path: Path, files: Iterable[Path]) -> list[str]:
    return sorted(str(p.relative_to(path)) for p in files if p.is_file())


def compute_digests(path: Path, names: list[str]) -> Digests:
    """Return `[bytes, CRC-32]` of each named file of a checkpoint."""

    def digest(name: str) -> list[int]:
        size, crc = 0, 0
        with open(path / name, "rb") as file:
            while block := file.read(1 << 20):
                size, crc = size + len(block), zlib.crc32(block, crc)
        return [size, crc]

    with ThreadPoolExecutor(8) as pool:
        return dict(zip(names, pool.map(digest, names), strict=True))


def find_damage(path: Path, below: float = math.inf) -> str | None:
    """Return a message about the first damage in a checkpoint, or None.

    Of files with `below` bytes or more, only the size is checked. All processes must call this together and
    get the same result: process 0 lists the files, and each process reads a part of them. Raises
    `CheckpointError` if a process does not see a file that process 0 sees.
    """
    sealed, sizes = from_leader(lambda: _read_seal(path))
    if sealed is None:
        return f"{SEAL} is missing or damaged"
    for name, (size, _) in sealed.items():
        if name not in sizes:
            return f"{name} is missing"
        if sizes[name] != size:
            return f"{name} has {sizes[name]:,} bytes, but {size:,} were written"
    names = [name for name, (size, _) in sealed.items() if size < below]
    largest_first = sorted(names, key=lambda name: -sealed[name][0])
    process = jax.process_index()
    try:
        share = compute_digests(path, largest_first[process :: jax.process_count()])
    except FileNotFoundError as e:
        unseen = f"{e.filename}: process {process} does not see this file, but process 0 does"
        remedy = "set runs to a folder that all processes share, or start again if the file system was late"
        raise CheckpointError(f"{unseen}; {remedy}") from e
    actual = {name: digest for part in gather(share) for name, digest in part.items()}
    changed = sorted(name for name, digest in actual.items() if digest != sealed[name])
    return f"{changed[0]} has changed since it was written" if changed else None


def _read_seal(path: Path) -> tuple[Digests | None, dict[str, int]]:
    """Return the seal, or None if it cannot be read, and the sizes of the existing files."""
    sizes = {name: (path / name).stat().st_size for name in _names(path, path.glob("*/**/*"))}
    try:
        return json.loads((path / SEAL).read_text(encoding="utf-8")), sizes
    except (FileNotFoundError, ValueError):
        return None, sizes
