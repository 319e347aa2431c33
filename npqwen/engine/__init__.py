"""Runs tokens: mapped weights, caches, the team of threads and the forward pass."""
