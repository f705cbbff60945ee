"""Beside a run: benchmarks, the doctor, a step replayed, a file of completions scored."""
