"""Checkpoints: Orbax saves them in the background, digests detect damage, and any mesh can restore them.

    checkpoints/20/state/         the TrainState, each leaf by its path
                   meta/          JSON: the settings, versions and git revision of the run
                   metrics/       JSON: the number that `checkpoint.best` names
                   digests.json   size and CRC-32 of every file above

Orbax writes into a temporary folder and renames it at the end, so a crash leaves no partial checkpoint. Orbax
does not detect later damage: a flipped bit in an array file is read back as a weight. So `digests.json` is
written just before the rename and checked before anything is restored.

With several processes, each computes the digests of what it wrote and checks its share before a restore.
Process 0 decides for all which steps exist, which are undamaged and which is the best.
"""

import json
import logging
import math
import shutil
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers as managers

from medrlvr_jax.config.schema import CheckpointConfig
from medrlvr_jax.host.errors import MedrlvrError
from medrlvr_jax.host.files import read_json, reading, write_json, write_text
from medrlvr_jax.host.processes import from_leader, gather

Which = int | Literal["best"] | None  # a checkpoint by its step; the best; None: the newest undamaged one
Digests = dict[str, list[int]]  # [bytes, CRC-32] by file name
SEAL = "digests.json"
SMALL = 1 << 16  # bytes
RETIRED = {"step"}  # leaves of older checkpoints that nothing reads any more
OTHER_CHECKPOINT = "take another of the run's checkpoints"


class CheckpointError(MedrlvrError, RuntimeError):
    """A checkpoint that cannot be written or read, or that belongs to another model."""


class _DigestingHandler(ocp.PyTreeCheckpointHandler):
    """Orbax's handler; each process also digests the files it wrote, which `Checkpoints._seal` merges."""

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


class Checkpoints:
    """The checkpoints of one run, for the process (or all processes) that trains it.

    The constructor renames damaged checkpoints to `<step>.damaged` and passes a line about each to `notify`.
    """

    def __init__(
        self,
        folder: Path,
        config: CheckpointConfig,
        meta: dict[str, Any],
        notify: Callable[[str], None] = print,
    ):
        logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax also logs what it raises
        self.folder = folder.absolute()
        self._marker = self.folder.with_name(f".{self.folder.name}")  # exists once a checkpoint was saved
        self._meta = meta
        self._best = config.best
        self._saving = 0
        if jax.process_index() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
        _rename_damaged(self.folder, notify)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("damaged checkpoints renamed")
        newest = managers.LatestN(config.keep)
        best = managers.BestN(get_metric_fn=self._quality, n=1, keep_checkpoints_without_metrics=False)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=managers.AnyPreservationPolicy([newest, best] if config.best else [newest]),
            best_fn=self._quality if config.best else None,  # Orbax stores metrics only with a best_fn
            cleanup_tmp_directories=True,
            async_options=ocp.options.AsyncOptions(post_finalization_callback=self._seal),
            single_host_load_and_broadcast=True,
        )
        handlers = ocp.handlers.DefaultCheckpointHandlerRegistry()
        handlers.add("state", ocp.args.PyTreeSave, _DigestingHandler())
        handlers.add("meta", ocp.args.JsonSave, ocp.JsonCheckpointHandler())
        self._manager = ocp.CheckpointManager(self.folder, options=options, handler_registry=handlers)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, _: Any) -> None:
        """After an error, stop Orbax's threads, since this process may train in the same folder again.

        Not with several processes: they end anyway, and closing waits for all of them.
        """
        if error is not None and jax.process_count() == 1:
            try:
                self.close()
            except CheckpointError as e:
                error.add_note(str(e))

    def steps(self) -> list[int]:
        """Steps whose checkpoints are complete on the disk, as this process sees it."""
        return saved_steps(self.folder)

    def save(self, step: int, state: Any, metrics: dict[str, float] | None = None) -> None:
        """Copy `state` to the host, then write it in the background. Raises an error of the previous save.

        The logs must already hold the records of `step` (see log.py). A step that is already saved stays as
        it is.
        """
        self.wait()  # also because `_seal` reads `_saving` in the background
        if step in from_leader(self.steps):
            return
        quality = (metrics or {}).get(self._best or "")
        best = {self._best: float(quality)} if quality is not None and math.isfinite(quality) else None
        meta = ocp.args.JsonSave(self._meta | {"step": step})
        self._saving = step
        with self._write_errors():
            args = ocp.args.Composite(state=ocp.args.PyTreeSave(state), meta=meta)
            self._manager.save(step, args=args, metrics=best, force=True)

    def check(self) -> None:
        """Raise if the latest save has failed, without waiting for one that is still in progress."""
        if not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Wait for the latest save; raises `CheckpointError` if it failed."""
        with self._write_errors():
            self._manager.wait_until_finished()
        if self._saving and jax.process_index() == 0 and not self._marker.exists():
            write_text(self._marker, f"{self._saving}\n")

    def close(self) -> None:
        """Wait for the latest save, then stop Orbax's threads."""
        self.wait()
        with self._write_errors():
            self._manager.close()

    def restore(self, abstract: Any) -> tuple[Any, int] | None:
        """The newest state and its step; None if none was ever saved.

        `abstract`: the state's ShapeDtypeStructs, with the shardings to restore to. Raises `CheckpointError`
        if checkpoints were saved but none is usable: starting over would erase the logs."""
        self.wait()
        steps, damaged, existed = from_leader(self._inspect)
        if steps:
            return _read(self.folder / str(steps[-1]), abstract), steps[-1]
        if not (damaged or existed):
            return None
        left = f"only {', '.join(damaged)}" if damaged else "though there were some"
        remedy = f"put one back, give another name=, or remove {self.folder.parent} to start over"
        raise CheckpointError(f"{self.folder}: no whole checkpoint is left, {left}; {remedy}")

    def restore_newest(self, state: Any) -> tuple[Any, int]:
        """The newest state and its step, or `(state, 0)` at a run's start.

        `state` is freed before anything is read: there may be no room for two.
        """
        abstract = _abstract(state)
        self.wait()
        if from_leader(self.steps):
            _free(state)
        return self.restore(abstract) or (state, 0)

    def _inspect(self) -> tuple[list[int], list[str], bool]:
        """Complete steps, names of damaged checkpoints, and whether any checkpoint was ever saved."""
        return self.steps(), sorted(p.name for p in self.folder.glob("*.damaged")), self._marker.exists()

    def _quality(self, metrics: dict[str, float]) -> float:
        return metrics.get(self._best or "", -math.inf)  # older checkpoints may hold another metric

    def _seal(self) -> None:
        """Orbax calls this in the background on process 0, when all is written and before the rename."""
        [temporary] = self.folder.glob(f"{self._saving}{ocp.path.step.TMP_DIR_SUFFIX}*")
        sealed: Digests = {}
        for process in range(jax.process_count()):
            part = temporary / f"{SEAL}.{process}"
            sealed |= json.loads(part.read_text(encoding="utf-8"))
            part.unlink()
        small = [name for name in _names(temporary, temporary.glob("*/**/*")) if name not in sealed]
        write_json(temporary / SEAL, dict(sorted((sealed | digests(temporary, small)).items())))

    @contextmanager
    def _write_errors(self):
        try:
            yield
        except Exception as e:
            steps = [s for s in self.steps() if s != self._saving]
            newest = f"the newest whole one is of step {steps[-1]}" if steps else "no earlier one is there"
            room = f"{shutil.disk_usage(self.folder).free / 2**30:.1f} GiB are free there"
            failed = f"{self.folder}: the checkpoint of step {self._saving} could not be written"
            raise CheckpointError(f"{failed}; {newest}; {room}: {' '.join(str(e).split())[:800]}") from e


def restore_params(folder: Path, abstract: Any, which: Which = None) -> tuple[Any, int]:
    """The policy's parameters and their step. Changes nothing in the folder.

    Dtypes are those of `abstract`: float32 master weights can be read as bfloat16."""
    step = _choose(folder, which)
    tree = _read(folder / str(step), {"policy": {"params": abstract}}, partial=True)
    return tree["policy"]["params"], step


def restore_before(folder: Path, state: Any, step: int) -> tuple[Any, int]:
    """The newest undamaged state at or before `step`, and its step; `(state, 0)` if there is none.

    Frees `state` first, as `restore_newest` does, but changes nothing in the folder.
    """
    steps = [s for s in from_leader(lambda: saved_steps(folder)) if s <= step]
    newest = next((s for s in reversed(steps) if not damage(folder / str(s))), 0)
    if not newest:
        return state, 0
    abstract = _abstract(state)
    _free(state)
    return _read(folder / str(newest), abstract), newest


def read_meta(folder: Path, step: int) -> dict[str, Any]:
    """The settings (`config`), versions and revision that made a checkpoint."""
    return read_json(folder / str(step) / "meta" / "metadata", OTHER_CHECKPOINT)


# --- damage -----------------------------------------------------------------------------------------------


def saved_steps(folder: Path) -> list[int]:
    """Steps of the complete checkpoints in a folder, ascending."""
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit()) if folder.is_dir() else []


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


def _rename_damaged(folder: Path, notify: Callable[[str], None]) -> None:
    """The newest undamaged checkpoint is read in full; of older ones, only the small files."""
    below = math.inf
    for step in reversed(from_leader(lambda: saved_steps(folder))):
        path = folder / str(step)
        reason = damage(path, below)
        if not reason:
            below = SMALL
            continue
        aside = path.with_name(f"{step}.damaged")
        if jax.process_index() == 0:
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
        notify(f"checkpoint {path} is damaged ({reason}): moved to {aside.name}, going on without it")


def _choose(folder: Path, which: Which) -> int:
    steps = from_leader(lambda: saved_steps(folder))
    if which is None:
        newest = next((s for s in reversed(steps) if not damage(folder / str(s))), None)
        if newest is None:
            raise CheckpointError(f"{folder}: no whole checkpoint; there are {steps}")
        return newest
    step = from_leader(lambda: best_step(folder)) if which == "best" else which
    if step is None:
        best = read_meta(folder, steps[-1])["config"]["checkpoint"]["best"] if steps else None
        why = f"the run had checkpoint.best {best or 'null'}"
        why += ", which no checkpointed step recorded" if best else ""
        unknown = f"{folder}: no checkpoint says how good it is"
        raise CheckpointError(f"{unknown}: {why}; name one of the steps {steps}")
    reason = damage(folder / str(step)) if step in steps else f"not one of {steps}"
    if reason:
        raise CheckpointError(f"{folder}: checkpoint {step} cannot be used: {reason}")
    return step


def best_step(folder: Path) -> int | None:
    """The step with the largest `checkpoint.best` metric, which the newest checkpoint names; None without."""
    files = {s: folder / str(s) / "metrics" / "metrics" for s in saved_steps(folder)}
    metrics = {s: json.loads(f.read_text(encoding="utf-8")) for s, f in files.items() if f.exists()}
    if not metrics:
        return None
    [name] = metrics[max(metrics)]
    return max((m[name], s) for s, m in metrics.items() if name in m)[1]


# --- reading ----------------------------------------------------------------------------------------------


def _abstract(state: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def _free(state: Any) -> None:
    jax.tree.map(lambda x: x.delete(), state)


def _read(path: Path, abstract: Any, partial: bool = False) -> Any:
    state, handler = epath.Path(path.absolute()) / "state", ocp.PyTreeCheckpointHandler()
    with reading(path, OTHER_CHECKPOINT, CheckpointError):
        saved = handler.metadata(state).tree
    _check_fits(path, saved, abstract, partial)
    how = ocp.checkpoint_utils.construct_restore_args(abstract)
    args = ocp.args.PyTreeRestore(item=abstract, restore_args=how, partial_restore=True)
    with reading(path, OTHER_CHECKPOINT, CheckpointError), ocp.Checkpointer(handler) as checkpointer:
        return checkpointer.restore(state, args=args)


def _check_fits(path: Path, saved: Any, abstract: Any, partial: bool) -> None:
    """Name the first leaf that differs: Orbax silently converts dtypes and skips leaves that are absent."""
    old, new = _leaves(saved), _leaves(abstract)
    unread = [] if partial else [name for name in old if name not in new and name not in RETIRED]
    for name in [*new, *unread]:
        a, b = (_describe(tree.get(name), partial) for tree in (old, new))
        if a != b:
            remedy = "take its own settings (in its meta/metadata), or start under another name="
            raise CheckpointError(f"{path} is of another model: {name} is {a} there and {b} here; {remedy}")


def _leaves(tree: Any) -> dict[str, Any]:
    """By dotted path: the same for dataclasses, named tuples and the dicts that Orbax makes of them."""
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in flat}


def _describe(leaf: Any, shape_only: bool) -> str:
    if leaf is None:
        return "absent"
    return str(list(leaf.shape)) if shape_only else f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"
