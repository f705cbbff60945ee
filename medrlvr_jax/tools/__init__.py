"""Tools around a run: check the setup, write a config, replay a step, score a file, export a model."""
