"""How a policy learns: advantages, losses, one update; a training step and the loop around it."""
