"""The seal of a checkpoint, `digests.json`: size and CRC-32 of every file, written before the last rename.

Orbax does not detect damage after a save: a flipped bit in an array file is read back as a weight. So the
seal is checked before anything is restored. With several processes, each computes the digests of what it
wrote and checks its share before a restore.
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
    """A checkpoint that cannot be written or read, or that belongs to another model."""


class DigestingHandler(ocp.PyTreeCheckpointHandler):
    """Orbax's handler; each process also digests the files it wrote, which `write` merges."""

    async def async_save(self, directory, *args, **kwargs):
        return [*(await super().async_save(directory, *args, **kwargs) or []), _DigestFuture(Path(directory))]


class _DigestFuture:
    """Orbax awaits the futures of a save in order, in the background, then waits for all processes."""

    def __init__(self, state: Path):
        self._state = state

    def result(self, timeout: float | None = None) -> None:
        process = jax.process_index()
        names = _names(self._state, (self._state / f"ocdbt.process_{process}").rglob("*"))
        written = {f"state/{name}": digest for name, digest in digests(self._state, names).items()}
        write_json(self._state.parent / f"{SEAL}.{process}", written)


def write(folder: Path) -> None:
    """Seal a checkpoint of which all processes have written their files, on process 0."""
    sealed: Digests = {}
    for process in range(jax.process_count()):
        part = folder / f"{SEAL}.{process}"
        sealed |= json.loads(part.read_text(encoding="utf-8"))
        part.unlink()
    small = [name for name in _names(folder, folder.glob("*/**/*")) if name not in sealed]
    write_json(folder / SEAL, dict(sorted((sealed | digests(folder, small)).items())))


def _names(path: Path, files: Iterable[Path]) -> list[str]:
    return sorted(str(p.relative_to(path)) for p in files if p.is_file())


def digests(path: Path, names: list[str]) -> Digests:
    """`[bytes, CRC-32]` of the named files of a checkpoint."""

    def digest(name: str) -> list[int]:
        size, crc = 0, 0
        with open(path / name, "rb") as file:
            while block := file.read(1 << 20):
                size, crc = size + len(block), zlib.crc32(block, crc)
        return [size, crc]

    with ThreadPoolExecutor(8) as pool:
        return dict(zip(names, pool.map(digest, names), strict=True))


def damage(path: Path, below: float = math.inf) -> str | None:
    """What is wrong with a checkpoint; None if nothing is. Files of `below` bytes and more are checked by
    size only.

    All processes must call it together and get the same answer: process 0 lists the files and each process
    reads its share. Raises `CheckpointError` if a process does not see a file that process 0 sees."""
    sealed, sizes = from_leader(lambda: _read_seal(path))
    if sealed is None:
        return f"{SEAL} is missing or damaged"
    for name, (size, _) in sealed.items():
        if name not in sizes:
            return f"{name} is missing"
        if sizes[name] != size:
            return f"{name} has {sizes[name]:,} bytes where {size:,} were written"
    names = [name for name, (size, _) in sealed.items() if size < below]
    largest_first = sorted(names, key=lambda name: -sealed[name][0])
    process = jax.process_index()
    try:
        share = digests(path, largest_first[process :: jax.process_count()])
    except FileNotFoundError as e:
        unseen = f"{e.filename}: process {process} does not see this file, which process 0 sees"
        remedy = "set runs to a folder that all of them share, or start again if its changes arrive late"
        raise CheckpointError(f"{unseen}; {remedy}") from e
    actual = {name: digest for part in gather(share) for name, digest in part.items()}
    changed = sorted(name for name, digest in actual.items() if digest != sealed[name])
    return f"{changed[0]} does not hold what was written" if changed else None


def _read_seal(path: Path) -> tuple[Digests | None, dict[str, int]]:
    """What was written, None if that cannot be read; and the sizes of the files that are there."""
    sizes = {name: (path / name).stat().st_size for name in _names(path, path.glob("*/**/*"))}
    try:
        return json.loads((path / SEAL).read_text(encoding="utf-8")), sizes
    except (FileNotFoundError, ValueError):
        return None, sizes
