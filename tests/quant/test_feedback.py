"""Error feedback, against GPTQ as its paper has it, in plain NumPy."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from npqwen_quant.feedback import MomentFactor, factor, fit_with_feedback
from npqwen_quant.fit import fit

CODEBOOKS = {
    "3 bits": np.array([-24, -15, -8, -2, 5, 12, 20, 31], np.float32),
    "4 bits": np.array([-27, -21, -16, -12, -9, -6, -3, -1, 2, 5, 8, 11, 14, 18, 22, 29], np.float32),
    "6 bits": np.arange(-32, 32, dtype=np.float32),
}


def correlated(tokens: int, columns: int, seed: int = 0) -> np.ndarray:
    """Inputs whose columns depend on each other, of different sizes."""
    rng = np.random.default_rng(seed)
    hidden = rng.standard_normal((tokens, columns // 4)) @ rng.standard_normal((columns // 4, columns))
    x = hidden / columns**0.5 + 0.3 * rng.standard_normal((tokens, columns))
    return np.asarray(x * rng.lognormal(0, 1, columns), np.float32)


def weights(rows: int, columns: int) -> np.ndarray:
    return (0.02 * np.random.default_rng(1).standard_t(6, (rows, columns))).astype(np.float32)


def restored(fitted: tuple[np.ndarray, np.ndarray, np.ndarray], values: np.ndarray) -> np.ndarray:
    indices, block_scales, row_scales = fitted
    scales = np.repeat(block_scales, 32, 1)[:, : indices.shape[1]] * row_scales[:, None].astype(np.float64)
    return np.asarray(scales * values[indices])


def output_error(
    w: np.ndarray, fitted: tuple[np.ndarray, np.ndarray, np.ndarray], values: np.ndarray, x: np.ndarray
) -> float:
    return float((((w - restored(fitted, values)) @ x.T.astype(np.float64)) ** 2).sum())


def damped(moments: np.ndarray) -> np.ndarray:
    return np.asarray(moments + 0.01 * np.diag(np.diag(moments)), np.float64)


def gptq(w: np.ndarray, moments: np.ndarray, scales: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The indices that GPTQ chooses for given scales (rows, columns), by eliminating columns from the inverse."""
    w, inverse = w.astype(np.float64), np.linalg.inv(damped(moments))
    indices = np.zeros(w.shape, np.int64)
    for c in range(w.shape[1]):
        divisor = np.where(scales[:, c] == 0, 1, scales[:, c])
        scaled = np.where(scales[:, c] == 0, 0, w[:, c] / divisor)
        indices[:, c] = np.abs(scaled[:, None] - values).argmin(1)
        error = w[:, c] - values[indices[:, c]] * scales[:, c]
        w -= np.outer(error / inverse[c, c], inverse[c])
        inverse -= np.outer(inverse[:, c], inverse[c]) / inverse[c, c]
        inverse[c, :] = inverse[:, c] = 0
        inverse[c, c] = 1
    return indices


@pytest.mark.parametrize("name", CODEBOOKS)
@pytest.mark.parametrize("columns", [96, 320])
def test_indices_are_those_of_gptq(name: str, columns: int) -> None:
    x, w, values = correlated(600, columns), weights(40, columns), CODEBOOKS[name]
    moments = x.T @ x
    indices, block_scales, row_scales = fit_with_feedback(w, values, [factor(moments)])
    scales = np.repeat(block_scales, 32, 1) * row_scales[:, None].astype(np.float64)
    same = (indices == gptq(w, moments, scales, values)).all(1)
    assert same.mean() > 0.8  # a weight between two values changes all the columns after it


@pytest.mark.parametrize("name", CODEBOOKS)
def test_outputs_change_less(name: str) -> None:
    x, w, values = correlated(800, 256), weights(64, 256), CODEBOOKS[name]
    ours = output_error(w, fit_with_feedback(w, values, [factor(x.T @ x)]), values, x)
    assert ours < 0.5 * output_error(w, fit(w, values), values, x)
    fresh = np.concatenate([correlated(800, 256)[::-1] * -1, x])
    assert output_error(w, fit_with_feedback(w, values, [factor(x.T @ x)]), values, fresh) < 0.6 * output_error(
        w, fit(w, values), values, fresh
    )


def test_the_factor_is_that_of_the_inverse() -> None:
    x = correlated(500, 160)
    found = factor(x.T @ x)
    inverse = np.linalg.inv(damped(x.T @ x))
    product = found.feedback.T / found.importance.astype(np.float64) @ found.feedback
    np.testing.assert_allclose(product / product[0, 0], inverse / inverse[0, 0], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(np.diag(found.feedback), 1, rtol=1e-6)
    assert not np.tril(found.feedback, -1).any()


def test_uncorrelated_inputs_give_the_plain_fit_of_their_importance() -> None:
    w, values = weights(32, 128), CODEBOOKS["4 bits"]
    importance = np.random.default_rng(2).lognormal(0, 1, 128).astype(np.float32)
    ours = restored(fit_with_feedback(w, values, [factor(np.diag(importance))]), values)
    plain = restored(fit(w, values, importance), values)
    error, least = (((w - other) ** 2 * importance).sum() for other in (ours, plain))
    assert error < 1.01 * least


def strange_moments(columns: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    few = rng.standard_normal((3, columns)).astype(np.float32)
    sparse = few * (np.arange(columns) % 7 == 0)
    sizes = correlated(100, columns) * 10.0 ** rng.uniform(-15, 15, columns)
    return {
        "none": np.zeros((columns, columns), np.float32),
        "one token": np.outer(few[0], few[0]),
        "few tokens": few.T @ few,
        "all columns alike": np.ones((columns, columns), np.float32),
        "mostly unused": sparse.T @ sparse,
        "all sizes": (sizes.T @ sizes).astype(np.float32),
        "tiny": (few.T @ few) * np.float32(1e-38),
        "huge": (few.T @ few) * np.float32(1e37),
        "not positive": -few.T @ few,
        "inconsistent": rng.standard_normal((columns, columns)).astype(np.float32),
        "infinite": np.full((columns, columns), np.inf, np.float32),
        "not a number": np.full((columns, columns), np.nan, np.float32),
    }


@pytest.mark.parametrize("kind", strange_moments(64))
def test_any_moments(kind: str) -> None:
    w, values, moments = weights(20, 64), CODEBOOKS["4 bits"], strange_moments(64)[kind]
    found = factor(moments)
    assert np.isfinite(found.feedback).all()
    assert (found.importance >= 0).all()
    got = restored(fit_with_feedback(w, values, [found]), values)
    assert np.isfinite(got).all()
    if kind in ("none", "infinite", "not a number", "not positive"):
        assert ((w - got) ** 2).sum() < 1.05 * ((w - restored(fit(w, values), values)) ** 2).sum()


@pytest.mark.parametrize("size", [0, 1e-44, 1e-38, 1e-20, 1e20, 1e37])
def test_any_weights(size: float) -> None:
    x, values = correlated(200, 96), CODEBOOKS["3 bits"]
    w = (weights(20, 96).astype(np.float64) / 0.2 * size).astype(np.float32)
    w[3] = 0
    w[4, :-1] = 0
    w[5] = np.where(np.arange(96) == 40, size, w[5] * np.float32(1e-3))
    fitted = fit_with_feedback(w, values, [factor(x.T @ x)])
    got = restored(fitted, values)
    assert np.isfinite(got.astype(np.float32)).all()
    assert not got[3].any()
    assert (np.abs(got).max(1) <= 4 * np.abs(w).max(1) + 1e-33).all()


def strange_rows() -> dict[str, np.ndarray]:
    """Rows of 128 weights."""
    rng = np.random.default_rng(4)
    noise = rng.standard_normal((24, 128))
    outlier = noise * 0.01
    outlier[np.arange(24), rng.integers(0, 128, 24)] = 30
    rows = {
        "zero": noise * 0,
        "constant": np.ones((24, 128)) * rng.standard_normal((24, 1)),
        "on the grid": np.repeat(rng.integers(1, 128, (24, 4)), 32, 1) * rng.integers(-8, 8, (24, 128)) / 64,
        "one outlier": outlier,
        "one weight": noise * (rng.random(noise.shape) < 0.01),
        "blocks of all sizes": noise * np.repeat(10.0 ** rng.uniform(-9, 0, (24, 4)), 32, 1),
        "one sign": np.abs(noise),
        "huge": noise / np.abs(noise).max() * 3e38,
        "small": noise * 1e-30,
        "near the normal numbers' end": noise * 1e-37,
        "subnormal": noise * 1e-42,
        "mixed": noise * 10.0 ** rng.uniform(-38, 38, (24, 1)),
        "mixed in a row": noise * 10.0 ** rng.uniform(-38, 37, (24, 128)),
    }
    return {name: values.astype(np.float32) for name, values in rows.items()}


@pytest.mark.parametrize("kind", strange_rows())
@pytest.mark.parametrize("name", CODEBOOKS)
def test_no_row_is_worse_than_without_feedback(name: str, kind: str) -> None:
    """Of any finite weights, for inputs with few and many directions, in one group of columns and in two."""
    w, values = strange_rows()[kind], CODEBOOKS[name]
    plain = restored(fit(w, values), values)
    size = np.maximum(np.abs(w).max(1, keepdims=True), 1e-30).astype(np.float64)
    for tokens in (5, 400):
        x = correlated(tokens, 128)
        for groups in ([slice(0, 128)], [slice(0, 64), slice(64, 128)]):
            fitted = fit_with_feedback(w, values, [factor(x[:, group].T @ x[:, group]) for group in groups])
            got = restored(fitted, values)
            assert np.isfinite(got.astype(np.float32)).all()
            ours, plainly = np.zeros(len(w)), np.zeros(len(w))
            for group in groups:
                moments = damped(x[:, group].T @ x[:, group])
                for total, other in ((ours, got), (plainly, plain)):
                    error = ((w - other) / size)[:, group]
                    total += ((error @ moments) * error).sum(1)
            # Sums are in float32; and scales are no subnormal numbers.
            assert (ours <= plainly * (1 + 1e-3) + 1e-10 * np.trace(x.T @ x)).all()


def test_weights_that_plain_rounding_meets_are_met() -> None:
    x, values = correlated(300, 128), CODEBOOKS["4 bits"]
    rng = np.random.default_rng(5)
    scales = rng.integers(-127, 128, (16, 4))
    scales[:, 0] = 127
    w = (np.repeat(scales, 32, 1) * values[rng.integers(0, 16, (16, 128))] * 2.0**-14).astype(np.float32)
    np.testing.assert_array_equal(restored(fit(w, values), values), w)
    np.testing.assert_array_equal(restored(fit_with_feedback(w, values, [factor(x.T @ x)]), values), w)


def test_threads_and_the_number_of_rows_change_nothing() -> None:
    x, w, values = correlated(300, 160), weights(200, 160), CODEBOOKS["4 bits"]
    factors = [factor(x.T @ x)]
    alone = fit_with_feedback(w, values, factors)
    with ThreadPoolExecutor(3) as pool:
        together = fit_with_feedback(w, values, factors, pool, 3)
    for i in range(3):
        np.testing.assert_array_equal(together[i], alone[i])


def test_columns_in_groups() -> None:
    x, w, values = correlated(600, 320), weights(48, 320), CODEBOOKS["4 bits"]
    groups = [factor(x[:, part].T @ x[:, part]) for part in (slice(0, 160), slice(160, 320))]
    fitted = fit_with_feedback(w, values, groups)
    for part in (slice(0, 160), slice(160, 320)):
        plain = restored(fit(w[:, part], values), values)
        ours = ((w - restored(fitted, values))[:, part] @ x[:, part].T) ** 2
        assert ours.sum() < 0.5 * (((w[:, part] - plain) @ x[:, part].T) ** 2).sum()


def test_columns_that_do_not_fill_blocks() -> None:
    x, w, values = correlated(300, 100), weights(20, 100), CODEBOOKS["4 bits"]
    moments = np.zeros((128, 128), np.float32)
    moments[:100, :100] = x.T @ x
    fitted = fit_with_feedback(w, values, [factor(moments)])
    assert fitted[0].shape == (20, 100)
    assert output_error(w, fitted, values, x) < 0.5 * output_error(w, fit(w, values), values, x)


def test_factors_of_other_columns_are_refused() -> None:
    with pytest.raises(ValueError, match="columns"):
        fit_with_feedback(
            weights(4, 64), CODEBOOKS["4 bits"], [MomentFactor(np.eye(32, dtype=np.float32), np.ones(32, np.float32))]
        )
