"""The paper's comparison: many runs from one file, and tests of the paper's claims on their results."""
