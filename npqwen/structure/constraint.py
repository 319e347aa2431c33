"""Which tokens may follow in one text of a given structure."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from npqwen.errors import OptionError
from npqwen.structure.limits import TOO_COMPLEX
from npqwen.structure.structure import reason
from npqwen.structure.structure_error import StructureError

if TYPE_CHECKING:
    from llguidance import LLMatcher

TOKEN_SECONDS = 0.05
"""The CPU time that a token's constraint may take; most take less than 1 ms (Zen 5)."""
EXCESS_SECONDS = 3.0
"""How much more a text may take before it ends: other texts of the batch wait meanwhile."""


class Constraint:
    """The state of one text's structure: which tokens may come next, which one must.

    matcher: llguidance's, at the beginning. size: tokens of the vocabulary. eos_ids: those that end a text. option:
    names the structure in messages. Every method raises OptionError if the structure becomes too complex to follow, or
    has taken too long.
    """

    def __init__(self, matcher: LLMatcher, size: int, eos_ids: Sequence[int], option: str) -> None:
        self._matcher = matcher
        self._eos_ids = eos_ids
        self._option = option
        self._bits = np.zeros(-(-size // 32), np.uint32)
        self._excess = 0.0
        """By how many seconds recent tokens took longer than `TOKEN_SECONDS`."""

    @property
    def ended(self) -> bool:
        """Whether the text is complete, and nothing but eos may follow."""
        return self._matcher.is_stopped()

    @property
    def complete(self) -> bool:
        """Whether the text may end here."""
        return self._matcher.is_accepting()

    def allowed(self) -> NDArray[np.uint32]:
        """The tokens that may come next, as bits: token i is bit i % 32 of word i // 32. Valid until the next call."""
        with self._timed():
            self._matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
        return self._bits

    def forced(self) -> list[int]:
        """The tokens that must come next, since the structure allows no other text; perhaps none.

        They are the tokenizer's encoding of that text, without normalization and added tokens, as far as later text
        cannot change it. `allowed` has only the first of them.
        """
        with self._timed():
            return self._matcher.compute_ff_tokens()

    def push(self, id: int) -> None:
        """Take the next token of the text. OptionError if it is not allowed."""
        if id in self._eos_ids and self._matcher.is_accepting():
            return
        self._excess = max(0.0, self._excess - TOKEN_SECONDS)
        with self._timed():
            if not self._matcher.consume_token(id) and "doesn't satisfy" in self._matcher.get_error():
                raise OptionError(f"token id {id} was forced into the text, where {self._option} does not allow it")

    @contextmanager
    def _timed(self) -> Iterator[None]:
        """Adds the time of a call of the matcher, and raises OptionError if it failed or the text took too long."""
        start = time.thread_time()  # not the time in which other processes had the CPU
        yield
        self._excess += time.thread_time() - start
        if self._matcher.is_error():
            raise StructureError(self._option, f"cannot be followed: {reason(self._matcher.get_error())}")
        if self._excess > EXCESS_SECONDS:
            raise StructureError(self._option, f"cannot be followed: {TOO_COMPLEX}")
