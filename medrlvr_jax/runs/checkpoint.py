"""Checkpoints: saved by Orbax while training goes on, sealed with digests, restored whole onto any mesh.

    checkpoints/20/state/         the TrainState, each leaf by its path
                   meta/          JSON: the settings, versions and git revision that made it
                   metrics/       JSON: the number by which it may be the best
                   digests.json   size and CRC-32 of every file above

Orbax writes into a temporary folder and renames it at the end, so a checkpoint that a crash cut short never shows itself. What it
does not notice is damage afterwards: a flipped bit in an array file is read back as a weight. `digests.json` is written into the
temporary folder just before the rename, and read before anything is restored.

Of several processes, each digests what it wrote, and checks its share of what is to be restored. Which steps there are, which is whole and
which the best, process 0 finds for all.
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
from medrlvr_jax.host.files import read_json, reading, write_json, write_text
from medrlvr_jax.host.processes import from_leader, gather

SEAL = "digests.json"
SMALL = 1 << 16  # bytes
RETIRED = {"step"}  # leaves that older checkpoints hold and nothing reads


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, or read, or that belongs to another model."""


class _DigestingHandler(ocp.PyTreeCheckpointHandler):
    """Orbax's own, and each process digests what it wrote once that is on the disk, beside the others. `Checkpoints._seal` joins them."""

    async def async_save(self, directory, *args, **kwargs):
        return [*(await super().async_save(directory, *args, **kwargs) or []), _Digests(Path(directory))]


class _Digests:
    """An Orbax future: Orbax asks each future of a save for its result in turn, in the background, and then waits for all processes."""

    def __init__(self, state: Path):
        self._state = state

    def result(self, timeout: float | None = None) -> None:
        mine = jax.process_index()
        written = digests(self._state, _names(self._state, (self._state / f"ocdbt.process_{mine}").rglob("*")))
        write_json(self._state.parent / f"{SEAL}.{mine}", {f"state/{name}": digest for name, digest in written.items()})


class Checkpoints:
    """The checkpoints of one run, for the process (or all the processes) that trains it.

    Making one looks at what is there: damaged checkpoints are moved aside to `<step>.damaged`, and `notice` gets a line for each.
    """

    def __init__(self, folder: Path, config: CheckpointConfig, meta: dict[str, Any], notice: Callable[[str], None] = print):
        logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs with a traceback what it raises as well
        self.folder = folder.absolute()
        self._made = self.folder.with_name(f".{self.folder.name}")  # is there once a checkpoint was: none can then vanish in silence
        self._meta = meta
        self._best = config.best
        self._saving = 0
        if jax.process_index() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
        _set_damaged_aside(self.folder, notice)
        _barrier("checkpoints looked at")
        keep: list[Any] = [managers.LatestN(config.keep)]
        if config.best:
            keep.append(managers.BestN(get_metric_fn=self._quality, n=1, keep_checkpoints_without_metrics=False))
        options = ocp.CheckpointManagerOptions(
            preservation_policy=managers.AnyPreservationPolicy(keep),
            best_fn=self._quality if config.best else None,  # metrics are stored only where there is a best_fn
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
        """After an error, no thread of Orbax is left to write into a folder that the same process may train in again.

        Not with several processes: they end, and closing waits for all of them.
        """
        if error is not None and jax.process_count() == 1:
            try:
                self.close()
            except CheckpointError as e:
                error.add_note(str(e))

    def steps(self) -> list[int]:
        """Those that this process sees whole on the disk; one that is being written is not yet among them."""
        return saved_steps(self.folder)

    def save(self, step: int, state: Any, metrics: dict[str, float] | None = None) -> None:
        """Copy `state` to the host, then write it in the background. An error of the save before this one is raised here.

        The records of `step` must be in the logs by now (see log.py). A step that is there already is left as it is.
        """
        self.wait()  # also because `_seal` runs in the background and must find `_saving` as it was
        if step in from_leader(self.steps):
            return
        quality = (metrics or {}).get(self._best or "")
        args = ocp.args.Composite(state=ocp.args.PyTreeSave(state), meta=ocp.args.JsonSave(self._meta | {"step": step}))
        self._saving = step
        with self._named_errors():
            found = {self._best: float(quality)} if quality is not None and math.isfinite(quality) else None
            self._manager.save(step, args=args, metrics=found, force=True)

    def check(self) -> None:
        """Raise if the latest save has failed; waits for nothing."""
        if not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        with self._named_errors():
            self._manager.wait_until_finished()
        if self._saving and jax.process_index() == 0 and not self._made.exists():
            write_text(self._made, f"{self._saving}\n")

    def close(self) -> None:
        self.wait()
        with self._named_errors():
            self._manager.close()

    def restore(self, abstract: Any, step: int | None = None) -> tuple[Any, int] | None:
        """The newest state, or that of `step`, laid out as `abstract` says (ShapeDtypeStructs with shardings); None if none was saved."""
        self.wait()
        steps, damaged, made = from_leader(self._look)
        if step is None and not steps:
            if damaged or made:  # starting over in silence would throw away the logs of the steps so far
                left = f"only {', '.join(damaged)}" if damaged else "though there were some"
                remedy = f"put one back, start again under another name=, or remove {self.folder.parent} to start over"
                raise CheckpointError(f"{self.folder}: no whole checkpoint is left, {left}; {remedy}")
            return None
        chosen: int = steps[-1] if step is None else step
        if chosen not in steps:
            raise CheckpointError(f"{self.folder}: no checkpoint of step {chosen}; there are {steps}")
        return _read(self.folder / str(chosen), abstract), chosen

    def restore_newest(self, state: Any) -> tuple[Any, int]:
        """`(state, 0)` at a run's start, else the newest state and the steps done. `state` is then freed first: two might not fit."""
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
        self.wait()
        if not from_leader(self.steps):
            return self.restore(abstract) or (state, 0)
        jax.tree.map(lambda x: x.delete(), state)
        return self.restore(abstract)  # type: ignore[return-value]  # there are steps

    def _look(self) -> tuple[list[int], list[str], bool]:
        """Steps, the names of damaged ones, and whether there ever was one."""
        return self.steps(), sorted(p.name for p in self.folder.glob("*.damaged")), self._made.exists()

    def _quality(self, metrics: dict[str, float]) -> float:
        return metrics.get(self._best or "", -math.inf)  # the name of the best may have changed since

    def _seal(self) -> None:
        """Called by Orbax in the background on process 0 when all files are written, before the rename that makes them count."""
        [temporary] = self.folder.glob(f"{self._saving}{ocp.path.step.TMP_DIR_SUFFIX}*")
        sealed: dict[str, list[int]] = {}
        for process in range(jax.process_count()):
            part = temporary / f"{SEAL}.{process}"
            sealed |= json.loads(part.read_text(encoding="utf-8"))
            part.unlink()
        rest = [name for name in _names(temporary, temporary.glob("*/**/*")) if name not in sealed]  # small: metadata, and the tree's index
        write_json(temporary / SEAL, dict(sorted((sealed | digests(temporary, rest)).items())))

    @contextmanager
    def _named_errors(self):
        try:
            yield
        except Exception as e:
            whole = [s for s in self.steps() if s != self._saving]
            kept = f"the newest whole one is that of step {whole[-1]}" if whole else "no earlier one is there"
            reason, room = " ".join(str(e).split())[:800], f"{shutil.disk_usage(self.folder).free / 2**30:.1f} GiB are free there"
            raise CheckpointError(
                f"{self.folder}: the checkpoint of step {self._saving} could not be written; {kept}; {room}: {reason}"
            ) from e


def restore_params(folder: Path, abstract: Any, which: int | Literal["best"] | None = None) -> tuple[Any, int]:
    """The policy's parameters alone, of a step, of the best, or of the newest whole checkpoint. Changes nothing in the folder.

    Dtypes are those of `abstract`: master weights may be read straight into bfloat16.
    """
    step = _choose(folder, which)
    return _read(folder / str(step), {"policy": {"params": abstract}}, partial=True)["policy"]["params"], step


def restore_before(folder: Path, state: Any, step: int) -> tuple[Any, int]:
    """The newest whole state at or before `step`, and its step; `(state, 0)` if there is none. As `restore_newest`, but changes nothing."""
    steps = from_leader(lambda: saved_steps(folder))
    found = next((s for s in reversed(steps) if s <= step and not damage(folder / str(s))), 0)
    if not found:
        return state, 0
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    jax.tree.map(lambda x: x.delete(), state)
    return _read(folder / str(found), abstract), found


def read_meta(folder: Path, step: int) -> dict[str, Any]:
    """The settings (`config`), versions and revision that a checkpoint was made with."""
    return read_json(folder / str(step) / "meta" / "metadata", "take another of the run's checkpoints")


# --- whole or damaged ------------------------------------------------------------------------------------------------


def saved_steps(folder: Path) -> list[int]:
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit()) if folder.is_dir() else []


def _names(path: Path, files: Iterable[Path]) -> list[str]:
    return sorted(str(p.relative_to(path)) for p in files if p.is_file())


def digests(path: Path, names: list[str]) -> dict[str, list[int]]:
    """`[bytes, CRC-32]` of the files of these names in a checkpoint."""

    def digest(name: str) -> list[int]:
        size, crc = 0, 0
        with open(path / name, "rb") as file:
            while block := file.read(1 << 20):
                size, crc = size + len(block), zlib.crc32(block, crc)
        return [size, crc]

    with ThreadPoolExecutor(8) as pool:
        return dict(zip(names, pool.map(digest, names), strict=True))


def damage(path: Path, below: float = math.inf) -> str | None:
    """What is wrong with a checkpoint; None when it is whole. Files of `below` bytes and more are judged by their size alone.

    All processes call it together and get the same answer: process 0 says which files there are, and each process reads its share.
    Raises `CheckpointError` where one does not see a file that process 0 sees.
    """
    sealed, sizes = from_leader(lambda: (_sealed(path), {n: (path / n).stat().st_size for n in _names(path, path.glob("*/**/*"))}))
    if sealed is None:
        return f"{SEAL} is missing or damaged"
    for name, (size, _) in sealed.items():
        if name not in sizes:
            return f"{name} is missing"
        if sizes[name] != size:
            return f"{name} has {sizes[name]:,} bytes where {size:,} were written"
    largest_first = sorted((name for name, (size, _) in sealed.items() if size < below), key=lambda name: -sealed[name][0])
    try:
        mine = digests(path, largest_first[jax.process_index() :: jax.process_count()])
    except FileNotFoundError as e:
        remedy = "set runs to a folder that all of them share, or start again if it is one whose changes arrive late"
        raise CheckpointError(f"{e.filename}: process {jax.process_index()} does not see this file, which process 0 sees; {remedy}") from e
    read = {name: digest for part in gather(mine) for name, digest in part.items()}
    broken = sorted(name for name, digest in read.items() if digest != sealed[name])
    return f"{broken[0]} does not hold what was written" if broken else None


def _sealed(path: Path) -> dict[str, list[int]] | None:
    try:
        return json.loads((path / SEAL).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def _set_damaged_aside(folder: Path, notice: Callable[[str], None]) -> None:
    """The newest whole checkpoint is read through; the older ones, which are not about to be restored, are only glanced at."""
    below = math.inf
    for step in reversed(from_leader(lambda: saved_steps(folder))):
        path, wrong = folder / str(step), damage(folder / str(step), below)
        if wrong:
            aside = path.with_name(f"{step}.damaged")
            if jax.process_index() == 0:
                shutil.rmtree(aside, ignore_errors=True)
                path.rename(aside)
            notice(f"checkpoint {path} is damaged ({wrong}): moved to {aside.name}, going on without it")
        else:
            below = SMALL


def _choose(folder: Path, which: int | Literal["best"] | None) -> int:
    steps = from_leader(lambda: saved_steps(folder))
    if which is None:
        found = next((s for s in reversed(steps) if not damage(folder / str(s))), None)
        if found is None:
            raise CheckpointError(f"{folder}: no whole checkpoint; there are {steps}")
        return found
    step = from_leader(lambda: best_step(folder)) if which == "best" else which
    if step is None:
        best = read_meta(folder, steps[-1])["config"]["checkpoint"]["best"] if steps else None
        why = f"the run had checkpoint.best {best or 'null'}" + (", which no checkpointed step recorded" if best else "")
        raise CheckpointError(f"{folder}: no checkpoint says how good it is: {why}; name one of the steps {steps}")
    wrong = damage(folder / str(step)) if step in steps else f"not one of {steps}"
    if wrong:
        raise CheckpointError(f"{folder}: checkpoint {step} cannot be used: {wrong}")
    return step


def best_step(folder: Path) -> int | None:
    """The checkpoint that `checkpoint.best` was largest at; None if none says how good it is."""
    files = {s: folder / str(s) / "metrics" / "metrics" for s in saved_steps(folder)}
    metrics = {s: json.loads(f.read_text(encoding="utf-8")) for s, f in files.items() if f.exists()}
    if not metrics:
        return None
    [name] = metrics[max(metrics)]
    return max((m[name], s) for s, m in metrics.items() if name in m)[1]


# --- reading ---------------------------------------------------------------------------------------------------------


def _read(path: Path, abstract: Any, partial: bool = False) -> Any:
    state, handler = epath.Path(path.absolute()) / "state", ocp.PyTreeCheckpointHandler()
    remedy = "take another of the run's checkpoints"
    with reading(path, remedy, CheckpointError):
        saved = handler.metadata(state).tree
    _check_fits(path, saved, abstract, partial)
    how = ocp.checkpoint_utils.construct_restore_args(abstract)
    with reading(path, remedy, CheckpointError), ocp.Checkpointer(handler) as checkpointer:
        return checkpointer.restore(state, args=ocp.args.PyTreeRestore(item=abstract, restore_args=how, partial_restore=True))


def _check_fits(path: Path, saved: Any, abstract: Any, partial: bool) -> None:
    """Name the first leaf that differs: Orbax would read another dtype without a word, and leave out what it does not find."""
    there, here = _leaves(saved), _leaves(abstract)
    for name in list(here) + ([] if partial else [k for k in there if k not in here and k not in RETIRED]):
        a, b = (_describe(tree.get(name), partial) for tree in (there, here))
        if a != b:
            remedy = "take the settings it was made with (its meta/metadata has them), or start under another name="
            raise CheckpointError(f"{path} is of another model: {name} is {a} there and {b} here; {remedy}")


def _leaves(tree: Any) -> dict[str, Any]:
    """By dotted path, which is the same for a dataclass or named tuple and for the dicts that Orbax makes of them."""
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in flat}


def _describe(leaf: Any, shape_only: bool) -> str:
    if leaf is None:
        return "absent"
    return str(list(leaf.shape)) if shape_only else f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"


# --- several processes -----------------------------------------------------------------------------------------------


def _barrier(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
