"""How fast this machine quantizes, measured on a sample."""

from __future__ import annotations

import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from npqwen.format.encodings import UNIT_ROWS, Encoding
from npqwen.format.floats import widen
from npqwen.format.layout import Matrix, Part
from npqwen_quant import blocks

SECONDS = 0.2
"""Seconds of measurement for each encoding."""

_ROWS, _COLUMNS = 16 * UNIT_ROWS, 1024


def weights_per_second(encodings: Iterable[Encoding], threads: int, seconds: float = SECONDS) -> dict[str, float]:
    """The number of weights that `threads` threads quantize per second in each encoding, by its name.

    The sample has normally distributed weights in bf16, as checkpoints store them. File input and output is left out.
    """
    values = np.random.default_rng(0).standard_normal((_ROWS, _COLUMNS), np.float32)
    sample: npt.NDArray[np.uint16] = (values.view(np.uint32) >> 16).astype(np.uint16)
    found = {}
    with ThreadPoolExecutor(threads, thread_name_prefix="npqwen-sample") as pool:
        for encoding in encodings:
            _quantize(sample, encoding)  # compiled, or loaded, before the clock starts
            end = time.perf_counter() + seconds

            def repeat(encoding: Encoding = encoding, end: float = end) -> int:
                count = 0
                while True:  # once at least, however late this thread runs
                    _quantize(sample, encoding)
                    count += sample.size
                    if time.perf_counter() >= end:
                        return count

            start = time.perf_counter()
            done = sum(future.result() for future in [pool.submit(repeat) for _ in range(threads)])
            found[encoding.name] = done / (time.perf_counter() - start)
    return found


def _quantize(sample: npt.NDArray[np.uint16], encoding: Encoding) -> None:
    rows, columns = sample.shape
    shape = Matrix("sample", columns, (Part("sample", rows),)).shape(encoding)
    out = np.empty(shape, np.uint8)
    if encoding.is_integer:
        blocks.quantize(widen(sample), out, 0, 1, encoding)
    else:
        blocks.pack_bf16(sample, out, 0, 1)
