"""What a run writes, says and needs: logs, console, checkpoints, digests of its inputs, profiles."""
