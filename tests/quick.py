"""XLA's flags for tests: compile fast, without optimisation, because a test's programs run for an instant.
Half the time.

One module a program: splitting it for parallel code generation costs a sixth more work, and the cores are
busy with other tests. XLA ends the process at a flag it does not know, and since jaxlib 0.11 it knows fewer.
"""

from importlib.metadata import version

OLD = tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11)
FLAGS = "--xla_backend_optimization_level=0"
FLAGS += " --xla_cpu_parallel_codegen_split_count=1 --xla_cpu_use_fusion_emitters=false" * OLD
