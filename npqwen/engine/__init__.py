"""The engine: mapped weights, caches, the team of threads and the forward pass. It runs token ids, not text."""
