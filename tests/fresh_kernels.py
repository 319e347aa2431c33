"""Kernels that one process compiles, stores and loads as different processes would."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from numba import njit

from npqwen.kernels import compiled
from npqwen.kernels.compile_events import FUNCTIONS, reporting
from npqwen.kernels.compiled import compile_kernel

COMPILED = [(0, FUNCTIONS), (FUNCTIONS, FUNCTIONS)]
"""The progress that is reported when a function is compiled; nothing is when it is loaded."""


def add_one(x: Any) -> None:
    """Something that compiles in a tenth of a second."""
    x[0] += 1


def load(directory: Path, function: Callable[[Any], None] = add_one) -> list[tuple[int, int]]:
    """Load a function that adds 1 from a kernel directory, or compile and store it; returns the reported progress."""
    calls: list[tuple[int, int]] = []
    kernel, x = njit(function), np.zeros(1)
    compiled._is_usable.cache_clear()
    with (
        mock.patch.object(compiled, "kernel_directory", return_value=directory),
        reporting(lambda done, total: calls.append((done, total))),
    ):
        compile_kernel(kernel, (x,))
    kernel(x)
    assert x[0] == 1
    return calls
