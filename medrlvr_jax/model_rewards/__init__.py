"""Rewards that ask a model: the policy itself (policy.py), or a verifier, on the mesh or on a server."""
