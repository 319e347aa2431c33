"""How fast this machine reads memory: the limit of decoding, which reads every weight once a token."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from numba import njit

from npqwen.compiled import compile_kernel
from npqwen.simd.tile import prefetch
from npqwen.team import Team, barrier, take

_PIECE = 1 << 14
"""int64 a thread takes at a time: 128 KiB."""
_STEP_BYTES = 512
_STEP = _STEP_BYTES // 8
"""int64 that it asks for ahead at a time."""


@njit(nogil=True)
def read(team: Any, member: int, data: Any, sums: Any) -> None:
    """Add up int64 `data`, for the sake of reading it."""
    total = 0
    while True:
        first = take(team, _PIECE)
        if first >= data.size:
            break
        for at in range(first, min(first + _PIECE, data.size), _STEP):
            prefetch(data, at, _STEP_BYTES)
            for item in data[at : at + _STEP]:
                total += item
    sums[member] += total
    barrier(team)


class ReadBandwidth:
    """Measures what `threads` threads read from `size` bytes of memory; to be closed, or used in a `with`."""

    def __init__(self, threads: int, size: int = 1 << 28) -> None:
        self._data, self._sums = np.ones(size // 8, np.int64), np.zeros(threads, np.int64)
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
