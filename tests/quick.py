"""XLA flags for tests: fast compilation without optimisation, because a test's programs run for an instant.
They halve the time.

One module per program: splitting it for parallel code generation takes a sixth more work, and the cores are
busy with other tests. XLA aborts at an unknown flag, and jaxlib 0.11 removed some.
"""

from importlib.metadata import version

OLD = tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11)
FLAGS = "--xla_backend_optimization_level=0"
FLAGS += " --xla_cpu_parallel_codegen_split_count=1 --xla_cpu_use_fusion_emitters=false" * OLD
