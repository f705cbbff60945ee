"""Where a run's time goes: programs that XLA makes while it goes on, and a trace of chosen steps.

All programs are made before the first step (`programs.compile_ahead`), but for some of one number: a later one is time lost that no
metric shows. The trace (`log.profile: [first, last]`) is
jax.profiler's; XProf, TensorBoard and Perfetto read it. In it, beside XLA's own rows: `step`, on the host `score`, `log` and `evaluate`,
on the device the scopes `prefill`, `decode`, `assess_policy`, `assess_reference`, `assess_critic`, `gradients`, `optimizer`.
"""

from pathlib import Path
from typing import Any

import jax

EVENT = "/jax/core/compile/backend_compile_duration"


class Compiles:
    """Listens from `with` on; `drain` returns what was compiled since it was asked last."""

    def __enter__(self) -> "Compiles":
        self._made: list[tuple[str, float]] = []
        jax.monitoring.register_event_duration_secs_listener(self._hear)
        return self

    def __exit__(self, *_: Any) -> None:
        jax.monitoring.unregister_event_duration_listener(self._hear)
        jax.config.update("jax_explain_cache_misses", False)

    def _hear(self, event: str, duration_secs: float, **about: Any) -> None:
        if event == EVENT:
            self._made.append((str(about.get("fun_name", "a program")), duration_secs))

    def drain(self) -> list[tuple[str, float]]:
        """Their names and seconds."""
        made, self._made = self._made, []
        return made

    def explain_cache_misses(self) -> None:
        """From now on JAX itself logs why each further one is needed."""
        jax.config.update("jax_explain_cache_misses", True)


class Profile:
    """`at(n)` before step n: traces the steps from `first` to `last` into a folder. A run that goes on inside them traces the rest."""

    def __init__(self, folder: Path, steps: tuple[int, int] | None):
        self._folder, (self._first, self._last), self._on = folder, steps or (0, 0), False

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop()

    def at(self, n: int) -> None:
        if self._on and n > self._last:
            self._stop()
        elif not self._on and self._first <= n <= self._last:
            jax.profiler.start_trace(self._folder)
            self._on = True

    def _stop(self) -> None:
        if self._on:
            self._on = False
            jax.profiler.stop_trace()
