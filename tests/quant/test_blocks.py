"""The choice of scales, against exhaustive search and against the usual formats."""

from __future__ import annotations

from collections.abc import Callable

import numba
import numpy as np
import pytest
from checkpoints import TINY, decode, read_safetensors
from npqwen_quant import blocks
from numba.core import caching
from units import UNIT_BYTES, integers, scales, unpack

from npqwen.format.encodings import BY_NAME

QUANTIZE = {"int4": (-8, 7), "int8": (-127, 127)}
F16 = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float64)  # every finite one from 0 on


def quantize(rows: np.ndarray, encoding: str) -> np.ndarray:
    """The units (unit rows, units, bytes) of a matrix."""
    out = np.full((-(-rows.shape[0] // 16), -(-rows.shape[1] // 64), UNIT_BYTES[encoding]), 0xAB, np.uint8)
    assert blocks.quantize(rows, out, 0, 1, BY_NAME[encoding]) == np.abs(rows).max()
    return out


def restored(rows: np.ndarray, encoding: str) -> np.ndarray:
    return unpack(quantize(rows, encoding))[: rows.shape[0], : rows.shape[1]]


def errors(rows: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The squared error of each block."""
    return np.asarray(((rows.astype(np.float64) - other) ** 2).reshape(-1, 32).sum(1))


def least_errors(rows: np.ndarray, encoding: str) -> np.ndarray:
    """Each block's least squared error over all f16 scales that could be optimal."""
    low, high = QUANTIZE[encoding]
    out = []
    for w in rows.astype(np.float64).reshape(-1, 32):
        largest = np.abs(w).max()
        start, stop = np.searchsorted(F16, [largest / (1.6 * high), 1.4 * largest / high + 2.0**-24])
        d = F16[max(start, 1) : stop + 1]
        d = np.concatenate([d, -d])[:, None]
        q = np.clip(np.rint(w / d), low, high)
        out.append(min(((w - d * q) ** 2).sum(1).min(), (w * w).sum()))
    return np.array(out)


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


@pytest.mark.parametrize("weights", [trained, heavy_tailed])
def test_int4_is_nearly_optimal(weights: Callable[[int], np.ndarray]) -> None:
    rows = weights(64)
    ours, least = errors(rows, restored(rows, "int4")), least_errors(rows, "int4")
    assert (ours >= least * (1 - 1e-5)).all()
    assert ours.sum() < 1.0005 * least.sum()
    assert (ours < 1.05 * least).all()


def test_int4_beats_q4_0() -> None:
    rows = trained(512)
    assert errors(rows, restored(rows, "int4")).sum() < 0.91 * errors(rows, q4_0(rows)).sum()


def test_int8_beats_q8_0() -> None:
    rows = trained(512)
    ours, theirs = errors(rows, restored(rows, "int8")), errors(rows, q8_0(rows))
    assert ours.sum() < 0.9 * theirs.sum()
    assert ours[::8].sum() < 1.05 * least_errors(rows[:, :32][::2], "int8").sum()


@pytest.mark.parametrize("encoding", QUANTIZE)
def test_integers_are_the_nearest(encoding: str) -> None:
    rows = heavy_tailed(48)
    units = quantize(rows, encoding)
    low, high = QUANTIZE[encoding]
    scale = np.repeat(scales(units).transpose(0, 3, 1, 2).reshape(48, -1), 32, axis=1).astype(np.float64)
    exact = np.clip(rows / scale, low, high)
    q = integers(units) - (8 if encoding == "int4" else 0)
    assert np.abs(q - exact).max() < 0.5 + 1e-4
    assert q.min() == low or encoding == "int8"
    assert q.min() > -128


@pytest.mark.parametrize("encoding", QUANTIZE)
def test_weights_of_the_format_survive_exactly(encoding: str) -> None:
    rng = np.random.default_rng(2)
    low, high = QUANTIZE[encoding]
    q = rng.integers(low, high + 1, (32, 4, 32))
    q[:, :, 5] = low
    scale = (2.0 ** rng.uniform(-20, 10, (32, 4, 1)) * rng.choice([-1, 1], (32, 4, 1))).astype(np.float16)
    rows = (q * scale.astype(np.float32)).astype(np.float32).reshape(32, 128)
    np.testing.assert_array_equal(restored(rows, encoding), rows)


@pytest.mark.parametrize("encoding", QUANTIZE)
@pytest.mark.parametrize("shape", [(1, 1), (16, 64), (17, 65), (15, 33), (40, 300), (33, 32)])
def test_odd_shapes_are_padded_with_zero(encoding: str, shape: tuple[int, int]) -> None:
    rows = np.random.default_rng(3).standard_normal(shape).astype(np.float32)
    units = quantize(rows, encoding)
    got = unpack(units)
    assert not got[shape[0] :].any()
    assert not got[:, shape[1] :].any()
    step = np.abs(rows).max() / (7 if encoding == "int4" else 127)
    assert np.abs(got[: shape[0], : shape[1]] - rows).max() < step
    q, zero = integers(units), 8 if encoding == "int4" else 0
    assert (q[shape[0] :] == zero).all()
    assert (q[:, shape[1] :] == zero).all()
    all_scales = scales(units).transpose(0, 3, 1, 2).reshape(got.shape[0], -1)
    assert not all_scales[shape[0] :].any()
    assert not all_scales[:, -(-shape[1] // 32) :].any()


@pytest.mark.parametrize("encoding", QUANTIZE)
def test_extreme_blocks(encoding: str) -> None:
    """Blocks at the ends of f16's range are as good as the best finite scale makes them."""
    rng = np.random.default_rng(4)
    noise = rng.standard_normal((32, 32)).astype(np.float32)
    noise /= np.abs(noise).max(1, keepdims=True)
    largest = blocks.largest_weight(BY_NAME[encoding])
    sizes = [0, 1e-45, 1e-38, 1e-12, 2e-8, 3e-8, 5e-8, 1e-7, 3e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e3, 1e5, largest]
    rows = (noise[: len(sizes)].astype(np.float64) * np.array(sizes)[:, None]).astype(np.float32)
    units = quantize(rows, encoding)
    assert np.isfinite(scales(units)).all()
    ours, least = errors(rows, unpack(units)[: len(rows), :32]), least_errors(rows, encoding)
    assert (ours <= (1.1 if encoding == "int4" else 1.4) * least + 1e-30).all()
    assert not unpack(units)[0].any()
    assert scales(units)[0, 0, 0, 0] == 0
    single = np.zeros((16, 64), np.float32)
    single[3, 40] = -0.7
    assert np.abs(restored(single, encoding) - single).max() < 0.7 * 2**-11


@pytest.mark.parametrize("encoding", QUANTIZE)
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_reported(encoding: str, bad: float) -> None:
    rows = np.ones((20, 100), np.float32)
    out = np.empty((2, 2, UNIT_BYTES[encoding]), np.uint8)
    assert blocks.quantize(rows, out, 0, 1, BY_NAME[encoding]) == 1
    rows[18, 97] = bad
    assert not np.isfinite(blocks.quantize(rows, out, 0, 1, BY_NAME[encoding]))


def test_compiles_without_a_writable_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caching.CacheImpl, "_locator_classes", [])
    with pytest.raises(RuntimeError, match="cannot cache"):
        numba.njit(cache=True)(lambda x: x + x)
    assert blocks._jit(lambda x: x + x)(21) == 42


@pytest.mark.parametrize("encoding", QUANTIZE)
def test_unit_rows_with_start_and_stride(encoding: str) -> None:
    rows = np.random.default_rng(5).standard_normal((48, 70)).astype(np.float32)
    out = np.zeros((6, 2, UNIT_BYTES[encoding]), np.uint8)
    blocks.quantize(rows, out, 1, 2, BY_NAME[encoding])
    np.testing.assert_array_equal(out[1::2], quantize(rows, encoding))
    assert not out[::2].any()
