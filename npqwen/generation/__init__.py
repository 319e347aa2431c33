"""Text from a prompt: options, sampling, the steps of one sequence, their driver, and sessions that keep a cache."""
