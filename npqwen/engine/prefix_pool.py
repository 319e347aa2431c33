"""The pool of prefixes that a model's options describe."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from npqwen.checks import check_whole
from npqwen.engine.prefixes import Prefixes
from npqwen.errors import OptionError

PREFIX_MEMORY = 4 << 30
"""Most bytes of prefixes in memory by default, or a quarter of the available memory if that is less."""


def new_pool(
    memory: int | None, available: int | None, recurrent: bool, notice: Callable[[str], None] | None
) -> Prefixes:
    """A pool without files. memory: the option prefix_memory of `npqwen.load`. available: bytes of memory besides the
    weights, None if the system does not report it. recurrent, notice: see Prefixes. Raises OptionError.
    """
    if memory is not None:
        check_whole("prefix_memory", memory)
    left = PREFIX_MEMORY if available is None else max(0, available) // 4
    limit = min(PREFIX_MEMORY, left) if memory is None else memory
    return Prefixes(limit, recurrent=recurrent, adjustable=memory is None, notice=notice)


def check_prefix_options(directory: Path | None, limit: int | None, memory: int | None, page_bytes: int) -> None:
    """Raise OptionError for options of `npqwen.load` that contradict each other.

    directory, limit, memory: prefix_cache, prefix_cache_size and prefix_memory. page_bytes: of a page in memory.
    """
    if limit is not None:
        check_whole("prefix_cache_size", limit, 1)
        if directory is None:
            raise OptionError("prefix_cache_size has no effect without prefix_cache; give the directory, too")
    if directory is not None and memory is not None and memory < page_bytes:
        raise OptionError(f"prefix_memory is {memory}; with prefix_cache it must be at least {page_bytes}, one page")
