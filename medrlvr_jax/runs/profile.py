"""Measure where a run spends its time: compilations during the run, and a trace of some steps.

A run compiles its programs before the first step (`ahead.compile_ahead`). `Compiles` records any later
compilation, because no metric shows its time. `log.profile: [first, last]` traces steps with jax.profiler.
XProf, TensorBoard and Perfetto read the trace. It has the host's annotations `step`, `score`, `log` and
`evaluate`, and the device's scopes `prefill`, `decode`, `assess_policy`, `assess_reference`, `assess_critic`,
`gradients` and `optimizer`.
"""

from pathlib import Path
from typing import Any

import jax

EVENT = "/jax/core/compile/backend_compile_duration"


class Compiles:
    """Records the name and the seconds of each compilation while the context is open."""

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
        """Return (program, seconds) of each compilation since the last call."""
        compiled, self._compiled = self._compiled, []
        return compiled

    def explain_cache_misses(self) -> None:
        """Let JAX log the reason of each compilation from now on."""
        jax.config.update("jax_explain_cache_misses", True)


class Profile:
    """Traces the steps `first` to `last` into a folder. Call `before_step(n)` before each step n."""

    def __init__(self, folder: Path, steps: tuple[int, int] | None):
        self._folder, (self._first, self._last), self._on = folder, steps or (0, 0), False

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop()

    def before_step(self, n: int) -> None:
        """Start the trace if step `n` is in it, and stop it after its last step."""
        if self._on and n > self._last:
            self._stop()
        elif not self._on and self._first <= n <= self._last:
            jax.profiler.start_trace(self._folder)
            self._on = True

    def _stop(self) -> None:
        if self._on:
            self._on = False
            jax.profiler.stop_trace()
