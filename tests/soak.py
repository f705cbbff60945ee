"""Measure memory, open files and compilations during a long run.

    python tests/soak.py [STEPS [OUT.png]]    # default: 2,000 steps; with OUT.png it draws the curves

PPO runs on the embedded model with few and short responses, so that steps are fast, with a checkpoint every
20 steps and an evaluation every 100.
"""

import gc
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import numpy as np
import yaml

from medrlvr_jax import cli
from medrlvr_jax.runs import log, profile

TREE = {
    "name": "soak",
    "model": {"path": "embedded", "remat": "none"},
    "data": {"path": "embedded:train"},
    "prompt": {"template": "none", "max_tokens": 96},
    "sample": {"questions": 4, "samples": 2, "max_new_tokens": 24},
    "learn": {"minibatch": 4, "policy": {"lr": 1e-5}, "critic": {"lr": 1e-5}},
    "eval": {
        "batch": 8,
        "every": 100,
        "sets": {"in_distribution": {"path": "embedded:in_distribution", "limit": 8}},
    },
    "checkpoint": {"every": 20},
    "log": {"samples_every": 5, "samples": 2},
}


def draw(step, resident, files, out: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 1, figsize=(7, 4), sharex=True)
    for axis, values, name in zip(
        axes, (resident, files), ("resident memory, MiB", "open files"), strict=True
    ):
        axis.plot(step, values, linewidth=1, color="#0072B2")
        axis.set(ylabel=name, ylim=(0, 1.15 * max(values)))
    axes[1].set_xlabel("step")
    figure.tight_layout()
    figure.savefig(out, dpi=130)


def main() -> int:
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 2000
    rows, compiled, start, record = [], [], time.monotonic(), log.Run.record

    def measured(run, step, *args, **kwargs):
        record(run, step, *args, **kwargs)
        if step % 10 == 0:
            gc.collect()
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
        rows.append((step, resident, len(os.listdir("/proc/self/fd")), len(compiled)))
        if step % 50 == 0:
            print(
                f"step {step}: {resident:.0f} MiB, {rows[-1][2]} files, {time.monotonic() - start:.0f} s",
                flush=True,
            )

    def count_compilation(event, duration_secs, **details):
        if event == profile.EVENT:
            compiled.append(details.get("fun_name"))

    log.Run.record = measured
    jax.monitoring.register_event_duration_secs_listener(count_compilation)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "soak.yaml"
        path.write_text(yaml.safe_dump(TREE | {"steps": steps, "runs": folder}))
        with open(os.devnull, "w") as sys.stderr:
            status = cli.main(["train", str(path)])
    step, resident, files, counts = np.array(rows[len(rows) // 4 :]).T  # the first quarter fills caches
    slope, _ = np.polyfit(step, resident, 1)
    if len(sys.argv) > 2:
        draw(*np.array(rows).T[:3], sys.argv[2])
    memory = (
        f"memory {resident[0]:.0f} to {resident[-1]:.0f} MiB, slope {1000 * slope:+.1f} MiB per 1,000 steps"
    )
    print(f"steps {step[0]:.0f} to {step[-1]:.0f}: {memory}")
    late = f"programs compiled after step 1: {counts[-1] - rows[1][3]:.0f} {compiled[rows[1][3] :]}"
    print(f"open files {files.min():.0f} to {files.max():.0f}; {late}")
    return status


if __name__ == "__main__":
    sys.exit(main())
