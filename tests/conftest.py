"""Give every test eight fake CPU devices, a compilation cache, and a compiler without optimisation, because
compilation takes most of the time.

The flags of quick.py halve the time of a test's programs. Users' programs are compiled without them.

PJRT_NPROC is the size of XLA:CPU's thread pool, by default the number of devices. A collective blocks a
thread, and two independent collectives may block two threads of one device. On a busy machine no thread was
left for the other devices, and XLA aborted the process.
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
os.environ["OMP_NUM_THREADS"] = "1"  # for torch, because the cores are shared

import jax

jax.config.update("jax_compilation_cache_dir", str(Path(__file__).parents[1] / ".cache" / "jax"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)

# The longest first: launch/test.sh assigns whole files in this order, so that no worker starts a long file at
# the end.
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
