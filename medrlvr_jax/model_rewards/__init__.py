"""Components of the reward that need a model: the policy itself (policy.py), or a verifier (verifier.py)."""
