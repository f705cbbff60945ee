"""Compare two runs: all leaves of their last checkpoints, and their logs line by line."""

import json
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

WALL = ("seconds", "tokens_per_second")


def leaves(folder: Path, step: int) -> dict[str, np.ndarray]:
    """Return the leaves of a checkpoint by their paths."""
    path, handler = (folder / "checkpoints" / str(step) / "state").absolute(), ocp.PyTreeCheckpointHandler()
    arguments = jax.tree.map(
        lambda _: ocp.RestoreArgs(restore_type=np.ndarray), handler.metadata(epath.Path(path)).tree
    )
    tree = ocp.Checkpointer(handler).restore(path, args=ocp.args.PyTreeRestore(restore_args=arguments))
    return {
        jax.tree_util.keystr(path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }


def records(folder: Path, name: str) -> list[dict]:
    path = folder / name
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [{k: v for k, v in row.items() if k not in WALL} for row in rows]


def differences(a: Path, b: Path, last: int, tolerance: float = 0.0) -> list[str]:
    """Describe the differences between two finished runs of `last` steps. Without a tolerance they must be
    equal bit by bit.
    """
    one, two = leaves(a, last), leaves(b, last)
    found = [f"leaf {k}" for k in sorted(one.keys() ^ two.keys())]
    largest = {
        k: float(np.abs(one[k].astype(float) - two[k].astype(float)).max(initial=0))
        for k in one.keys() & two.keys()
    }
    if tolerance:
        print(
            f"    largest difference of a leaf: {max(largest.values()):.1e} ({max(largest, key=largest.get)})"
        )
        found += [f"leaf {k}: {d:.1e}" for k, d in largest.items() if d > tolerance]
    else:
        found += [
            f"leaf {k}: {largest[k]:.1e}"
            for k in one.keys() & two.keys()
            if one[k].tobytes() != two[k].tobytes()
        ]
    for name in ("metrics.jsonl", "samples.jsonl", "questions.jsonl"):
        left, right = records(a, name), records(b, name)
        if [r["step"] for r in left] != [r["step"] for r in right]:
            found.append(f"{name}: steps {[r['step'] for r in left]}")
        found += [
            f"{name}, step {x['step']}: {k}: {x.get(k)} and {y.get(k)}"
            for x, y in zip(left, right, strict=False)
            for k in sorted(x.keys() | y.keys())
            if not same(x.get(k), y.get(k), tolerance)
            # rounding can change which row is the largest
            and not (tolerance and k.startswith("row/"))
        ]
    steps = [r["step"] for r in records(a, "metrics.jsonl")]
    # step 0 is the evaluation before training
    if steps[-last:] != list(range(1, last + 1)) or steps[:-last] not in ([], [0]):
        found.append(f"metrics.jsonl: steps {steps}")
    return found


def same(x, y, tolerance: float) -> bool:
    return x == y or (
        tolerance > 0 and isinstance(x, float) and isinstance(y, float) and abs(x - y) <= 100 * tolerance
    )
