"""Memory read bandwidth of this machine: the limit of decoding, which reads every weight once per token."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from numba import njit

from npqwen.engine.team import Team
from npqwen.kernels.compiled import compile_kernel
from npqwen.kernels.pieces import claim, leave
from npqwen.simd.tile import LANES, add_stream, store, zeros

_CHUNK = 1 << 15
"""float32 that a thread claims at a time: 128 KiB."""
_STEP_BYTES = 512
_STEP = _STEP_BYTES // 4
"""float32 that are prefetched and added at a time."""
_SUMS = 4
"""Vector accumulators: independent chains of additions."""


@njit(nogil=True)
def read(team: Any, member: int, data: Any, out: Any) -> None:
    """Read float32 `data` (a multiple of 512 bytes) as the matrix kernels do, and sum it, so that no load is dropped.

    out: float32, receives 4 vectors of sums per member.
    """
    sums = zeros(_SUMS, 1, 1)
    pieces = (data.size + _CHUNK - 1) // _CHUNK
    while True:
        piece = claim(team, pieces)
        if piece == pieces:
            break
        first = _CHUNK * piece
        for at in range(first, min(first + _CHUNK, data.size), _STEP):
            sums = add_stream(sums, data, at, _STEP)
    store(sums, out, member * _SUMS * LANES, 1, LANES)
    leave(team)


class ReadBandwidth:
    """Measures the bandwidth at which `threads` threads read an array of `size` bytes. A context manager."""

    def __init__(self, threads: int, size: int = 1 << 28) -> None:
        self._data, self._sums = np.ones(size // 4, np.float32), np.zeros(threads * _SUMS * LANES, np.float32)
        self._team = Team(threads)
        compile_kernel(read, (self._team.row(0), 0, self._data, self._sums))

    def measure(self, repeat: int = 3) -> float:
        """Bytes per second: the median of `repeat` passes over the array."""
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
