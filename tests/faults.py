"""Kill runs many times and compare their results with those of uninterrupted runs, bit by bit.

    python tests/faults.py                        # everything: about 60 kills; prints the table of
                                                  # docs/pages/numbers/faults.md
    python tests/faults.py --kills 5 --out DIR    # fewer kills of each run; DIR keeps the log of every launch

The runs are twelve steps of PPO, GRPO and SFT on the embedded model, and of GRPO on a tiny model with images.
Each launch is the same command (`medrlvr train …`) with one fault: SIGKILL or SIGTERM at a random time after
a named point (generation, scoring, learning, writing or sealing a checkpoint, logging, restoring …). The
command is launched again until the run ends. Then all leaves of policy, critic, optimiser states, KL
controller and step are compared, and the three logs line by line without wall-clock fields. The same follows
on two processes, and once on another mesh, where equality is to a tolerance.

A launch is a fork of a process that has imported everything and started nothing. This saves only the imports.
"""

import argparse
import ctypes
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from pathlib import Path

HERE = Path(__file__).parent
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_COMPILATION_CACHE_DIR"] = os.environ.get(
    "JAX_COMPILATION_CACHE_DIR", str(HERE.parent / ".cache" / "faults")
)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
sys.path.insert(0, str(HERE.parent))

import jax  # noqa: E402
import yaml  # noqa: E402
from make_vision import make_run  # noqa: E402
from quick import FLAGS as quick_flags  # noqa: E402
from same_run import differences  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402, F401  (imported before the forks: it takes seconds)

from medrlvr_jax import cli  # noqa: E402
from medrlvr_jax.host import files, processes  # noqa: E402
from medrlvr_jax.rl import sft, train  # noqa: E402
from medrlvr_jax.runs import checkpoint, log, seal  # noqa: E402

STEPS = 12
HEARTBEAT = 5  # seconds, instead of processes.HEARTBEAT
TREE = {
    "steps": STEPS,
    "model": {"path": "embedded", "remat": "none"},
    "data": {"path": "embedded:train", "limit": 64},
    "prompt": {"template": "none", "max_tokens": 96},
    "sample": {"questions": 4, "samples": 2, "max_new_tokens": 24},
    "kl": {"coef": 0.01, "target": 0.05, "horizon": 100},
    "learn": {"minibatch": 2, "policy": {"lr": 3e-4}, "critic": {"lr": 1e-3}},
    "eval": {"batch": 8},
    "checkpoint": {"every": 2},
    "log": {"samples_every": 1, "samples": 8},
}
GRPO = {"advantage": {"estimator": "group"}, "kl": {"coef": 0.01, "into": "loss", "estimator": "k3"}}
GRPO |= {"learn": {"minibatch": 2, "policy": {"lr": 3e-4}}}
MOVED = {"loss": {"entropy_coef": 0.5}, "log": TREE["log"] | {"stop_constant": 0}}
EVAL = {
    "eval": {
        "batch": 8,
        "every": 6,
        "sets": {"in_distribution": {"path": "embedded:in_distribution", "limit": 8}},
    }
}
KINDS = {
    "ppo": ("train", EVAL),
    "grpo": ("train", GRPO),
    # this model never produces the format, so only the entropy bonus changes it
    "images": ("train", GRPO | {"prompt": {"template": "none", "max_tokens": 128}} | MOVED),
    "sft": ("sft", {"sft": {"target": "rationale", "max_new_tokens": 64}}),
}
QUICK = f" {quick_flags}"  # for launches without a compilation cache: see invariance.py

# For each point the calls that pass it, and the largest delay of the signal in milliseconds.
POINTS = {
    "generation": ([(train, "draw")], 60),
    "scoring": ([(train, "score_rollout")], 30),
    "learning": ([(train, "offload"), (sft, "offload")], 60),
    "evaluation (PPO)": ([(train.evaluate, "evaluate_sets")], 60),
    "checkpoint being written": ([(checkpoint.Checkpoints, "save")], 120),
    "checkpoint being sealed": ([(checkpoint.Checkpoints, "_seal")], 15),
    "between log and checkpoint": ([(log.Run, "record")], 0),
    "half a line of the log": ([(files, "append")], 0),
    "between the two logs": ([(files, "append")], 0),
    "restoring": ([(checkpoint.Checkpoints, "restore")], 60),
    "logs being rewound": ([(files, "write_text")], 2),
    "any time": ([], 20_000),
}
# points that only process 0 passes
LEADER = ("checkpoint being sealed", "half a line of the log", "between the two logs")
AGAIN = ("restoring", "logs being rewound")  # points that only a resumed launch passes
# Points that a kind of run does not pass.
LACKS = dict.fromkeys(("grpo", "images"), ("evaluation (PPO)",))
LACKS |= {"sft": ("generation", "scoring", "evaluation (PPO)")}


def arm(point: str, number: int, nth: int, delay: float) -> None:
    """Send signal `number` to this process `delay` seconds after it passes the point for the `nth` time."""

    def strike():
        os.kill(os.getpid(), number)
        if number == signal.SIGKILL:
            time.sleep(60)

    if point == "any time":
        threading.Timer(delay, strike).start()
        return
    count = 0

    def is_nth() -> bool:
        nonlocal count
        count += 1
        return count == nth

    def hook(call):
        def hooked(*args, **kwargs):
            if point == "half a line of the log" and is_nth():
                with open(args[0], "a") as file:
                    file.write('{"step": 3, "rew')
                strike()
            if (
                point not in ("between log and checkpoint", "between the two logs", "half a line of the log")
                and is_nth()
            ):
                threading.Timer(delay, strike).start()
            out = call(*args, **kwargs)
            if point in ("between log and checkpoint", "between the two logs") and is_nth():
                strike()
            return out

        return hooked

    for owner, name in POINTS[point][0]:
        call = getattr(owner, name)
        # `offload` returns (learner, program), and the program must be hooked
        if name == "offload":
            setattr(
                owner,
                name,
                lambda *args, call=call: (lambda learner, program: (learner, hook(program)))(*call(*args)),
            )
        else:
            setattr(owner, name, hook(call))


quick = False


def launch(command: list[str], out: Path, faults: list, devices: int = 1, sleep: float = 600) -> list[int]:
    """Run the command in one process for each of `faults` (None: no fault). Return their exit statuses, -n for
    a process that signal n ended.
    """
    n = len(faults)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{s.getsockname()[1]}"
    pids = []
    for i, fault in enumerate(faults):
        sys.stdout.flush()
        pid = os.fork()
        if pid:
            pids.append(pid)
            continue
        try:
            os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}" + (
                QUICK if n > 1 or quick else ""
            )
            with open(f"{out}.{i}.log", "a") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            print(f"---- {' '.join(command)}: {fault}", flush=True)
            if n > 1:
                jax.config.update("jax_compilation_cache_dir", None)  # see invariance.environment
                processes.HEARTBEAT = HEARTBEAT
                os.environ |= {
                    "JAX_COORDINATOR_ADDRESS": address,
                    "JAX_NUM_PROCESSES": str(n),
                    "JAX_PROCESS_ID": str(i),
                }
            if fault:
                arm(*fault)
            status = cli.main(command)
            sys.stdout.flush()
            os._exit(status)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(70)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def in_child(call, *args):
    """Return the result of a call that uses JAX, from a fork: after starting JAX itself, this process could not
    fork any more.
    """
    read, write = os.pipe()
    if not (pid := os.fork()):
        try:
            with open(write, "w") as file:
                file.write(json.dumps(call(*args)))
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    os.close(write)
    with open(read) as file:
        text = file.read()
    os.waitpid(pid, 0)
    return json.loads(text)


def config(root: Path, name: str, kind: str, **changes) -> list[str]:
    """Write the config of a run and return its command."""
    command, settings = KINDS[kind]
    path = root / f"{name}.yaml"
    path.write_text(yaml.safe_dump(TREE | settings | {"name": name, "runs": str(root / "runs")} | changes))
    return [command, str(path)]


def torment(
    root: Path,
    name: str,
    kind: str,
    kills: int,
    dice: random.Random,
    tally: Counter,
    points=None,
    n: int = 1,
    **changes,
):
    """Launch runs `name`-1, -2, … with a fault in every launch, until `kills` signals have ended a launch.
    Yield each finished run.
    """
    killed = 0
    for i in range(1, 100):
        folder = f"{name}-{i}"
        command = config(root, folder, kind, **changes)
        command[1:1] = ["--distributed"] if n > 1 else []
        statuses, hits = [], 0
        while statuses != [0] * n:
            fault, who = None, dice.randrange(n)
            if killed < kills:
                point = dice.choice(
                    [p for p in points or POINTS if (hits or p not in AGAIN) and p not in LACKS.get(kind, ())]
                )
                kinds = [signal.SIGKILL, signal.SIGKILL, signal.SIGTERM]
                # only SIGKILL leaves half a line
                number = dice.choice(kinds if point != "half a line of the log" else kinds[:1])
                nth = 1 if point in AGAIN else dice.randint(1, 4)
                who = 0 if point in LEADER else who
                fault = (point, int(number), nth, dice.uniform(0, POINTS[point][1]) / 1000)
            statuses = launch(
                command, root / folder, [fault if i == who else None for i in range(n)], 1 if n == 1 else 2
            )
            if fault and statuses[who] in (-fault[1], 128 + fault[1]):
                killed, hits = killed + 1, hits + 1
                key = (point, signal.Signals(number).name, n)
                tally[key] += 1
                print(
                    f"  {folder}: {point}, pass {nth} + {fault[3] * 1000:.0f} ms, {key[1]} to process {who}: {statuses}",
                    flush=True,
                )
            elif statuses != [0] * n:
                raise SystemExit(
                    f"{folder}: {fault}: exit statuses {statuses}; the log is {root / folder}.*.log"
                )
        print(f"  {folder}: done after {hits} kills", flush=True)
        yield root / "runs" / folder
        if killed >= kills:
            return


def verdict(what: str, run: Path, alone: Path, tolerance: float = 0.0) -> bool:
    found = in_child(differences, run, alone, STEPS, tolerance)
    print(
        f"  {what}: "
        + ("; ".join(found[:8]) if found else f"equal to {tolerance}" if tolerance else "equal, bit by bit"),
        flush=True,
    )
    return not found


def alone(root: Path, kind: str, n: int = 1, name: str = "", devices: int = 1, **changes) -> Path:
    name = name or f"{kind}-alone-{n}"
    command = config(root, name, kind, **changes)
    command[1:1] = ["--distributed"] if n > 1 else []
    statuses = launch(command, root / name, [None] * n, devices)
    assert statuses == [0] * n, (name, statuses)
    return root / "runs" / name


def images(root: Path) -> dict[str, dict[str, str]]:
    (root / "seen").mkdir()
    return make_run(root / "seen")


def full_disk(disk: Path, command: list[str], want: Path, out: str) -> bool:
    """Run in a private mount namespace on a small disk, then on a read-only disk, then on an enlarged disk.
    It needs root.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(0x20000):  # CLONE_NEWNS
        print(f"    left out: {os.strerror(ctypes.get_errno())}")
        return True
    mount = lambda *args: subprocess.run(["mount", *map(str, args)], check=True)
    mount("--make-rprivate", "/")
    mount("-t", "tmpfs", "-o", "size=50m", "none", disk)
    terminal = os.dup(2)

    def go() -> int:
        with open(out, "a") as file:
            os.dup2(file.fileno(), 2)
            status = cli.main(command)
            os.dup2(terminal, 2)
        print(f"    exit status {status}; " + Path(out).read_text().splitlines()[-1][:400], file=sys.stderr)
        return status

    checkpoints = disk / "ppo-disk" / "checkpoints"
    first, kept = go(), checkpoint.saved_steps(checkpoints)
    whole = [s for s in kept if seal.find_damage(checkpoints / str(s)) is None]
    print(f"    whole checkpoints: {whole}", file=sys.stderr)
    mount("-o", "remount,ro", disk)
    second = go()
    mount("-o", "remount,rw,size=400m", disk)
    third = go()
    found = differences(disk / "ppo-disk", want, STEPS)
    print(f"    then: {found or 'equal, bit by bit'}", file=sys.stderr)
    return (first, second, third) == (1, 1, 0) and bool(whole) and whole == kept and not found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--kills", type=int, default=18, help="of each of the four runs on one process; default 18"
    )
    parser.add_argument(
        "--pairs", type=int, default=8, help="kills of one of two processes; default 8; 0: none"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=[*KINDS, "pairs", "mesh", "disk"], help="one part alone")
    parser.add_argument(
        "--quick", action="store_true", help="five steps, compiled without optimisation: for a short look"
    )
    parser.add_argument("--out", type=Path, help="keep runs and logs there")
    args = parser.parse_args()
    if args.quick:
        globals().update(quick=True, STEPS=5)
        TREE["steps"] = 5
    dice, tally, ok, began = random.Random(args.seed), Counter(), True, time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        root = args.out or Path(temporary)
        root.mkdir(parents=True, exist_ok=True)
        for kind in KINDS:
            if args.only in (None, kind):
                print(f"{kind}, one process, seed {args.seed}", flush=True)
                changes = in_child(images, root) if kind == "images" else {}
                want = alone(root, kind, **changes)
                for run in torment(root, kind, kind, args.kills, dice, tally, **changes):
                    ok &= verdict(run.name, run, want)
        if args.only in (None, "pairs") and args.pairs:
            print("ppo, two processes", flush=True)
            mesh = {
                "mesh": {"data": 2, "fsdp": 2},
                "learn": {"minibatch": 4, "policy": {"lr": 3e-4}, "critic": {"lr": 1e-3}},
            }
            mesh["eval"] = {"batch": 8}
            points = [p for p in POINTS if p not in (*AGAIN, "any time", "evaluation (PPO)")]
            want = alone(root, "ppo", 2, devices=2, **mesh)
            for run in torment(root, "ppo-pair", "ppo", args.pairs, dice, tally, points, 2, **mesh):
                ok &= verdict(run.name, run, want)
        if args.only in (None, "mesh"):
            print("ppo, begun on one device, resumed on eight (data 2, fsdp 2, tensor 2)", flush=True)
            steady = {
                "learn": {"minibatch": 8, "policy": {"lr": 3e-5}, "critic": {"lr": 3e-5}},
                "eval": {"batch": 8},
            }
            steady["sample"] = TREE["sample"] | {"questions": 8}
            want = alone(root, "ppo", name="ppo-one-mesh", **steady)
            command = config(root, "ppo-meshes", "ppo", **steady)
            midway = STEPS + STEPS // 4  # of 2 · STEPS passes, the critic's among them
            [status] = launch(command, root / "ppo-meshes", [("learning", int(signal.SIGKILL), midway, 0.0)])
            assert status == -signal.SIGKILL, status
            tally["learning", "SIGKILL", 1] += 1
            run = alone(
                root, "ppo", name="ppo-meshes", devices=8, mesh={"data": 2, "fsdp": 2, "tensor": 2}, **steady
            )
            ok &= verdict("another mesh", run, want, 1e-4)
        if args.only in (None, "disk"):
            print("ppo, a disk (tmpfs) of 50 MiB: two checkpoints fit, the third does not", flush=True)
            want = alone(root, "ppo")
            command = config(root, "ppo-disk", "ppo", runs=str(root / "disk"))
            (root / "disk").mkdir(exist_ok=True)
            ok &= in_child(full_disk, root / "disk", command, want, f"{root / 'ppo-disk'}.log")
    print(f"\n{sum(tally.values())} kills in {(time.monotonic() - began) / 60:.0f} minutes\n")
    print("| killed | processes | SIGKILL | SIGTERM |\n|---|---|---|---|")
    for point in POINTS:
        for n in (1, 2):
            if tally[point, "SIGKILL", n] + tally[point, "SIGTERM", n]:
                print(f"| {point} | {n} | {tally[point, 'SIGKILL', n]} | {tally[point, 'SIGTERM', n]} |")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
