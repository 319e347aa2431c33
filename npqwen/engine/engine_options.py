"""The options with which a model is loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypedDict

if TYPE_CHECKING:
    import os

    from npqwen.engine.cache_type import CacheType


class EngineOptions(TypedDict, total=False):
    """What `Engine` takes besides a converted directory; `npqwen.load` describes each option.

    notice: called when files of the prefix cache are damaged or cannot be written;
    default: a PrefixCacheWarning. on_compile(done, total): called while kernels are compiled.
    """

    threads: int | None
    context: int | None
    yarn: float | None
    kv: CacheType | None
    adapters: Mapping[str, Any] | None
    prefix_cache: str | os.PathLike[str] | None
    prefix_cache_size: int | None
    prefix_memory: int | None
    notice: Callable[[str], None] | None
    on_compile: Callable[[int, int], None] | None
