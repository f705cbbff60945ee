"""Beside a run: the doctor, a step replayed, a file of completions scored, a model exported."""
