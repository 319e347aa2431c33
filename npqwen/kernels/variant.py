"""Kernels that are made several times, for different constants."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import njit


def variant(*constants: object, **options: Any) -> Callable[[Callable[..., Any]], Any]:
    """njit for a function made for some constants, which become part of its name.

    The linker tells the functions in compiled code by name, types and a number that starts at 1 in every process.
    So of two variants of one name, loaded from what two processes compiled, one would be called for the other.
    """

    def compiled(function: Callable[..., Any]) -> Any:
        function.__qualname__ = "_".join(map(str, (function.__name__, *constants)))
        return njit(nogil=True, **options)(function)

    return compiled
