"""Programs that XLA makes while a run goes on. All of them belong to its first step: a later one is time lost that no metric shows."""

from typing import Any

import jax

EVENT = "/jax/core/compile/backend_compile_duration"


class Compiles:
    """Listens from `with` on; `taken` says what was compiled since it was asked last."""

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

    def taken(self) -> list[tuple[str, float]]:
        """Their names and seconds."""
        made, self._made = self._made, []
        return made

    def explain(self) -> None:
        """From now on JAX itself logs why each further one is needed."""
        jax.config.update("jax_explain_cache_misses", True)
