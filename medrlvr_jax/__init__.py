"""Med-RLVR in JAX: reinforcement learning from verifiable rewards on medical questions."""

__version__ = "0.1.0"
