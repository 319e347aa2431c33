"""From a checkpoint's tensors to bytes of a converted model's files."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from npqwen.errors import CheckpointError
from npqwen.format.encodings import UNIT_ROWS, Encoding
from npqwen.format.floats import narrow, widen
from npqwen.format.layout import Matrix, Part, Vector, ceil_div
from npqwen_quant import blocks
from npqwen_quant.calibration import Fits
from npqwen_quant.steps import Step
from npqwen_quant.tensors import SourceTensor

Packed = tuple[npt.NDArray[Any], int]
"""Bytes for the output, and how many bytes of the checkpoint they were made from."""


def packed(
    pool: ThreadPoolExecutor,
    threads: int,
    steps: Iterable[Step],
    sources: Mapping[str, SourceTensor],
    fits: Fits | None = None,
) -> Iterator[tuple[Step, Packed]]:
    """The bytes of some steps, in order. The pool runs a few steps ahead of the consumer, which bounds the memory."""
    pending: deque[tuple[Step, Future[Packed]]] = deque()
    for step in steps:
        pending.append((step, pool.submit(_pack, step, sources, fits)))
        if len(pending) > threads + 2:
            ahead, future = pending.popleft()
            yield ahead, future.result()
    while pending:
        ahead, future = pending.popleft()
        yield ahead, future.result()


def bytes_read(step: Step, sources: Mapping[str, SourceTensor]) -> int:
    """How many bytes of the checkpoint a step is made from."""
    content = step.piece.content
    if isinstance(content, bytes):
        return 0
    if isinstance(content, Vector):
        return sources[content.name].nbytes
    total = 0
    for part, row, count, _ in _rows(content, step):
        nbytes = sources[part.source].nbytes
        total += nbytes * (row + count) // part.rows - nbytes * row // part.rows
    return total


def _rows(matrix: Matrix, step: Step) -> Iterator[tuple[Part, int, int, int]]:
    """The rows of each part that a step covers: the part, first row, row count, and the step's unit row for them."""
    for part in matrix.parts:
        start = max(0, ceil_div(step.first - part.start, part.stride))
        stop = min(part.unit_rows, ceil_div(step.last - part.start, part.stride))
        if start < stop:
            row = start * UNIT_ROWS
            count = min(stop * UNIT_ROWS, part.rows) - row
            yield part, row, count, part.start + start * part.stride - step.first


def _pack(step: Step, sources: Mapping[str, SourceTensor], fits: Fits | None) -> Packed:
    content = step.piece.content
    if isinstance(content, bytes):
        return np.frombuffer(content, np.uint8), 0
    if isinstance(content, Vector):
        return _pack_vector(content, sources)
    assert step.piece.encoding is not None
    return _pack_rows(content, step.piece.encoding, step, sources, fits)


def _pack_vector(vector: Vector, sources: Mapping[str, SourceTensor]) -> Packed:
    source = sources[vector.name]
    out = np.zeros(vector.shape, np.float32)
    out[: vector.length] = widen(source.read(0, vector.length))
    if not np.isfinite(out).all():
        raise _not_finite(source, vector.name)
    return out, source.nbytes


def _pack_rows(
    matrix: Matrix, encoding: Encoding, step: Step, sources: Mapping[str, SourceTensor], fits: Fits | None
) -> Packed:
    """The unit rows of a step: uint8 (unit rows, bytes per unit row)."""
    out = np.empty((step.last - step.first, matrix.shape(encoding)[1]), np.uint8)
    for part, row, count, place in _rows(matrix, step):
        if fits is not None and part.source in fits:
            fitted = fits.rows(part.source, row, count, (part.rows, matrix.columns))
            blocks.store(fitted, encoding, out, place, part.stride)
        else:
            _store(sources[part.source].read(row, count), out, place, encoding, part, sources)
    return out, bytes_read(step, sources)


def _store(
    rows: npt.NDArray[Any],
    out: npt.NDArray[np.uint8],
    start: int,
    encoding: Encoding,
    part: Part,
    sources: Mapping[str, SourceTensor],
) -> None:
    """Store a part's rows (n, columns) in the unit rows `start`, `start + part.stride`, ... of `out`.

    Raises CheckpointError for a weight that the encoding cannot store.
    """
    source = sources[part.source]
    if not encoding.is_integer:
        bits = narrow(rows)
        infinite = (bits & 0x7F80) == 0x7F80
        if infinite.any():
            if np.isfinite(widen(rows)).all():
                raise CheckpointError(f"{source.path}: {part.source} has a weight too large for {encoding.name}")
            raise _not_finite(source, part.source)
        blocks.pack_bf16(bits, out, start, part.stride)
        return
    largest = blocks.quantize(widen(rows), out, start, part.stride, encoding)
    if not np.isfinite(largest):
        raise _not_finite(source, part.source)


def _not_finite(source: SourceTensor, name: str) -> CheckpointError:
    return CheckpointError(f"{source.path}: {name} holds NaN or infinity; the checkpoint is broken")
