"""What a model takes of this machine's memory, and the context that fits."""

from __future__ import annotations

from dataclasses import dataclass

from npqwen.errors import OutOfMemoryError
from npqwen.format.layout import ceil_div
from npqwen.hardware.machine import HEADROOM
from npqwen.kernels.attention import PAGE

RESERVED = HEADROOM + (96 << 20)
"""Bytes that are not planned with: Python, Numba and the kernels take some 90 MB more once they run."""


@dataclass(frozen=True)
class Budget:
    """All in bytes.  The weights are mapped from files: what does not fit is read again.  All else has to fit."""

    weights: int
    working: int
    """What a forward pass writes to, at most."""
    page: int
    """Keys and values of PAGE tokens."""
    available: int | None
    """None if the system does not tell; then everything fits."""

    def cache(self, tokens: int) -> int:
        """Keys and values of so many tokens."""
        return ceil_div(tokens, PAGE) * self.page

    def needed(self, tokens: int) -> int:
        """Everything at a context of so many tokens."""
        return self.weights + self.working + self.cache(tokens)

    def fitting(self, limit: int) -> int:
        """Tokens of context, at most `limit`, for which all fits at once; 0 if not even the weights do."""
        return self._tokens(self.weights, limit)

    def possible(self, limit: int) -> int:
        """The same if weights are read from the files again and again."""
        return self._tokens(0, limit)

    def resident(self, tokens: int) -> int | None:
        """What memory holds of the weights beside a context of so many tokens; None if the system does not tell."""
        if self.available is None:
            return None
        return min(self.weights, max(0, self.available - RESERVED - self.working - self.cache(tokens)))

    def check(self, context: int | None) -> None:
        """Raise OutOfMemoryError if what is not mapped cannot be held: buffers, and the cache of a wanted context."""
        if self.available is None:
            return
        have = f"{self.available / 1e9:.2f} GB of memory are available"
        most = self.possible(1 << 60)
        if not most:
            raise OutOfMemoryError(
                f"the model needs {(self.working + self.page + RESERVED) / 1e9:.2f} GB beside its weights, {have}; "
                "close other programs, or take a smaller model"
            )
        if context is not None and most < context:
            raise OutOfMemoryError(
                f"a context of {context} tokens takes {(self.working + self.cache(context)) / 1e9:.2f} GB beside the "
                f"weights, {have}, enough for {most} tokens; give a smaller context, or close other programs"
            )

    def _tokens(self, weights: int, limit: int) -> int:
        if self.available is None:
            return limit
        return min(limit, max(0, self.available - RESERVED - self.working - weights) // self.page * PAGE)
