"""Calls of single kernels, alone and in a team of threads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from npqwen.engine.team import Team
from npqwen.kernels.compiled import compile_kernel


def run(kernel: Any, *args: Any) -> Any:
    """Call a kernel, compiled and cached like those of the package."""
    compile_kernel(kernel, args)
    return kernel(*args)


def together(members: int, kernel: Any, args: Callable[[int], tuple[Any, ...]]) -> None:
    """Call kernel(state, *args(member)) in each member of a team of threads."""
    compile_kernel(kernel, (np.zeros(80, np.int64), *args(0)))
    team = Team(members)
    try:
        team.run(lambda state, member: kernel(state, *args(member)))
    finally:
        team.close()
