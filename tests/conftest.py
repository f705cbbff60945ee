"""Eight fake CPU devices for every test; and since compiling is most of the time, a cache, and a compiler
that does not optimise.

The flags of quick.py take the time of a test's programs to a half. What users run is compiled without them:
see launch/quickstart.sh.

PJRT_NPROC is the size of XLA:CPU's one pool of threads, by default as many as devices. A collective blocks
its thread, and two that do not depend on one another may block two threads of one device: on a busy machine
nobody was left to join them, and XLA ended the process.
"""

import os
from pathlib import Path

import quick

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["PJRT_NPROC"] = "32"
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        quick.FLAGS,
    ]
)
os.environ["OMP_NUM_THREADS"] = "1"  # torch's, on shared cores

import jax

jax.config.update("jax_compilation_cache_dir", str(Path(__file__).parents[1] / ".cache" / "jax"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)

# Longest first: launch/test.sh deals out whole files in this order, so that no worker is left with a long one
# at the end.
LONGEST = (
    "plan",
    "train",
    "distributed",
    "on_device",
    "notebooks",
    "learn",
    "lora",
    "hf",
    "inputs",
    "bench",
    "reproduce",
    "faults",
)


def pytest_collection_modifyitems(items):
    order = {f"test_{name}": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))
