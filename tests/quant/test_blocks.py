"""The choice of scales and integers, against exhaustive search and against the usual formats."""

from __future__ import annotations

import numba
import numpy as np
import pytest
from checkpoints import TINY, decode, read_safetensors
from converted import pack
from npqwen_quant import blocks, search
from numba.core import caching
from units import Units, row_bytes

from npqwen.format.encodings import BY_NAME, ENCODINGS

QUANTIZE = [encoding.name for encoding in ENCODINGS if encoding.is_integer]
TYPICAL = {"int3": 0.028, "int4": 0.0072, "int5": 0.0022, "int6": 6e-4, "int8": 4e-5}
"""Relative squared errors of trained weights: an upper limit for each encoding."""


def quantize(rows: np.ndarray, encoding: str) -> Units:
    """A matrix as it is stored."""
    kind = BY_NAME[encoding]
    shape = -(-rows.shape[0] // 16), row_bytes(encoding, -(-rows.shape[1] // 128))
    out = np.full(shape, 0xAB, np.uint8)
    assert blocks.quantize(rows, out, 0, 1, kind) == np.abs(rows).max()
    return Units(encoding, out, blocks.codebook(kind) if kind.codebook else None)


def restored(rows: np.ndarray, encoding: str) -> np.ndarray:
    return quantize(rows, encoding).weights[: rows.shape[0], : rows.shape[1]]


def errors(rows: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The squared error of each block."""
    return np.asarray(((rows.astype(np.float64) - other) ** 2).reshape(-1, 32).sum(1))


def nearest(x: np.ndarray, values: np.ndarray) -> np.ndarray:
    return np.asarray(values[np.searchsorted((values[1:] + values[:-1]) / 2, x)])


def least_errors(rows: np.ndarray, encoding: str) -> np.ndarray:
    """Each block's least squared error over a thousand scales that are no int8."""
    values = np.array(BY_NAME[encoding].values, np.float64)
    out = []
    for w in rows.astype(np.float64).reshape(-1, 32):
        reach = np.abs(w).max() / np.linspace(0.6, 1.5, 500)[:, None]
        d = np.concatenate([reach / values[0], reach / values[-1]])
        v = nearest(w / np.where(d == 0, 1, d), values)
        out.append(((w - d * v) ** 2).sum(1).min())
    return np.array(out)


def rounded(rows: np.ndarray, encoding: str) -> np.ndarray:
    """Plain rounding: a block's largest weight is the largest value, and scales are rounded to int8 times the row's."""
    values = np.array(BY_NAME[encoding].values, np.float64)
    w = rows.astype(np.float64).reshape(len(rows), -1, 32)
    largest = np.take_along_axis(w, np.abs(w).argmax(2)[..., None], 2)[..., 0]
    scales = largest / values[np.abs(values).argmax()]
    unit = np.abs(scales).max(1, keepdims=True) / 127
    scales = np.rint(scales / np.where(unit == 0, 1, unit)) * unit
    v = nearest(w / np.where(scales == 0, np.inf, scales)[:, :, None], values)
    return np.asarray((v * scales[:, :, None]).reshape(rows.shape))


def q4_0(rows: np.ndarray) -> np.ndarray:
    """GGML's Q4_0: the weight of largest magnitude becomes -8."""
    w = rows.reshape(-1, 32)
    d = w[np.arange(len(w)), np.abs(w).argmax(1)][:, None] / -8
    q = np.minimum(np.floor(w / d + 8.5), 15) - 8
    return np.reshape(q * d.astype(np.float16).astype(np.float32), rows.shape)


def q8_0(rows: np.ndarray) -> np.ndarray:
    """GGML's Q8_0: the largest magnitude becomes 127."""
    w = rows.reshape(-1, 32)
    d = np.abs(w).max(1)[:, None] / 127
    return np.reshape(np.rint(w / d) * d.astype(np.float16).astype(np.float32), rows.shape)


def trained(count: int) -> np.ndarray:
    """Rows of 128 trained weights: the first of some matrices of the example model."""
    tensors = read_safetensors(TINY / "model.safetensors")
    names = [
        f"model.layers.{i}.{part}.weight" for i in range(4) for part in ("mlp.up_proj", "self_attn.q_proj")
    ]
    return np.concatenate([decode(tensors[name])[: count // 8, :128] for name in names])


def heavy_tailed(count: int) -> np.ndarray:
    return (0.02 * np.random.default_rng(1).standard_t(3, (count, 128))).astype(np.float32)


@pytest.mark.parametrize("encoding", QUANTIZE)
def test_nearly_optimal(encoding: str) -> None:
    rows = trained(64)
    ours = errors(rows, restored(rows, encoding))
    # What int8 scales cost, and having tried few of all scales: little, but much of the little that int8 leaves.
    assert ours.sum() < (1.2 if encoding == "int8" else 1.02) * least_errors(rows, encoding).sum()
    assert ours.sum() < TYPICAL[encoding] * np.square(rows).sum()


def test_int4_beats_q4_0() -> None:
    rows = trained(512)
    assert errors(rows, restored(rows, "int4")).sum() < 0.75 * errors(rows, q4_0(rows)).sum()


def test_int8_beats_q8_0() -> None:
    rows = trained(512)
    assert errors(rows, restored(rows, "int8")).sum() < 0.97 * errors(rows, q8_0(rows)).sum()


@pytest.mark.parametrize("encoding", QUANTIZE)
def test_values_are_the_nearest(encoding: str) -> None:
    rows = heavy_tailed(48)
    units = quantize(rows, encoding)
    scales = np.repeat(units.block_scales.astype(np.float64), 32, axis=1) * units.row_scales[:, None]
    values = np.array(BY_NAME[encoding].values)
    exact = rows / np.where(scales == 0, np.inf, scales)
    distance = np.abs(exact[..., None] - values).min(2)
    assert (np.abs(units.values - exact) <= distance + 1e-3).all()
    assert set(units.values.ravel()) <= set(values)


@pytest.mark.parametrize("encoding", QUANTIZE)
def test_weights_of_the_format_survive(encoding: str) -> None:
    """Weights that the encoding can hold come out as they were, but for what rounding the row's scale costs."""
    rng = np.random.default_rng(2)
    values = np.array(BY_NAME[encoding].values)
    q = rng.integers(0, len(values), (32, 4, 32))
    q[:, :, 5], q[:, :, 6] = 0, len(values) - 1
    scales = rng.integers(64, 128, (32, 4, 1)) * rng.choice([-1, 1], (32, 4, 1))
    scales[:, 1] = 127
    rows = (values[q] * scales * 2.0 ** rng.integers(-90, 90, (32, 1, 1))).astype(np.float32).reshape(32, 128)
    assert (np.abs(restored(rows, encoding) - rows) <= 1e-6 * np.abs(rows)).mean() > 0.99


@pytest.mark.parametrize("encoding", QUANTIZE)
@pytest.mark.parametrize("shape", [(1, 1), (16, 128), (17, 129), (15, 33), (40, 300), (33, 32)])
def test_odd_shapes_are_padded_with_zero(encoding: str, shape: tuple[int, int]) -> None:
    rows = np.random.default_rng(3).standard_normal(shape).astype(np.float32)
    units = quantize(rows, encoding)
    assert not units.row_scales[shape[0] :].any()
    assert not units.block_scales[shape[0] :].any()
    assert not units.block_scales[:, -(-shape[1] // 32) :].any()
    assert not units.weights[shape[0] :].any()
    step = np.abs(rows).max() / {"int3": 3, "int8": 127}.get(encoding, 7)
    assert np.abs(units.weights[: shape[0], : shape[1]] - rows).max() < step


def strange(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Rows of all kinds of finite weights."""
    noise = rng.standard_normal((16, 128)).astype(np.float32)
    sizes = 10.0 ** np.linspace(-44, 38, 16)
    outlier = noise.copy()
    outlier[np.arange(16), rng.integers(0, 128, 16)] = 10.0 ** rng.integers(2, 7, 16)
    one = np.zeros((16, 128), np.float32)
    one[np.arange(16), rng.integers(0, 128, 16)] = -0.7
    with np.errstate(over="ignore"):
        sized = (noise.astype(np.float64) / np.abs(noise).max() * sizes[:, None]).astype(np.float32)
    return {
        "any size": sized,
        "largest": np.where(noise > 0, 1, -1) * np.finfo(np.float32).max,
        "subnormal": (noise * 2.0**-120).astype(np.float32) * np.float32(2.0**-20),
        "constant": np.repeat(np.linspace(-1, 1, 16, dtype=np.float32)[:, None], 128, 1),
        "zeros": np.zeros((16, 128), np.float32),
        "negative zeros": np.full((16, 128), -0.0, np.float32),
        "one outlier": outlier,
        "one weight": one,
        "some rows of zeros": noise * (np.arange(16) % 3 > 0)[:, None].astype(np.float32),
        "blocks of all sizes": (noise * np.repeat(10.0 ** rng.integers(-9, 9, (16, 4)), 32, 1)).astype(np.float32),
        "one sign": np.abs(noise),
    }


@pytest.mark.parametrize("encoding", QUANTIZE)
@pytest.mark.parametrize("kind", strange(np.random.default_rng(0)))
def test_any_finite_weights(encoding: str, kind: str) -> None:
    """No NaN, and never worse than plain rounding."""
    for seed in range(8):
        rows = strange(np.random.default_rng(seed))[kind].astype(np.float32)
        units = quantize(rows, encoding)
        got = units.weights
        assert np.isfinite(got).all()
        assert units.block_scales.min() >= -127
        # Per row, in units of its largest weight: squares of the largest floats are finite then.
        size = np.maximum(np.abs(rows).max(1, keepdims=True), 2.0**-100).astype(np.float64)
        ours, plain = (np.square((rows - other) / size).sum(1) for other in (got, rounded(rows, encoding)))
        worse = ours > plain * (1 + 1e-5) + 1e-9
        # Near float32's ends, scales are limited.
        assert not worse[(size[:, 0] > 2.0**-100) & (size[:, 0] < 2.0**126)].any()


@pytest.mark.parametrize("encoding", QUANTIZE)
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_reported(encoding: str, bad: float) -> None:
    rows = np.ones((20, 100), np.float32)
    out = np.empty((2, row_bytes(encoding, 1)), np.uint8)
    assert blocks.quantize(rows, out, 0, 1, BY_NAME[encoding]) == 1
    rows[18, 97] = bad
    assert not np.isfinite(blocks.quantize(rows, out, 0, 1, BY_NAME[encoding]))


def test_compiles_without_a_writable_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caching.CacheImpl, "_locator_classes", [])
    with pytest.raises(RuntimeError, match="cannot cache"):
        numba.njit(cache=True)(lambda x: x + x)
    assert search.jit(lambda x: x + x)(21) == 42


@pytest.mark.parametrize("encoding", QUANTIZE)
def test_unit_rows_with_start_and_stride(encoding: str) -> None:
    rows = np.random.default_rng(5).standard_normal((48, 140)).astype(np.float32)
    out = np.zeros((6, row_bytes(encoding, 2)), np.uint8)
    blocks.quantize(rows, out, 1, 2, BY_NAME[encoding])
    np.testing.assert_array_equal(out[1::2], quantize(rows, encoding).rows)
    assert not out[::2].any()


@pytest.mark.parametrize("encoding", QUANTIZE)
def test_stored_where_the_format_says(encoding: str) -> None:
    """`store` against the tests' own writer."""
    rng = np.random.default_rng(6)
    kind = BY_NAME[encoding]
    q = rng.integers(0, len(kind.values), (32, 256)).astype(np.uint8)
    scales, row_scales = rng.integers(-127, 128, (32, 8)).astype(np.int8), rng.random(32).astype(np.float32)
    out = np.empty((2, row_bytes(encoding, 2)), np.uint8)
    blocks.store((q, scales, row_scales), kind, out, 0, 1)
    stored = q.astype(np.int32) - 127 if encoding == "int8" else q
    np.testing.assert_array_equal(out, pack(encoding, stored, scales, row_scales).rows)
