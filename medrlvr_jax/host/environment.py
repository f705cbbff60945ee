"""What a command settles before it imports JAX: quiet libraries, and where compiled programs are stored.

Only variables that the user has not set are set.
"""

import glob
import importlib.util
import os
from pathlib import Path

# Device files of TPUs (the first two), NVIDIA GPUs (also under WSL) and AMD GPUs.
ACCELERATORS = ("/dev/accel*", "/dev/vfio/*", "/dev/nvidia[0-9]*", "/dev/dxg", "/dev/kfd")
CACHE_BYTES = 4 * 2**30  # least recently used programs beyond this are removed


def prepare(cache: bool = True) -> None:
    """Set the variables that JAX, XLA and transformers read. `cache`: store compiled programs."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # errors only
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it misses PyTorch, which is not used
    # libtpu comes with the extra `plan`. Where there is no TPU, JAX would try it, and it prints errors.
    if importlib.util.find_spec("libtpu") and not any(glob.glob(file) for file in ACCELERATORS):
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    # A folder that the user names may hold programs stored without a limit. With one, JAX fails at them.
    if cache and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(cache_folder())
        os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(CACHE_BYTES))
        remove_torn(cache_folder())


def remove_torn(folder: Path) -> None:
    """Remove programs without their time of use, as a process leaves them that is killed while it stores one.
    JAX would store nothing more beside them.
    """
    for program in folder.glob("*-cache"):
        if not program.with_name(f"{program.name.removesuffix('-cache')}-atime").exists():
            program.unlink(missing_ok=True)


def cache_folder() -> Path:
    """`medrlvr_jax/xla` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "medrlvr_jax" / "xla"
