"""Would it fit, and how fast: a run's programs compiled for a machine that is not here."""
