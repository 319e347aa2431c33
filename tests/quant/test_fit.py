"""Scales and indices of codebook encodings, against exhaustive search and plain rounding."""

from __future__ import annotations

import numpy as np
import pytest
from checkpoints import TINY, decode, read_safetensors
from npqwen_quant.fit import fit
from npqwen_quant.search import Codebook

CODEBOOKS = {
    "3 bits": [-24, -15, -8, -2, 5, 12, 20, 31],
    "4 bits": [-27, -21, -16, -12, -9, -6, -3, -1, 2, 5, 8, 11, 14, 18, 22, 29],
    "4 bits linear": range(-8, 8),
    "5 bits linear": range(-16, 16),
    "6 bits linear": range(-32, 32),
    "8 bits linear": range(-127, 128),
    "uneven": [-100, -99, 0, 1, 2, 40, 90, 127],
    "2 bits": [-3, -1, 1, 4],
    "1 bit": [-1, 1],
}


def codebook(name: str) -> np.ndarray:
    return np.array(CODEBOOKS[name], np.float32)


def restored(rows: np.ndarray, values: np.ndarray, importance: np.ndarray | None = None) -> np.ndarray:
    """The weights that the fit stands for, in float64."""
    indices, block_scales, row_scales = fit(rows, values, importance)
    assert indices.dtype == np.uint8
    assert block_scales.dtype == np.int8
    assert row_scales.dtype == np.float32
    assert indices.shape == rows.shape
    assert block_scales.shape == (len(rows), -(-rows.shape[1] // 32))
    assert block_scales.min() >= -127
    assert (row_scales >= 0).all()
    assert np.isfinite(row_scales).all()
    assert ((row_scales == 0) | (row_scales >= np.finfo(np.float32).tiny)).all()
    scales = np.repeat(block_scales, 32, 1)[:, : rows.shape[1]] * row_scales[:, None].astype(np.float64)
    return np.asarray(scales * values[indices].astype(np.float64))


def nearest(x: np.ndarray, values: np.ndarray) -> np.ndarray:
    return np.asarray(np.abs(x[..., None] - values).argmin(-1))


def errors(rows: np.ndarray, other: np.ndarray) -> np.ndarray:
    return np.asarray(((rows.astype(np.float64) - other) ** 2).sum(1))


def plainly_rounded(rows: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Each block's largest weight becomes the codebook's largest magnitude, its scale an int8 times a row's float32."""
    blocks = rows.astype(np.float64).reshape(len(rows), -1, 32)
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(2)[..., None], 2)[..., 0]
    scales = largest / values[np.abs(values).argmax()]
    unit = (np.abs(scales).max(1, keepdims=True) / 127).astype(np.float32)
    unit[unit < np.finfo(np.float32).tiny] = 0
    steps = np.rint(np.divide(scales, unit, out=np.zeros_like(scales), where=unit > 0))
    size = (steps * unit)[..., None]
    q = nearest(np.divide(blocks, size, out=np.zeros_like(blocks), where=size != 0), values)
    return np.asarray((values[q] * size).reshape(rows.shape))


def least_errors(rows: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Each row's least squared error with scales of any precision, of 1200 tried for each block."""
    blocks = rows.astype(np.float64).reshape(-1, 32)
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(1)[:, None], 1)
    gain = np.zeros(len(blocks))
    for target in np.concatenate([end * np.linspace(0.5, 1.6, 600) for end in (values[0], values[-1])]):
        v = values[nearest(blocks * (target / largest), values)].astype(np.float64)
        gain = np.maximum(gain, (blocks * v).sum(1) ** 2 / np.maximum((v * v).sum(1), 1e-30))
    return np.asarray(((blocks**2).sum(1) - gain).reshape(len(rows), -1).sum(1))


def trained(count: int, columns: int) -> np.ndarray:
    tensors = read_safetensors(TINY / "model.safetensors")
    return np.concatenate(
        [decode(tensors[f"model.layers.{i}.mlp.up_proj.weight"])[: count // 4, :columns] for i in range(4)]
    )


def heavy_tailed(count: int, columns: int) -> np.ndarray:
    return (0.02 * np.random.default_rng(1).standard_t(3, (count, columns))).astype(np.float32)


def strange_rows() -> dict[str, np.ndarray]:
    """Rows of 128 weights."""
    rng = np.random.default_rng(2)
    noise = rng.standard_normal((16, 128))
    outlier = noise * 0.01
    outlier[np.arange(16), rng.integers(0, 128, 16)] = 30
    sparse = noise * (rng.random(noise.shape) < 0.03)
    uneven = noise * np.repeat(10.0 ** rng.uniform(-9, 0, (16, 4)), 32, 1)
    rows = {
        "zero": noise * 0,
        "constant": np.ones((16, 128)) * rng.standard_normal((16, 1)),
        "outlier": outlier,
        "sparse": sparse,
        "uneven": uneven,
        "one-sided": np.abs(noise),
        "huge": noise / np.abs(noise).max() * 3e38,
        "large": noise * 1e30,
        "small": noise * 1e-30,
        "near the normal numbers' end": noise * 1e-37,
        "subnormal": noise * 1e-42,
        "least": (noise > 0) * 1.4e-45,
        "mixed": noise * 10.0 ** rng.uniform(-38, 38, (16, 1)),
        "mixed in a row": noise * 10.0 ** rng.uniform(-38, 37, (16, 128)),
    }
    return {name: values.astype(np.float32) for name, values in rows.items()}


@pytest.mark.parametrize("name", ["3 bits", "4 bits", "4 bits linear", "5 bits linear"])
@pytest.mark.parametrize("weights", [trained, heavy_tailed])
def test_as_good_as_exhaustive_search_with_precise_scales(name: str, weights: object) -> None:
    assert callable(weights)
    rows = weights(32, 256)
    ours, least = errors(rows, restored(rows, codebook(name))), least_errors(rows, codebook(name))
    assert ours.sum() < 1.02 * least.sum()
    assert (ours < 1.12 * least).all()


@pytest.mark.parametrize("name", CODEBOOKS)
def test_better_than_plain_rounding(name: str) -> None:
    rows, values = heavy_tailed(64, 256), codebook(name)
    ours, plain = errors(rows, restored(rows, values)), errors(rows, plainly_rounded(rows, values))
    assert (ours <= 1.00001 * plain).all()
    assert ours.sum() < 0.95 * plain.sum()


@pytest.mark.parametrize("kind", strange_rows())
@pytest.mark.parametrize("name", CODEBOOKS)
def test_any_finite_weights(name: str, kind: str) -> None:
    rows, values = strange_rows()[kind], codebook(name)
    got = restored(rows, values)
    assert np.isfinite(got.astype(np.float32)).all()
    ours, plain = errors(rows, got), errors(rows, plainly_rounded(rows, values))
    # What rounds to zero because row scales are normal numbers is less than any of them times a codebook's value.
    floor = 128 * (2e4 * np.finfo(np.float32).tiny) ** 2
    energy = (rows.astype(np.float64) ** 2).sum(1)
    assert (ours <= 1.0001 * plain + 1e-10 * energy + floor).all()
    assert (ours <= 1.000001 * energy).all()


@pytest.mark.parametrize("name", ["3 bits", "4 bits", "5 bits linear", "6 bits linear", "8 bits linear"])
def test_weights_of_the_format_survive(name: str) -> None:
    rng, values = np.random.default_rng(3), codebook(name)
    steps = rng.integers(20, 128, (24, 4)) * rng.choice([-1, 1], (24, 4))
    steps[:, 1] = 127
    indices = rng.integers(0, len(values), (24, 128))
    indices[:, ::32] = np.abs(values).argmax()
    rows = np.repeat(steps, 32, 1) * values[indices] * np.float32(2.0**-12)
    np.testing.assert_allclose(restored(rows.astype(np.float32), values), rows, rtol=2e-2 if len(values) < 9 else 1e-6)


def test_indices_are_the_nearest() -> None:
    rows, values = heavy_tailed(32, 256), codebook("4 bits")
    indices, block_scales, row_scales = fit(rows, values)
    x = rows / (np.repeat(block_scales, 32, 1) * row_scales[:, None].astype(np.float64))
    assert (np.abs(x - values[indices]) < np.abs(x[..., None] - values).min(2) + 1e-4).all()


def test_rows_are_fitted_by_themselves_and_alike_each_time() -> None:
    rows, values = heavy_tailed(40, 160), codebook("4 bits")
    whole = fit(rows, values)
    for first, count in ((0, 40), (7, 1), (13, 20)):
        for i, part in enumerate(fit(rows[first : first + count], Codebook(values))):
            np.testing.assert_array_equal(part, whole[i][first : first + count])


@pytest.mark.parametrize("columns", [1, 31, 33, 100])
def test_columns_that_do_not_fill_blocks(columns: int) -> None:
    rows, values = heavy_tailed(5, columns), codebook("4 bits")
    padded = np.pad(rows, ((0, 0), (0, -columns % 32)))
    np.testing.assert_array_equal(restored(rows, values), restored(padded, values)[:, :columns])


def test_signs_and_powers_of_two_change_nothing_else() -> None:
    rows, values = heavy_tailed(16, 128), codebook("4 bits")
    got = restored(rows, values)
    for factor in (-1.0, 2.0**-60, -(2.0**90)):
        np.testing.assert_array_equal(restored(rows * np.float32(factor), values), got * factor)


def test_importance_moves_the_error() -> None:
    rows, values = heavy_tailed(64, 256), codebook("3 bits")
    importance = np.random.default_rng(4).lognormal(0, 2, 256).astype(np.float32)
    alike = ((rows - restored(rows, values)) ** 2 * importance).sum()
    weighted = ((rows - restored(rows, values, importance)) ** 2 * importance).sum()
    assert weighted < 0.8 * alike
    np.testing.assert_array_equal(
        restored(rows, values, importance), restored(rows, values, importance * np.float32(2.0**70))
    )
    np.testing.assert_array_equal(restored(rows, values, np.full(256, 3, np.float32)), restored(rows, values))
    for extreme in (np.zeros(256), np.where(np.arange(256) % 32, 0, 1e38)):
        got = restored(rows, values, extreme.astype(np.float32))
        assert errors(rows, got).sum() < (rows.astype(np.float64) ** 2).sum()


def test_no_rows() -> None:
    indices, block_scales, row_scales = fit(np.empty((0, 64), np.float32), codebook("4 bits"))
    assert (indices.shape, block_scales.shape, row_scales.shape) == ((0, 64), (0, 2), (0,))


@pytest.mark.parametrize("values", [[0], [1, 1], [3, 2], [-129, 0], [0, 128], [0, 0.5], [[0, 1]]])
def test_impossible_codebooks(values: list[float]) -> None:
    with pytest.raises(ValueError, match="codebook"):
        fit(np.zeros((1, 32), np.float32), np.array(values, np.float32))
