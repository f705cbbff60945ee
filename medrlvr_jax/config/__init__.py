"""The settings of a run: their fields (schema.py), reading them (load.py) and checking them (check.py)."""
