"""XLA's flags for tests: a CPU's compiler that does not optimise, for programs that run for an instant. With them it takes half the time.

XLA ends the process at a flag it does not know, and since jaxlib 0.11 it knows fewer.
"""

from importlib.metadata import version

OLD = tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11)
FLAGS = "--xla_backend_optimization_level=0" + " --xla_cpu_use_fusion_emitters=false" * OLD
