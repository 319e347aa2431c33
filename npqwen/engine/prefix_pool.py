"""The pool of prefixes that a model's options describe."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from npqwen.checks import check_whole
from npqwen.engine.prefix_files import DEFAULT_SIZE, PrefixFiles
from npqwen.engine.prefixes import Prefixes
from npqwen.errors import OptionError

PREFIX_MEMORY = 4 << 30
"""Most bytes of prefixes in memory by default, or a quarter of the available memory if that is less."""


def new_pool(
    directory: Path | None,
    most: int | None,
    memory: int | None,
    *,
    available: int | None,
    files: Callable[[Path, int], PrefixFiles],
    recurrent: bool,
    busy: Callable[[], bool],
    notice: Callable[[str], None] | None,
) -> Prefixes:
    """directory, most, memory: the options prefix_cache, prefix_cache_size and prefix_memory of `npqwen.load`.

    available: bytes of memory besides the weights, None if the system does not report it. files: opens the directory
    with a limit in bytes. The others are those of Prefixes. Raises OptionError, and what `files` raises.
    """
    opened = None
    if directory is not None:
        opened = files(directory, DEFAULT_SIZE if most is None else check_whole("prefix_cache_size", most, 1))
    elif most is not None:
        raise OptionError("prefix_cache_size has no effect without prefix_cache; give the directory, too")
    if memory is not None:
        check_whole("prefix_memory", memory)
        if opened is not None and memory < opened.page_bytes:
            raise OptionError(
                f"prefix_memory is {memory}; with prefix_cache it must be at least {opened.page_bytes}, one page"
            )
    left = PREFIX_MEMORY if available is None else max(0, available) // 4
    return Prefixes(
        min(PREFIX_MEMORY, left) if memory is None else memory,
        recurrent=recurrent,
        adjustable=memory is None,
        files=opened,
        busy=busy,
        notice=notice,
    )
