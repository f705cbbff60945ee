"""The paper's comparison: many runs of one file, and what they say of its claims."""
