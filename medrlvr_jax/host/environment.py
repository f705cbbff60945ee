"""Environment variables that a command sets before it imports JAX: fewer warnings, and a compilation cache.

Variables that the user has set are not changed.
"""

import glob
import importlib.util
import os
from pathlib import Path

# Device files of TPUs (the first two), NVIDIA GPUs (the last of them under WSL) and AMD GPUs.
ACCELERATORS = ("/dev/accel*", "/dev/vfio/*", "/dev/nvidia[0-9]*", "/dev/dxg", "/dev/kfd")
CACHE_BYTES = 4 * 2**30  # JAX removes the least recently used programs beyond this size


def prepare(cache: bool = True) -> None:
    """Set variables for JAX, XLA and transformers. `cache`: store compiled programs."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # errors only
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # such as that PyTorch is missing
    # The extra `plan` installs libtpu. Without a TPU, JAX would try to use it, and it prints errors.
    if importlib.util.find_spec("libtpu") and not any(glob.glob(file) for file in ACCELERATORS):
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    # JAX cannot apply a size limit to a cache that was filled without one, as the user's own may be.
    if cache and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(cache_folder())
        os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(CACHE_BYTES))
        remove_torn(cache_folder())


def remove_torn(folder: Path) -> None:
    """Remove programs that lack their file of the last access: a process was killed while it stored them.

    JAX would store no further program in such a cache.
    """
    for program in folder.glob("*-cache"):
        if not program.with_name(f"{program.name.removesuffix('-cache')}-atime").exists():
            program.unlink(missing_ok=True)


def cache_folder() -> Path:
    """Return `medrlvr_jax/xla` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "medrlvr_jax" / "xla"
