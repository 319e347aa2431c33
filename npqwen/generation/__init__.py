"""Text from a prompt: options, sampling, the steps of one sequence, what drives them, and sessions that keep a cache."""
