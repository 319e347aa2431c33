"""From a checkpoint's tensors to bytes of a converted model's files."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from npqwen.errors import CheckpointError
from npqwen.format.encodings import UNIT_ROWS, Encoding
from npqwen.format.layout import Codebook, Matrix, Part, Vector, ceil_div
from npqwen.format.quantization import FORMAT_VERSION
from npqwen.format.safetensors import make_header
from npqwen_quant import blocks
from npqwen_quant.calibration import Fits
from npqwen_quant.plan import OutputTensor
from npqwen_quant.tensors import SourceTensor, widen

# Weights per task: in float32 they fill a core's cache.
_TASK = 1 << 20

def header(tensors: Iterable[OutputTensor]) -> bytes:
    """The beginning of a file of these tensors, up to their data."""
    metadata = {"format": "npqwen", "format_version": str(FORMAT_VERSION)}
    return make_header(((tensor.name, tensor.dtype, tensor.shape) for tensor in tensors), metadata)


Packed = tuple[npt.NDArray[Any], int]
"""Bytes for the output, and how many bytes of the checkpoint they were made from."""


def packed(
    pool: ThreadPoolExecutor,
    threads: int,
    tensors: Iterable[OutputTensor],
    sources: dict[str, SourceTensor],
    fits: Fits | None = None,
) -> Iterator[Packed]:
    """The tensors' bytes, in order. The pool runs a few tasks ahead of the consumer, which bounds the memory."""
    pending: deque[Future[Packed]] = deque()
    for planned in tensors:
        if isinstance(planned.tensor, Vector):
            pending.append(pool.submit(_pack_vector, planned.tensor, sources))
            continue
        assert planned.encoding is not None
        if isinstance(planned.tensor, Codebook):
            pending.append(pool.submit(_pack_codebook, planned.encoding))
            continue
        for matrix in planned.matrices():
            stride = max(part.stride for part in matrix.parts)
            step = max(1, _TASK // (UNIT_ROWS * matrix.columns * stride)) * stride
            unit_rows = matrix.units[0]
            for first in range(0, unit_rows, step):
                last = min(first + step, unit_rows)
                pending.append(pool.submit(_pack_rows, matrix, planned.encoding, first, last, sources, fits))
                while len(pending) > threads + 2:
                    yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def _pack_vector(vector: Vector, sources: dict[str, SourceTensor]) -> Packed:
    source = sources[vector.name]
    out = np.zeros(vector.shape, np.float32)
    out[: vector.length] = widen(source.read(0, vector.length))
    if not np.isfinite(out).all():
        raise _not_finite(source, vector.name)
    return out, source.nbytes


def _pack_codebook(encoding: Encoding) -> Packed:
    return blocks.codebook(encoding), 0


def _pack_rows(
    matrix: Matrix, encoding: Encoding, first: int, last: int, sources: dict[str, SourceTensor], fits: Fits | None
) -> Packed:
    """The unit rows first to last - 1 of a matrix: uint8 (unit rows, bytes of one)."""
    out = np.empty((last - first, matrix.shape(encoding)[1]), np.uint8)
    bytes_read = 0
    for part in matrix.parts:
        start = max(0, ceil_div(first - part.start, part.stride))
        stop = min(part.unit_rows, ceil_div(last - part.start, part.stride))
        if start < stop:
            row = start * UNIT_ROWS
            count = min(stop * UNIT_ROWS, part.rows) - row
            place = part.start + start * part.stride - first
            if fits is not None and part.source in fits:
                fitted = fits.rows(part.source, row, count, (part.rows, matrix.columns))
                blocks.store(fitted, encoding, out, place, part.stride)
            else:
                _pack(sources[part.source].read(row, count), out, place, encoding, part, sources)
            bytes_read += sources[part.source].nbytes // part.rows * count
    return out, bytes_read


def _pack(
    rows: npt.NDArray[Any],
    out: npt.NDArray[np.uint8],
    start: int,
    encoding: Encoding,
    part: Part,
    sources: dict[str, SourceTensor],
) -> None:
    """Store a part's rows (n, columns) in the unit rows `start`, `start + part.stride`, ... of `out`.

    Raises CheckpointError for a weight that the encoding cannot store.
    """
    source = sources[part.source]
    if not encoding.is_integer:
        bits = _narrow(rows)
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


def _narrow(stored: npt.NDArray[Any]) -> npt.NDArray[np.uint16]:
    """The bits of bf16: copied from bf16, rounded to nearest, ties to even, from f16 or f32."""
    if stored.dtype == np.uint16:
        return stored
    values = stored.astype(np.float32, copy=False).view(np.uint32)
    rounded = (values + 0x7FFF + ((values >> 16) & 1)) >> 16
    # Rounding may carry a NaN's last bits beyond its exponent.
    rounded[(values & 0x7FFFFFFF) > blocks.INFINITY] = 0x7FC0
    return rounded.astype(np.uint16)
