"""How fast this machine reads memory: the limit of decoding, which reads every weight once a token."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from numba import njit

from npqwen.engine.team import Team
from npqwen.kernels.barrier import barrier, claim
from npqwen.kernels.compiled import compile_kernel
from npqwen.simd.tile import LANES, add_up, store, zeros

_PIECE = 1 << 15
"""float32 a thread takes at a time: 128 KiB."""
_STEP_BYTES = 512
_STEP = _STEP_BYTES // 4
"""float32 that it asks for ahead, and adds up, at a time."""
_SUMS = 4
"""Vectors of sums: additions that do not wait for each other."""


@njit(nogil=True)
def read(team: Any, member: int, data: Any, out: Any) -> None:
    """Add up float32 `data` (a multiple of 512 bytes), for the sake of reading it, as the matrix kernels do.

    out: float32, 4 vectors of sums a member.
    """
    sums = zeros(_SUMS, 1, 1)
    while True:
        first = claim(team, _PIECE)
        if first >= data.size:
            break
        for at in range(first, min(first + _PIECE, data.size), _STEP):
            sums = add_up(sums, data, at, _STEP)
    store(sums, out, member * _SUMS * LANES, 1, LANES)
    barrier(team)


class ReadBandwidth:
    """Measures what `threads` threads read from `size` bytes of memory; to be closed, or used in a `with`."""

    def __init__(self, threads: int, size: int = 1 << 28) -> None:
        self._data, self._sums = np.ones(size // 4, np.float32), np.zeros(threads * _SUMS * LANES, np.float32)
        self._team = Team(threads)
        compile_kernel(read, (self._team.state, 0, self._data, self._sums))

    def measure(self, repeat: int = 3) -> float:
        """Bytes a second now: the median of `repeat` times."""
        times = []
        for _ in range(repeat):
            start = time.perf_counter()
            self._team.run(read, self._data, self._sums)
            times.append(time.perf_counter() - start)
        return float(self._data.nbytes / np.median(times))

    def __enter__(self) -> ReadBandwidth:
        return self

    def __exit__(self, *_: object) -> None:
        self._team.close()
