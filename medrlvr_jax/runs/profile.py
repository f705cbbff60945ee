"""Where a run's time goes: programs that XLA compiles during the run, and a trace of chosen steps.

A run compiles its programs before the first step (`ahead.compile_ahead`). A later compilation costs time
that no metric shows, so `Compiles` counts them. `log.profile: [first, last]` traces steps with jax.profiler;
XProf, TensorBoard and Perfetto read the trace. Beside XLA's own rows it has, on the host, `step`, `score`,
`log` and `evaluate`, and on the device the scopes `prefill`, `decode`, `assess_policy`, `assess_reference`,
`assess_critic`, `gradients` and `optimizer`.
"""

from pathlib import Path
from typing import Any

import jax

EVENT = "/jax/core/compile/backend_compile_duration"


class Compiles:
    """Records each compilation, its name and seconds, while the context is open."""

    def __enter__(self) -> "Compiles":
        self._compiled: list[tuple[str, float]] = []
        jax.monitoring.register_event_duration_secs_listener(self._record)
        return self

    def __exit__(self, *_: Any) -> None:
        jax.monitoring.unregister_event_duration_listener(self._record)
        jax.config.update("jax_explain_cache_misses", False)

    def _record(self, event: str, duration_secs: float, **attributes: Any) -> None:
        if event == EVENT:
            self._compiled.append((str(attributes.get("fun_name", "a program")), duration_secs))

    def drain(self) -> list[tuple[str, float]]:
        """(program, seconds) of each compilation since the last call."""
        compiled, self._compiled = self._compiled, []
        return compiled

    def explain_cache_misses(self) -> None:
        """From now on JAX logs why it compiles."""
        jax.config.update("jax_explain_cache_misses", True)


class Profile:
    """Traces steps `first` to `last` into a folder, a resumed run the rest; call `at(n)` before step n."""

    def __init__(self, folder: Path, steps: tuple[int, int] | None):
        self._folder, (self._first, self._last), self._on = folder, steps or (0, 0), False

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop()

    def at(self, n: int) -> None:
        """Start or stop the trace, if step `n` is the first of it or comes after the last."""
        if self._on and n > self._last:
            self._stop()
        elif not self._on and self._first <= n <= self._last:
            jax.profiler.start_trace(self._folder)
            self._on = True

    def _stop(self) -> None:
        if self._on:
            self._on = False
            jax.profiler.stop_trace()
