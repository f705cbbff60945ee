"""The machines that `plan` knows: their published speeds, and compile-only devices for them.

Peak FLOPs, memory and link speeds are per chip, as published (dense bfloat16):
- v5e, v5p, v6e: docs.cloud.google.com/tpu/docs/{v5e,v5p,v6e}. Their "inter-chip interconnect bandwidth" is
  the sum of both directions of all ports.
- H100 and H200 SXM: NVIDIA's data sheets (NVLink: 900 GB/s, both directions together). Between nodes each GPU
  has one 400 Gb/s NIC, as in a DGX H100.
- L4: NVIDIA's data sheet (PCIe 4 × 16: 64 GB/s, both directions together). Eight share 100 Gb/s, as in
  Google's G2.
`usable` is the memory that XLA gives a program: on a TPU the limit in the compiler's out-of-memory error; on
a GPU 90 % of the card, which needs XLA_PYTHON_CLIENT_MEM_FRACTION=.9 (the default is .75).
"""

import importlib.util
import math
import os
import re
from dataclasses import dataclass
from typing import Any

from medrlvr_jax.host.errors import ConfigError

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    platform: str  # tpu or cuda
    flops: float  # peak bfloat16 FLOPs per second
    usable: float  # bytes of its memory that programs may use
    hbm_speed: float  # bytes per second
    link: float  # bytes per second into one chip, in one ring (two ports of a TPU; all NVLinks of a GPU)
    outer: float = 0.0  # bytes per second into one chip from other nodes; 0 if there are no nodes
    kind: str = ""  # `device_kind` of such a device in JAX


CHIPS = {
    "v5e": Chip("tpu", 197e12, 15.75 * GIB, 819e9, 100e9, kind="TPU v5 lite"),
    "v5p": Chip("tpu", 459e12, 95.74 * GIB, 2765e9, 200e9, kind="TPU v5"),
    "v6e": Chip("tpu", 918e12, 31.25 * GIB, 1638e9, 200e9, kind="TPU v6 lite"),
    "h100": Chip("cuda", 989e12, 0.9 * 84_978_432_000, 3352e9, 450e9, 50e9, kind="NVIDIA H100 80GB HBM3"),
    "h200": Chip("cuda", 989e12, 0.9 * 150_109_000_000, 4800e9, 450e9, 50e9, kind="NVIDIA H200"),
    "l4": Chip("cuda", 121e12, 0.9 * 24_152_899_584, 300e9, 32e9, 1.5e9, kind="NVIDIA L4"),
}

# Device descriptions for XLA:GPU: GPU has the fields that all cards share, CARDS those that differ.
GPU = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  %s
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 8 } device_description_str: "%s"
"""
HOPPER = """core_count: 132 threads_per_core_limit: 2048 shared_memory_per_core: 233472
        shared_memory_per_block_optin: 232448 clock_rate_ghz: 1.98
        cuda_compute_capability { major: 9 minor: 0 } """
CARDS = {
    "h100": f"""{HOPPER}
        memory_bandwidth: 3352320000000 l2_cache_size: 52428800 device_memory_size: 84978432000""",
    "h200": f"""{HOPPER}
        memory_bandwidth: 4800000000000 l2_cache_size: 62914560 device_memory_size: 150109000000""",
    "l4": """core_count: 58 threads_per_core_limit: 1536 shared_memory_per_core: 102400
        shared_memory_per_block_optin: 101376 memory_bandwidth: 300096000000 l2_cache_size: 50331648
        clock_rate_ghz: 2.04 device_memory_size: 24152899584 cuda_compute_capability { major: 8 minor: 9 }""",
}

# launch/gpu_1x.sh and slurm_gpu.sbatch set the same dot-merger threshold. With merging, XLA would copy
# matrices with a common input (q, k, v; gate, up; adapters) side by side for each sampled token.
COMPILE: dict[str, dict[str, Any]] = {
    "tpu": {},
    "cuda": {"xla_gpu_autotune_level": 0, "xla_gpu_dot_merger_threshold_mb": 0},
}
# The effort ranges from -1 to 1. The GPU compiler ignores it.
QUICK = {"tpu": {"exec_time_optimization_effort": -1.0}, "cuda": {}}

CUDA = ("jax_cuda12_plugin", "jax_cuda13_plugin")  # each contains the compiler

# Without these, libtpu looks for the metadata of a TPU VM, warns that it is missing, and allows one process.
LIBTPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",  # any known type: the topology decides what is compiled for
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@dataclass(frozen=True)
class Machine:
    topology: str
    chip: Chip
    shape: tuple[int, ...]
    nodes: int  # groups of chips with fast links; 1 for a TPU slice

    @property
    def count(self) -> int:
        """The number of chips."""
        return math.prod(self.shape)

    def seconds(self, received: float, group: int, crosses: bool) -> float:
        """Return the time of a collective in which each of `group` chips receives `received` bytes.

        `crosses`: the group spans nodes. Its members in one node share the node's NICs: each receives a part
        from outside and passes it on over NVLink.
        """
        inside = received / self.chip.link
        members = max(1, group // self.nodes)  # in one node
        return max(inside, received / (self.chip.outer * members)) if crosses else inside


def parse(topology: str) -> Machine:
    """Parse `v5e:4x4`, `v5p:4x4x4`, `h100:8` or `h100:2x8` (nodes × GPUs). Raise `ConfigError` for others."""
    kind, _, shape = topology.partition(":")
    if kind not in CHIPS or not re.fullmatch(r"\d+(x\d+)*", shape):
        form = f"write CHIP:SHAPE, such as v5e:4x4 or h100:2x8; the chips are {', '.join(CHIPS)}"
        raise ConfigError(f"--topology: {topology!r}: {form}")
    sizes, chip = tuple(map(int, shape.split("x"))), CHIPS[kind]
    if chip.platform == "cuda" and len(sizes) > 2:
        form = f"GPUs are written GPUS or NODESxGPUS, such as {kind}:8 or {kind}:2x8"
        raise ConfigError(f"--topology: {topology!r}: {form}")
    nodes = sizes[0] if chip.platform == "cuda" and len(sizes) == 2 else 1
    return Machine(topology, chip, sizes, nodes)


def devices(machine: Machine) -> list[Any]:
    """Return compile-only devices of the machine. Raise `ConfigError` if the package with its compiler is
    missing (extras `plan` and `plan-cuda`) or the compiler does not know the topology.
    """
    on_tpu, field = machine.chip.platform == "tpu", f"--topology: {machine.topology}"
    packages, extra = (("libtpu",), "plan") if on_tpu else (CUDA, "plan-cuda")
    if not any(map(importlib.util.find_spec, packages)):
        raise ConfigError(f"{field}: its compiler is not installed; pip install 'medrlvr-jax[{extra}]'")
    import jax
    from jax.experimental import topologies

    if not on_tpu:
        jax.devices("cpu")  # initialises the backends, which loads the CUDA plug-in
        kind = machine.topology.partition(":")[0]
        card = GPU % (CARDS[kind], machine.chip.kind)
        options = {"target_config": card, "topology": f"1x{machine.nodes}x{machine.count // machine.nodes}"}
        return list(topologies.get_topology_desc(platform="cuda", topology_name=kind, **options).devices)
    for name, value in LIBTPU.items():
        os.environ.setdefault(name, value)
    # by default libtpu assumes four chips per host
    options = {"chips_per_host_bounds": [*machine.shape, 1, 1][:3]} if machine.count < 4 else {}
    try:
        topology = topologies.get_topology_desc(platform="tpu", topology_name=machine.topology, **options)
        return list(topology.devices)
    except jax.errors.JaxRuntimeError as e:
        raise ConfigError(f"{field}: the TPU compiler does not know this slice: {str(e)[:200]}") from None
