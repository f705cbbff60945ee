"""The page and the pictures of runs."""
