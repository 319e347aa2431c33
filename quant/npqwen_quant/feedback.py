"""Error feedback: each column's rounding error is compensated by the columns not yet rounded.

This is GPTQ (Frantar et al. 2023). With the second moments H = X^T X of a matrix's inputs X, weights w rounded to q
cause a squared output error |(w - q) X^T|^2 = (w - q) H (w - q)^T. Let the inverse of H be U^T D^-1 U, U upper
triangular with ones on its diagonal and D diagonal. When column k is rounded with the error e_k, the optimal update of
each later column j is -e_k U_kj, and the total squared output error is the sum of all e_k^2 D_k. So D is the importance
of the columns when scales are chosen, which happens when a block's first column is reached.
"""

from __future__ import annotations

import contextlib
from concurrent.futures import Executor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from npqwen.format.encodings import BLOCK_COLUMNS
from npqwen.format.layout import pad
from npqwen_quant.fit import fit, pad_columns, row_factors
from npqwen_quant.search import (
    F32,
    I8,
    LANES,
    U8,
    Codebook,
    find_largest,
    interval,
    jit,
    refine,
    round_scale,
    search,
)

STEP = 128
"""Columns between two products of all errors so far with U (MomentFactor.feedback)."""

WIDEST = 6144
"""Most columns whose moments are factored as one matrix. The columns of a wider matrix are divided into groups of about
equal size, and errors are not carried from one group to the next."""

DAMPING = 0.01
"""The fraction of the moments' diagonal that is added to it."""

_COMPARED = 256
"""Rows compared with the plain fit at a time."""

_MARGIN = np.float32(1.2)
"""Headroom of a row's block scales over its largest plain scale, as a factor: corrections make weights larger."""


@dataclass(frozen=True)
class MomentFactor:
    """The inverse of the second moments H of a group of columns as U^T D^-1 U."""

    feedback: F32
    """U (columns, columns): upper triangular, 1 on the diagonal."""
    importance: F32
    """D (columns), divided by its maximum."""
    largest: float = 1.0
    """The maximum of D."""


def factor(moments: F32, damping: float = DAMPING) -> MomentFactor:
    """MomentFactor second moments (columns, columns), symmetric.

    Works for any input: if the moments have no Cholesky decomposition, the damping grows until they have one; moments
    that are not finite give a factor without feedback. Columns whose inputs are all 0 have no feedback.
    """
    columns = len(moments)
    diagonal = np.diag(moments).astype(np.float64)
    used = diagonal > 0
    if not np.isfinite(moments).all() or not used.any():
        return MomentFactor(np.eye(columns, dtype=np.float32), np.ones(columns, np.float32))
    # The decomposition of correlations is as accurate for small inputs as for large ones.
    scale = np.sqrt(np.where(used, diagonal, diagonal.max()))
    correlations = (moments / scale / scale[:, None]).astype(np.float32)
    upper = None
    while upper is None:
        correlations[np.diag_indices(columns)] = 1 + damping
        with contextlib.suppress(np.linalg.LinAlgError):
            # With reversed columns, H = L L^T becomes R R^T with an upper triangular R: U's inverse up to D.
            upper = np.linalg.cholesky(correlations[::-1, ::-1])[::-1, ::-1]
        damping = max(10 * damping, 1e-4)
    root = np.diag(upper).copy()
    feedback = _inverse_of_triangular(upper) * root[:, None]
    feedback *= np.float32(1) / scale.astype(np.float32)
    feedback *= scale.astype(np.float32)[:, None]
    importance = (root.astype(np.float64) * scale) ** 2
    importance[~used] = importance[used].min()
    largest = float(importance.max())
    return MomentFactor(feedback, (importance / largest).astype(np.float32), largest)


def _inverse_of_triangular(upper: F32) -> F32:
    """The inverse of an upper triangular matrix, computed recursively by blocks."""
    n = len(upper)
    if n <= 64:
        inverse: F32 = np.triu(np.linalg.inv(upper))
        return inverse
    half = n // 2
    out = np.zeros((n, n), np.float32)
    out[:half, :half] = first = _inverse_of_triangular(upper[:half, :half])
    out[half:, half:] = second = _inverse_of_triangular(upper[half:, half:])
    np.matmul(first @ -upper[:half, half:], second, out=out[:half, half:])
    return out


@jit
def _round_block(
    x: F32,
    start: int,
    weights: F32,
    units: F32,
    targets: F32,
    curve: F32,
    rounded: F32,
    chosen: F32,
) -> None:
    """chosen[lane]: the best scale of the block x[start : start + 32, lane], as a whole multiple of the row's unit."""
    lanes = x.shape[1]
    block = x[start : start + 32]
    top, best = np.empty(lanes, np.float32), np.zeros(lanes, np.float32)
    tried, scale = np.empty(lanes, np.float32), np.zeros(lanes, np.float32)
    find_largest(block, top)
    for group in targets:
        search(block, weights, True, top, group, curve, tried)
        refine(block, weights, rounded, tried, best, scale)
    column, importance = np.empty(32, np.float32), np.empty(32, np.float32)
    for lane in range(lanes):
        for c in range(32):
            column[c], importance[c] = block[c, lane], weights[c, lane]
        chosen[lane], _ = round_scale(column, importance, True, scale[lane], units[lane], 1, rounded)


@jit
def _round_step(
    rows: F32,
    corrections: F32,
    factors: F32,
    units: F32,
    feedback: F32,
    importance: F32,
    targets: F32,
    curve: F32,
    rounded: F32,
    nearest: U8,
    errors: F32,
    block_scales: I8,
    indices: U8,
) -> None:
    """Round some adjacent columns of some rows, with feedback between them.

    rows: the weights. corrections: subtracted from the weights for the errors of earlier columns, times the rows'
    factors. feedback, importance: of these columns. Outputs: errors (corrected minus rounded weights, times the rows'
    factors), block_scales and indices.
    """
    count, columns = rows.shape
    x = np.zeros((columns, LANES), np.float32)
    unit, chosen, size = np.zeros(LANES, np.float32), np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    inverse, error = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    weights = np.empty((32, LANES), np.float32)
    for first in range(0, count, LANES):
        lanes = min(LANES, count - first)
        for lane in range(lanes):
            unit[lane] = units[first + lane]
            for c in range(columns):
                x[c, lane] = rows[first + lane, c] * factors[first + lane] - corrections[first + lane, c]
        for start in range(0, columns, 32):
            for c in range(32):
                weights[c, :] = importance[start + c]
            _round_block(x, start, weights, unit, targets, curve, rounded, chosen)
            for lane in range(LANES):
                size[lane] = chosen[lane] * unit[lane]
                inverse[lane] = np.float32(1) / size[lane] if size[lane] != 0 else np.float32(0)
            for lane in range(lanes):
                block_scales[first + lane, start // 32] = np.int8(chosen[lane])
            for c in range(start, start + 32):
                for lane in range(LANES):
                    error[lane] = x[c, lane] - size[lane] * rounded[interval(x[c, lane] * inverse[lane])]
                for lane in range(lanes):
                    indices[first + lane, c] = nearest[interval(x[c, lane] * inverse[lane])]
                    errors[first + lane, c] = error[lane]
                for later in range(c + 1, columns):
                    f = feedback[c, later]
                    for lane in range(LANES):
                        x[later, lane] -= error[lane] * f


def fit_with_feedback(
    rows: F32, codebook: F32 | Codebook, factors: list[MomentFactor], executor: Executor | None = None, threads: int = 1
) -> tuple[U8, I8, F32]:
    """Like npqwen_quant.fit.fit, but minimize the squared error of the products with the calibration's inputs.

    That error is in no row larger than with the plain fit, which is kept where feedback does not help.

    rows: float32 (n, columns), finite. factors: of consecutive groups of columns that cover all columns, padded to
    whole blocks. executor: runs up to `threads` groups of rows at a time; None runs them one after the other.
    """
    book = codebook if isinstance(codebook, Codebook) else Codebook(np.asarray(codebook, np.float32))
    n, columns = rows.shape
    padded = pad_columns(rows)
    width = padded.shape[1]
    if sum(len(group.importance) for group in factors) != width:
        raise ValueError("the factors are not of these columns")
    plain = fit(padded, book)
    row_scales = plain[2] * _MARGIN
    powers = row_factors(padded)
    units = row_scales * powers
    losses = np.zeros(n)
    run = map if executor is None else executor.map
    indices, block_scales = np.zeros((n, width), np.uint8), np.zeros((n, width // BLOCK_COLUMNS), np.int8)
    step_rows = pad(-(-n // max(threads, 1)), LANES)
    start = 0
    for group in factors:
        stop = start + len(group.importance)
        errors = np.zeros((n, stop - start), np.float32)
        for first in range(0, stop - start, STEP):
            last = min(first + STEP, stop - start)
            corrections = errors[:, :first] @ group.feedback[:first, first:last]

            def round_rows(
                row: int,
                group: MomentFactor = group,
                corrections: F32 = corrections,
                errors: F32 = errors,
                start: int = start,
                first: int = first,
                last: int = last,
            ) -> None:
                r, c = slice(row, row + step_rows), slice(start + first, start + last)
                _round_step(
                    padded[r, c],
                    corrections[r],
                    powers[r],
                    units[r],
                    np.ascontiguousarray(group.feedback[first:last, first:last]),
                    group.importance[first:last],
                    book.targets,
                    book.curve,
                    book.rounded,
                    book.nearest,
                    errors[r, first:last],
                    block_scales[r, (start + first) // BLOCK_COLUMNS : (start + last) // BLOCK_COLUMNS],
                    indices[r, c],
                )

            list(run(round_rows, range(0, n, step_rows)))
        losses += _losses(errors, group)
        start = stop

    inverses = [_inverses_of_steps(group.feedback) for group in factors]

    def keep_plain(row: int) -> None:
        """Restore the plain fit of those among some rows that feedback has made worse."""
        r = slice(row, row + _COMPARED)
        fitted = plain[0][r], plain[1][r], plain[2][r]
        worse = ~(losses[r] <= _plain_losses(padded[r], fitted, book, powers[r], factors, inverses))
        indices[r][worse], block_scales[r][worse], row_scales[r][worse] = (part[worse] for part in fitted)

    list(run(keep_plain, range(0, n, _COMPARED)))
    return indices[:, :columns], block_scales, row_scales


def _losses(errors: F32, group: MomentFactor) -> npt.NDArray[np.float64]:
    """The squared output error that the errors of a group of columns cause in each row."""
    losses: npt.NDArray[np.float64] = np.einsum("rc,rc,c->r", errors, errors, group.importance, dtype=np.float64)
    return group.largest * losses


def _plain_losses(
    rows: F32,
    fitted: tuple[U8, I8, F32],
    book: Codebook,
    powers: F32,
    factors: list[MomentFactor],
    inverses: list[list[F32]],
) -> npt.NDArray[np.float64]:
    """The squared output error of a fit without feedback in each row, in the same unit as _losses."""
    indices, block_scales, row_scales = fitted
    sizes = block_scales * (row_scales * powers)[:, None]
    rounded = book.values[indices].reshape(*block_scales.shape, BLOCK_COLUMNS) * sizes[:, :, None]
    left = rows * powers[:, None] - rounded.reshape(rows.shape)
    losses, start = np.zeros(len(rows)), 0
    for group, of_group in zip(factors, inverses, strict=True):
        stop = start + len(group.importance)
        losses += _losses(_errors_of(left[:, start:stop], group.feedback, of_group), group)
        start = stop
    return losses


def _inverses_of_steps(feedback: F32) -> list[F32]:
    """The inverses of U's diagonal blocks of STEP columns."""
    return [
        _inverse_of_triangular(feedback[first : first + STEP, first : first + STEP])
        for first in range(0, len(feedback), STEP)
    ]


def _errors_of(left: F32, feedback: F32, inverses: list[F32]) -> F32:
    """The errors e of columns rounded one after the other, from the final differences, weights minus rounded ones.

    Corrections subtract e_k U_kj from each column j after k. So the differences are e U, which is solved for e starting
    at the first column.
    """
    errors = np.empty_like(left)
    for i, inverse in enumerate(inverses):
        first = i * STEP
        c = slice(first, first + STEP)
        errors[:, c] = (left[:, c] - errors[:, :first] @ feedback[:first, c]) @ inverse
    return errors
