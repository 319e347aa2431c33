"""How much of this machine's memory a model needs, and the context that fits."""

from __future__ import annotations

from dataclasses import dataclass

from npqwen.errors import OutOfMemoryError
from npqwen.format.layout import ceil_div
from npqwen.hardware.machine import HEADROOM
from npqwen.kernels.cache_page import PAGE

RESERVED = HEADROOM + (96 << 20)
"""Bytes left unplanned: Python, Numba and the kernels use about 90 MB more once they run."""


@dataclass(frozen=True)
class Budget:
    """Bytes that a model needs. Weights are mapped from files and can be read again; everything else must fit."""

    weights: int
    working: int
    """Buffers of the forward pass, at most."""
    page: int
    """Keys and values of PAGE tokens."""
    available: int | None
    """Available bytes of the machine's memory; None if the system does not report it: then everything fits."""
    states: int = 0
    """A hybrid's recurrent states, checkpoints included, however many tokens there are."""

    def cache(self, tokens: int) -> int:
        """Bytes of the cache of this many tokens."""
        return ceil_div(tokens, PAGE) * self.page + self.states

    def needed(self, tokens: int) -> int:
        """Bytes of everything, at a context of this many tokens."""
        return self.weights + self.working + self.cache(tokens)

    def fitting(self, limit: int) -> int:
        """Tokens of context, at most `limit`, for which everything fits at once; 0 if the weights alone do not."""
        return self._tokens(self.weights, limit)

    def possible(self, limit: int) -> int:
        """Tokens of context, at most `limit`, for which everything but the weights fits."""
        return self._tokens(0, limit)

    def resident(self, tokens: int) -> int | None:
        """Bytes of the weights that stay in memory beside a context of this many tokens; None if unknown."""
        if self.available is None:
            return None
        return min(self.weights, max(0, self.available - RESERVED - self.working - self.cache(tokens)))

    def check(self, context: int | None) -> None:
        """Raise OutOfMemoryError if the buffers, or the cache of a requested context, do not fit."""
        if self.available is None:
            return
        have = f"{self.available / 1e9:.2f} GB of memory are available"
        longest = self.possible(1 << 60)
        if not longest:
            raise OutOfMemoryError(
                f"the model needs {(self.working + self.cache(1) + RESERVED) / 1e9:.2f} GB besides its weights and "
                f"{have}; "
                "close other programs, or choose a smaller model"
            )
        if context is not None and longest < context:
            raise OutOfMemoryError(
                f"a context of {context} tokens needs {(self.working + self.cache(context)) / 1e9:.2f} GB besides the "
                f"weights and {have}, enough for {longest} tokens; choose a smaller context, or close other programs"
            )

    def _tokens(self, weights: int, limit: int) -> int:
        if self.available is None:
            return limit
        left = self.available - RESERVED - self.working - self.states - weights
        return min(limit, max(0, left) // self.page * PAGE)
