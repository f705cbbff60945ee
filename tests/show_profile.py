"""Show the time of programs and host work in a run that was traced on CPU with `log.profile: [first, last]`.

    python tests/show_profile.py RUN [OUT.png]

It prints the seconds of each program, the idle time of the device, and the share of the host's work (fetch,
decode, score, log) that overlaps with the device's, and draws a timeline. For TPU and GPU on_device.py reports
the same figures (`summary`) and the slowest kernels. XProf and Perfetto show the whole trace.
"""

import sys
from collections import defaultdict
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from jax.profiler import ProfileData

HOST = ("score", "log", "evaluate")  # names in profile.py
GAP = 1e8  # nanoseconds; shorter pauses belong to a program
COLOURS = {
    "see": "#56B4E9",
    "generate": "#0072B2",
    "assess": "#E69F00",
    "make_experience": "#999999",
    "learn": "#009E73",
    "score": "#CC79A7",
    "log": "#D55E00",
}


def spans(pairs, gap: float = GAP) -> np.ndarray:
    """Return the union of the intervals [start, end]. Those with a smaller gap between them are joined."""
    out = []
    for start, end in sorted(pairs):
        if out and start - out[-1][1] < gap:
            out[-1][1] = max(out[-1][1], end)
        else:
            out.append([start, end])
    return np.array(out).reshape(-1, 2)


def within(a: np.ndarray, b: np.ndarray) -> float:
    """Return the nanoseconds of the spans a that overlap with the spans b."""
    return sum(max(0.0, min(x[1], y[1]) - max(x[0], y[0])) for x in a for y in b)


def read(run: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], np.ndarray, dict[str, float]]:
    """Return the spans of the device's programs by name, of the host's work by name, and of the busy device,
    and each kernel's nanoseconds.

    A CPU's programs run on threads of the host. Other devices have their own planes in the trace.
    """
    [file] = Path(run, "profile").rglob("*.xplane.pb")
    device, host, running, kernels = defaultdict(list), defaultdict(list), [], defaultdict(float)
    planes = list(ProfileData.from_file(str(file)).planes)
    has_device = any(plane.name.startswith("/device:") for plane in planes)
    for plane in planes:
        for line in plane.lines:
            for event in line.events:
                span = event.start_ns, event.start_ns + event.duration_ns
                if event.name in HOST:
                    host[event.name].append(span)
                elif has_device == plane.name.startswith("/device:"):
                    module = event.name if line.name == "XLA Modules" else dict(event.stats).get("hlo_module")
                    if module:
                        device[str(module).partition("(")[0].removeprefix("jit_")].append(span)
                    if has_device and line.name not in ("XLA Modules", "Steps"):
                        kernels[event.name] += event.duration_ns
                    if module or has_device:
                        running.append(span)
    programs = {name: spans(pairs) for name, pairs in device.items()}
    return programs, {name: spans(pairs) for name, pairs in host.items()}, spans(running, 0), dict(kernels)


def summary(run: str, most: int = 20) -> list[dict]:
    """Return records: the seconds of each program, the device's idle share, and the slowest kernels."""
    programs, host, busy, kernels = read(run)
    total, active = busy[-1, 1] - busy[0, 0], (busy[:, 1] - busy[:, 0]).sum()
    out = [
        {"traced": name, "seconds": (s[:, 1] - s[:, 0]).sum() / 1e9} for name, s in (programs | host).items()
    ]
    out.append({"traced": "all", "seconds": total / 1e9, "device_idle": 1 - active / total})
    longest = sorted(kernels.items(), key=lambda pair: -pair[1])[:most]
    return out + [{"kernel": name, "seconds": ns / 1e9, "share_of_busy": ns / active} for name, ns in longest]


def main(run: str, out: str = "") -> None:
    lanes, host, busy, _ = read(run)
    # `score` first waits for the sampler. Only the time after that is its work.
    work = spans((max(s, *(e for b, e in lanes["generate"] if b < end)), end) for s, end in host.pop("score"))
    lanes = {n: lanes[n] for n in COLOURS if n in lanes} | {"score": work} | host
    for name, s in lanes.items():
        print(f"{name:16s} {(s[:, 1] - s[:, 0]).sum() / 1e9:8.3f} s")
    whole = busy[-1, 1] - busy[0, 0]
    idle = whole - (busy[:, 1] - busy[:, 0]).sum()
    pauses = sorted(zip(busy[1:, 0] - busy[:-1, 1], busy[:-1, 1] - busy[0, 0], strict=True), reverse=True)
    print(
        "pauses of the device, ms (after s):",
        ", ".join(f"{p / 1e6:.0f} ({at / 1e9:.2f})" for p, at in pauses[:8]),
    )
    print(f"device idle      {idle / 1e9:8.3f} of {whole / 1e9:.3f} s ({idle / whole:.1%})")
    for name in ("score", *host):
        total = (lanes[name][:, 1] - lanes[name][:, 0]).sum()
        print(
            f"{name}: {within(lanes[name], busy) / total:.1%} of its {total / 1e6:.0f} ms behind the device's work"
        )
    if out:
        figure, axes = plt.subplots(figsize=(9, 2.6))
        for y, (name, s) in enumerate(lanes.items()):
            bars = [((a - busy[0, 0]) / 1e9, max((b - a) / 1e9, whole / 4e11)) for a, b in s]
            axes.broken_barh(bars, (-y - 0.4, 0.8), color=COLOURS[name])
        axes.set_yticks([-y for y in range(len(lanes))], list(lanes))
        axes.set_xlabel("seconds")
        figure.tight_layout()
        figure.savefig(out, dpi=130)


if __name__ == "__main__":
    main(*sys.argv[1:])
