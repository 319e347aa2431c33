"""How fast a model reads prompts, measured as it does, and so how many of their tokens fit into a pass."""

from __future__ import annotations

TILE = 16
"""Step, in tokens, by which pieces of prompts grow and shrink, and the least room of a pass, however slow it is."""


class PromptSpeed:
    """A moving average of the seconds that a token of a prompt takes, over recent passes."""

    def __init__(self, seconds_per_token: float, chunk: int) -> None:
        """seconds_per_token: assumed until passes are measured. chunk: the most tokens of a pass."""
        self.seconds_per_token = seconds_per_token
        self._chunk = chunk

    def add(self, tokens: int, seconds: float) -> None:
        """Take a pass into account, unless it had too few tokens to tell."""
        if tokens >= TILE:
            self.seconds_per_token += (seconds / tokens - self.seconds_per_token) / 2

    def tokens_in(self, seconds: float) -> int:
        """How many tokens take about `seconds` in one pass."""
        tokens = int(seconds / max(self.seconds_per_token, 1e-9)) // TILE * TILE
        return min(self._chunk, max(TILE, tokens))
