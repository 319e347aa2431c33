"""Keys and values of the tokens so far, in pages that are added as they are needed."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from npqwen.config import Config
from npqwen.errors import ContextLengthError, OptionError, OutOfMemoryError
from npqwen.kernels.attention import PAGE, page_items
from npqwen.machine import available_memory

_ALIGN = 64


class KVCache:
    """The cache of one sequence, PAGE positions a page (kernels/attention.py has the layout).

    A page is allocated zeroed, and the operating system lends memory only for what is written.  Growing never
    copies.  Not safe for two threads at once: give each sequence its own.
    """

    def __init__(self, config: Config, limit: int, dtype: type[np.float16] | type[np.float32]) -> None:
        self.length = 0
        """Tokens whose keys and values are in."""
        self.limit = limit
        """Tokens it may hold."""
        items = page_items(config.num_hidden_layers, config.num_key_value_heads, config.head_dim)
        self.like = np.zeros(0, np.uint16 if dtype is np.float16 else np.float32)
        """An array of the pages' dtype, for kernels; they see float16 as its bits."""
        self.page_bytes = items * self.like.itemsize
        self.addresses: NDArray[np.int64] = np.zeros(-(-limit // PAGE), np.int64)
        self._pages: list[NDArray[np.uint8]] = []

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` more.

        Raises ContextLengthError if the limit forbids it, OutOfMemoryError if the machine has no memory for it.
        """
        need = self.length + tokens
        if need > self.limit:
            raise ContextLengthError(
                f"{self.length} tokens in the cache and {tokens} more are over the limit of {self.limit}; "
                "shorten the prompt, or raise the context if the model allows more"
            )
        if len(self._pages) * PAGE < need:
            self._check_memory(need)
        while len(self._pages) * PAGE < need:
            page = np.zeros(self.page_bytes + _ALIGN, np.uint8)
            start = -page.ctypes.data % _ALIGN
            self.addresses[len(self._pages)] = page.ctypes.data + start
            self._pages.append(page)

    def _check_memory(self, need: int) -> None:
        available = available_memory()
        wanted = self.bytes_for(need) - self.nbytes
        if available is not None and wanted > available:
            fits = (available // self.page_bytes + len(self._pages)) * PAGE
            raise OutOfMemoryError(
                f"a cache of {need} tokens takes {wanted / 1e9:.1f} GB more, {available / 1e9:.1f} GB of memory are "
                f"left, enough for {fits} tokens; shorten the prompt, or close other programs"
            )

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens; OptionError if there are fewer."""
        if not 0 <= length <= self.length:
            raise OptionError(f"cannot cut a cache of {self.length} tokens to {length}")
        self.length = length

    def bytes_for(self, tokens: int) -> int:
        """Bytes of the pages that so many tokens take."""
        return -(-tokens // PAGE) * self.page_bytes

    @property
    def nbytes(self) -> int:
        """Bytes of the pages there are."""
        return len(self._pages) * self.page_bytes
