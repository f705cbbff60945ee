"""Checkpoints: Orbax saves them in the background, seals detect damage, and any mesh can restore them.

    checkpoints/20/state/         the TrainState, each leaf under its path
                   meta/          JSON: the settings, versions and git revision of the run
                   metrics/       JSON: the metric that `checkpoint.best` names
                   digests.json   size and CRC-32 of every file above (seal.py)

Orbax writes into a temporary folder and renames it at the end, so a crash leaves no partial checkpoint. With
several processes, process 0 decides for all of them which checkpoints exist, which are undamaged and which is
the best.
"""

import json
import logging
import math
import shutil
from collections.abc import Callable
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
from medrlvr_jax.host.files import reading, write_text
from medrlvr_jax.host.processes import from_leader
from medrlvr_jax.runs import seal
from medrlvr_jax.runs.seal import CheckpointError, find_damage

Which = int | Literal["best"] | None  # a step, or the best checkpoint; None: the newest undamaged one
RETIRED = {"step"}  # leaves of old checkpoints that are no longer used
OTHER_CHECKPOINT = "use another checkpoint of the run"


class Checkpoints:
    """The checkpoints of one run, for all processes that train it.

    The constructor renames damaged checkpoints to `<step>.damaged` and calls `notify` with a message about
    each.
    """

    def __init__(
        self,
        folder: Path,
        config: CheckpointConfig,
        meta: dict[str, Any],
        notify: Callable[[str], None] = print,
    ):
        logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs each error that it raises
        self.folder = folder.absolute()
        self._marker = self.folder.with_name(f".{self.folder.name}")  # exists after the first save
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
        handlers.add("state", ocp.args.PyTreeSave, seal.DigestingHandler())
        handlers.add("meta", ocp.args.JsonSave, ocp.JsonCheckpointHandler())
        self._manager = ocp.CheckpointManager(self.folder, options=options, handler_registry=handlers)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, _: Any) -> None:
        """After an error, stop Orbax's threads, because this process may train in the same folder again.

        With several processes this is skipped: they end anyway, and closing would wait for all of them.
        """
        if error is not None and jax.process_count() == 1:
            try:
                self.close()
            except CheckpointError as e:
                error.add_note(str(e))

    def steps(self) -> list[int]:
        """Return the steps whose checkpoints this process sees complete on the disk."""
        return saved_steps(self.folder)

    def save(self, step: int, state: Any, metrics: dict[str, float] | None = None) -> None:
        """Copy `state` to the host, then write it in the background. A step that is already saved is skipped.

        The records of `step` must already be in the logs (see log.py). Raises `CheckpointError` if the
        previous save failed.
        """
        self.wait()  # `_seal` reads `_saving` in the background
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
        """Raise `CheckpointError` if the latest save failed. Do not wait for a save in progress."""
        if not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Wait for the latest save. Raise `CheckpointError` if it failed."""
        with self._write_errors():
            self._manager.wait_until_finished()
        if self._saving and jax.process_index() == 0 and not self._marker.exists():
            write_text(self._marker, f"{self._saving}\n")

    def close(self) -> None:
        """Wait for the latest save, then stop Orbax's threads."""
        self.wait()
        with self._write_errors():
            self._manager.close()

    def restore(self, state: Any) -> tuple[Any, int]:
        """Return the newest saved state and its step, or `(state, 0)` if nothing was ever saved.

        `state`: arrays or ShapeDtypeStructs with the shardings to restore to. Arrays are freed before
        anything is read, because memory may not hold two states. Raises `CheckpointError` if checkpoints were
        saved but none is usable, because starting over would erase the logs.
        """
        self.wait()
        steps, damaged, existed = from_leader(self._inspect)
        if steps:
            return _replace(state, self.folder, steps[-1])
        if not (damaged or existed):
            return state, 0
        rest = f"only {', '.join(damaged)}" if damaged else "although some were saved"
        remedy = f"put one back, give another name=, or remove {self.folder.parent} to start over"
        raise CheckpointError(f"{self.folder}: no undamaged checkpoint is left, {rest}; {remedy}")

    def _inspect(self) -> tuple[list[int], list[str], bool]:
        """Return the complete steps, the names of damaged checkpoints, and whether one was ever saved."""
        return self.steps(), sorted(p.name for p in self.folder.glob("*.damaged")), self._marker.exists()

    def _quality(self, metrics: dict[str, float]) -> float:
        return metrics.get(self._best or "", -math.inf)  # an older checkpoint may have another metric

    def _seal(self) -> None:
        """Seal the checkpoint. Orbax calls this on process 0, in the background, just before the rename."""
        [temporary] = self.folder.glob(f"{self._saving}{ocp.path.step.TMP_DIR_SUFFIX}*")
        seal.write(temporary)

    @contextmanager
    def _write_errors(self):
        try:
            yield
        except Exception as e:
            steps = [s for s in self.steps() if s != self._saving]
            newest = f"the newest complete one is step {steps[-1]}" if steps else "there is no earlier one"
            space = f"the disk has {shutil.disk_usage(self.folder).free / 2**30:.1f} GiB free"
            failed = f"{self.folder}: the checkpoint of step {self._saving} could not be written"
            raise CheckpointError(f"{failed}; {newest}; {space}: {' '.join(str(e).split())[:800]}") from e


def restore_params(folder: Path, abstract: Any, which: Which = None) -> tuple[Any, int]:
    """Return the policy's parameters and their step, without any change in the folder.

    They get the dtypes of `abstract`: float32 weights can be read as bfloat16.
    """
    step = _choose(folder, which)
    tree = _read(folder / str(step), {"policy": {"params": abstract}}, partial=True)
    return tree["policy"]["params"], step


def restore_before(folder: Path, state: Any, step: int) -> tuple[Any, int]:
    """Return the newest undamaged state at or before `step` and its step; `(state, 0)` if there is none.

    Like `Checkpoints.restore`, it first frees the arrays of `state`. It changes nothing in the folder.
    """
    newest = newest_undamaged(folder, step)
    return _replace(state, folder, newest) if newest else (state, 0)


def saved_steps(folder: Path) -> list[int]:
    """Return the steps of the complete checkpoints in a folder, in ascending order."""
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit()) if folder.is_dir() else []


def newest_undamaged(folder: Path, last: float = math.inf) -> int | None:
    """Return the newest undamaged step that is at most `last`, or None."""
    steps = from_leader(lambda: saved_steps(folder))
    return next((s for s in reversed(steps) if s <= last and not find_damage(folder / str(s))), None)


def _rename_damaged(folder: Path, notify: Callable[[str], None]) -> None:
    """Rename damaged checkpoints. Of those older than the newest undamaged one, check only small files."""
    below = math.inf
    for step in reversed(from_leader(lambda: saved_steps(folder))):
        path = folder / str(step)
        reason = find_damage(path, below)
        if not reason:
            below = seal.SMALL
            continue
        aside = path.with_name(f"{step}.damaged")
        if jax.process_index() == 0:
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
        notify(f"checkpoint {path} is damaged ({reason}) and was renamed to {aside.name}")


def _choose(folder: Path, which: Which) -> int:
    steps = from_leader(lambda: saved_steps(folder))
    if which is None:
        if newest := newest_undamaged(folder):
            return newest
        raise CheckpointError(f"{folder}: no undamaged checkpoint among the steps {steps}")
    step = from_leader(lambda: best_step(folder)) if which == "best" else which
    if step is None:
        why = "no checkpoint has a metric of checkpoint.best"
        raise CheckpointError(f"{folder}: {why}; give one of the steps {steps}")
    reason = find_damage(folder / str(step)) if step in steps else f"the saved steps are {steps}"
    if reason:
        raise CheckpointError(f"{folder}: checkpoint {step} cannot be used: {reason}")
    return step


def best_step(folder: Path) -> int | None:
    """Return the step with the largest `checkpoint.best` metric, or None if no checkpoint has a metric."""
    files = {s: folder / str(s) / "metrics" / "metrics" for s in saved_steps(folder)}
    metrics = {s: json.loads(f.read_text(encoding="utf-8")) for s, f in files.items() if f.exists()}
    if not metrics:
        return None
    [name] = metrics[max(metrics)]  # the newest checkpoint decides if checkpoint.best has changed
    return max((m[name], s) for s, m in metrics.items() if name in m)[1]


# --- reading ----------------------------------------------------------------------------------------------


def _replace(state: Any, folder: Path, step: int) -> tuple[Any, int]:
    """Free the arrays of `state`. Return the state of a checkpoint and its step."""
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    for array in jax.tree.leaves(state):
        if isinstance(array, jax.Array):
            array.delete()
    return _read(folder / str(step), abstract), step


def _read(path: Path, abstract: Any, partial: bool = False) -> Any:
    state, handler = epath.Path(path.absolute()) / "state", ocp.PyTreeCheckpointHandler()
    with reading(path, OTHER_CHECKPOINT, CheckpointError):
        saved = handler.metadata(state).tree
    _check_fits(path, saved, abstract, partial)
    restore_args = ocp.checkpoint_utils.construct_restore_args(abstract)
    args = ocp.args.PyTreeRestore(item=abstract, restore_args=restore_args, partial_restore=True)
    with reading(path, OTHER_CHECKPOINT, CheckpointError), ocp.Checkpointer(handler) as checkpointer:
        return checkpointer.restore(state, args=args)


def _check_fits(path: Path, saved: Any, abstract: Any, partial: bool) -> None:
    """Raise `CheckpointError` at the first leaf that differs. Orbax would convert dtypes and skip leaves."""
    old, new = _leaves(saved), _leaves(abstract)
    unread = [] if partial else [name for name in old if name not in new and name not in RETIRED]
    for name in [*new, *unread]:
        a, b = (_describe(tree.get(name), partial) for tree in (old, new))
        if a != b:
            remedy = "use its own settings (in meta/metadata), or give the run another name="
            raise CheckpointError(
                f"{path} is of another model: {name} is {a} in the checkpoint and {b} here; {remedy}"
            )


def _leaves(tree: Any) -> dict[str, Any]:
    """Return leaves by dotted path, which is the same in dataclasses and in the dicts that Orbax returns."""
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in flat}


def _describe(leaf: Any, shape_only: bool) -> str:
    if leaf is None:
        return "absent"
    return str(list(leaf.shape)) if shape_only else f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"
