"""Compare three PPO steps on meshes of fake devices and of several processes with those on one device.

python tests/invariance.py                           # all CASES, as the table of
                                                     # docs/pages/numbers/exactness.md
python tests/invariance.py FOLDER data=2,fsdp=2 …    # some meshes, in this process or as one of
                                                     # JAX_NUM_PROCESSES
"""

import math
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import quick

HERE = Path(__file__).parent
CASES = {  # (processes, devices per process): meshes
    (1, 8): [
        "data=1",
        "data=8",
        "data=2,fsdp=2,tensor=2",
        "fsdp=8",
        "fsdp=2,tensor=4",
        "slices=2,data=2,fsdp=2",
    ],
    (2, 2): ["data=4", "data=2,fsdp=2", "tensor=4", "slices=2,fsdp=2"],
    (4, 2): ["data=4,fsdp=2", "fsdp=2,tensor=4", "slices=2,fsdp=4"],
}


def environment(n: int, devices: int) -> dict[str, str]:
    """Return the environment of one of n child processes with fake devices. Programs are compiled without
    optimisation, because they run for an instant.

    Several processes have no compilation cache: JAX fills only that of process 0, which would then wait while
    the others compile, and gloo's first connection times out after 30 s.
    """
    flags = f"--xla_force_host_platform_device_count={devices} {quick.FLAGS}"
    cache = {"JAX_COMPILATION_CACHE_DIR": str(HERE.parent / ".cache" / "jax") if n == 1 else ""}
    cache |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1"}
    cpu = {"JAX_PLATFORMS": "cpu", "PJRT_NPROC": str(4 * devices), "XLA_FLAGS": flags}  # see conftest.py
    return os.environ | cache | cpu | {"PYTHONPATH": f"{HERE.parent}{os.pathsep}{HERE}"}


def launch(n: int, devices: int, command: list[str], **popen) -> list[subprocess.Popen]:
    """Start `python command` as n processes with fake devices. {i} in a word becomes the process number."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{s.getsockname()[1]}"
    env = environment(n, devices) | (
        {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(n)} if n > 1 else {}
    )
    words = [[word.replace("{i}", str(i)) for word in command] for i in range(n)]
    return [
        subprocess.Popen(
            [sys.executable, *words[i]], env=env | {"JAX_PROCESS_ID": str(i)}, text=True, **popen
        )
        for i in range(n)
    ]


def run(folder: Path, meshes: list[str]) -> None:
    """Run three PPO steps on each mesh. Process 0 writes tokens, rewards and parameters."""
    import jax

    from medrlvr_jax.host import processes

    several = "JAX_NUM_PROCESSES" in os.environ
    if several:
        processes.initialize()
    from test_learn import Loop, steady

    for mesh in meshes:
        sizes = {name: int(size) for name, size in (item.split("=") for item in mesh.split(","))}
        tokens, rewards, params = Loop(steady("gae", mesh=sizes), math.prod(sizes.values())).run(3)
        if jax.process_index() == 0:
            leaves = {f"p{i}": leaf for i, leaf in enumerate(jax.tree.leaves(params))}
            np.savez(folder / f"{mesh}.npz", tokens=tokens, rewards=rewards, **leaves)
    if several:
        jax.distributed.shutdown()


def measure(n: int, devices: int, meshes: list[str]) -> list[dict[str, np.ndarray]]:
    """Return the arrays that `run` writes for each mesh."""
    with tempfile.TemporaryDirectory() as folder:
        codes = [p.wait(900) for p in launch(n, devices, [str(HERE / "invariance.py"), folder, *meshes])]
        assert codes == [0] * n, codes
        return [dict(np.load(f"{folder}/{mesh}.npz")) for mesh in meshes]


def compare(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> tuple[int, int, float]:
    """Return the numbers of different tokens and rewards, and the largest difference of a parameter."""
    largest = max(float(np.abs(a[k] - b[k]).max()) for k in a if k.startswith("p"))
    return int((a["tokens"] != b["tokens"]).sum()), int((a["rewards"] != b["rewards"]).sum()), largest


def table() -> None:
    print(
        "| processes × devices | mesh | tokens that differ | rewards that differ | largest difference of a parameter |"
    )
    print("|---|---|---|---|---|")
    expected = None
    for (n, devices), meshes in CASES.items():
        for mesh, result in zip(meshes, measure(n, devices, meshes), strict=True):
            expected = expected or result
            tokens, rewards, largest = compare(result, expected)
            counts = f"{tokens} of {expected['tokens'].size} | {rewards} of {expected['rewards'].size}"
            print(
                f"| {n} × {devices if mesh != 'data=1' else 1} | {mesh} | {counts} | {largest:.1e} |",
                flush=True,
            )


if __name__ == "__main__" and len(sys.argv) > 1:
    run(Path(sys.argv[1]), sys.argv[2:])
elif __name__ == "__main__":
    table()
