"""The files and the output of a run: logs, console, checkpoints, digests of its inputs, profiles."""
