"""What a run is: its settings (schema.py), read from YAML and overrides and checked as a whole (load.py)."""
