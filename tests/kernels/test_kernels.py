"""Matrix and vector kernels of this process's instruction set against NumPy references of a few lines."""

from __future__ import annotations

import ctypes
import itertools
import mmap
import sys
from typing import Any

import numpy as np
import pytest
from converted import pack as pack_units
from converted import pack_bf16, random_units
from kernel_calls import run, together
from numba import njit
from quantized import int8_blocks
from units import CODEBOOKS, Units

from npqwen.format.encodings import BY_NAME, ENCODINGS, Encoding
from npqwen.kernels.matmul import local_chunk, local_floats, matmul, matmul_kernels, scratch_floats
from npqwen.kernels.matrix import MATRIX, read_row
from npqwen.kernels.norm import rms_norm, rotate, swiglu
from npqwen.kernels.packing import PANELS_WIDTH, WIDEST, WIDTHS, ZERO_POINT, pack, pack_part, packed_bytes, tile_width
from npqwen.kernels.pieces import new_state
from npqwen.kernels.unpacked_matmul import PANEL_TILES
from npqwen.simd import scalar
from npqwen.simd.arm import Neon
from npqwen.simd.isa import ISA

ALL = pytest.mark.parametrize("encoding", ENCODINGS, ids=lambda encoding: encoding.name)
INTEGERS = pytest.mark.parametrize(
    "encoding", [encoding for encoding in ENCODINGS if encoding.is_integer], ids=lambda encoding: encoding.name
)
UNPACKED = WIDEST * ISA.unpack_from
"""Tokens from which weights are unpacked once for all."""
PIECED = PANELS_WIDTH * PANEL_TILES
"""Tokens that pieces of weights are unpacked for at most."""
TOKENS = sorted({1, 2, 3, 4, 5, 7, 13, 16, 17, 33, UNPACKED + 1, PIECED + 1})


def readonly(data: np.ndarray) -> np.ndarray:
    """A read-only copy, followed by a guard page where the system allows one."""
    copy = np.array(data)
    copy.flags.writeable = False
    if sys.platform == "win32":
        return copy
    size = -(-data.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = np.frombuffer(mmap.mmap(-1, size + mmap.PAGESIZE), np.uint8)
    memory[size - data.nbytes : size] = data.reshape(-1).view(np.uint8)
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    protect.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    assert protect(memory.ctypes.data, size, mmap.PROT_READ) == 0
    assert protect(memory.ctypes.data + size, mmap.PAGESIZE, 0) == 0
    return memory[size - data.nbytes : size].view(data.dtype).reshape(data.shape)


def matrix(units: Units) -> Any:
    """The MATRIX record of units that the caller keeps alive."""
    record = np.zeros(1, MATRIX)[0]
    record["address"] = units.rows.ctypes.data
    record["codebook"] = 0 if units.codebook is None else units.codebook.ctypes.data
    record["encoding"] = BY_NAME[units.encoding].code
    record["rows"], record["cols"] = units.shape
    return record


def guarded(units: Units) -> Units:
    """A copy of a matrix that cannot be written, and behind whose tensors nothing can be read."""
    return Units(units.encoding, readonly(units.rows), None if units.codebook is None else readonly(units.codebook))


def packed(x: np.ndarray, encoding: Encoding, width: int) -> np.ndarray:
    """Activations x (tokens, cols) as simd/packed.py describes them, uint8."""
    real = np.arange(-(-len(x) // width) * width).reshape(-1, 1, width) < len(x)
    x = np.pad(x, ((0, -len(x) % width), (0, 0)))
    tiles, cols = len(x) // width, x.shape[1]
    if not encoding.is_integer:
        return np.ascontiguousarray(x.reshape(tiles, width, cols).transpose(0, 2, 1)).reshape(-1).view(np.uint8)
    q, scales = (part.reshape(tiles, width, cols // 32, -1).swapaxes(1, 2) for part in int8_blocks(x))
    starts = (-ZERO_POINT[encoding.code] * q.sum(3, dtype=np.int32)).astype(np.int32)
    if isinstance(ISA, Neon):  # bits of floats around 1.5 * 2**23, repeated
        starts = np.repeat((starts + real * np.float32(3 << 22).view(np.int32))[..., None], ISA.start_bytes // 4, 3)
    elif ISA.start_bytes == 8:  # of columns 0, 1 and of columns 2, 3 of quads 0, 1, 4, 5, and of 2, 3, 6, 7
        pairs = q.reshape(*q.shape[:3], 2, 2, 2, 2, 2).sum((3, 5, 7), dtype=np.int32)
        starts = (-ZERO_POINT[encoding.code] * pairs).astype(np.int16)
    if ISA.pairs and width > 1:
        q = q.reshape(tiles, cols // 32, width // 2, 2, 4, 8).swapaxes(3, 4)
    parts = (np.ascontiguousarray(part) for part in (q, scales, starts))
    return np.concatenate([part.view(np.uint8).reshape(tiles, cols // 32, -1) for part in parts], 2).reshape(-1)


def product(units: Units, x: np.ndarray) -> np.ndarray:
    """weight @ x for every row of x: of integers to the bit, of floats in float64."""
    if units.encoding == "bf16":
        return np.asarray(x.astype(np.float64) @ units.weights.T.astype(np.float64))
    q, scales = int8_blocks(x)
    total = np.zeros((len(x), units.shape[0]), np.float32)
    values = units.values.reshape(units.shape[0], -1, 32)
    for block in range(q.shape[1]):
        sums = q[:, block].astype(np.int32) @ values[:, block].T
        scaled = sums.astype(np.float32) * units.block_scales[:, block].astype(np.float32)
        # Exact, and rounded once: a fused multiply-add.
        terms = scaled.astype(np.float64) * scales[:, block, None].astype(np.float64)
        total = (total.astype(np.float64) + terms).astype(np.float32)
    return np.asarray(total * units.row_scales)


def check_matmul(units: Units, x: np.ndarray, members: int, accumulate: bool, extra: int = 0) -> None:
    """matmul against the reference; `extra` columns of the output and rows past the last tile must not change."""
    rows, tokens = units.shape[0], len(x)
    weights = guarded(units)
    record = matrix(weights)
    encoding = ENCODINGS[record["encoding"]]
    width = run(tile_width, tokens, encoding.code, False)
    whole = -(-tokens // width) * width
    before = np.random.default_rng(1).standard_normal((whole + 1, rows + extra)).astype(np.float32)
    out = before.copy()
    kernels = matmul_kernels([encoding.code])

    def own() -> tuple[np.ndarray, np.ndarray]:
        return (
            np.zeros(scratch_floats(record["cols"]), np.float32),
            np.zeros(local_floats(whole, 1), np.float32),
        )

    together(
        members,
        matmul,
        lambda _: (kernels, record, packed(x, encoding, width), tokens, width, out, accumulate, *own()),
    )
    expected = product(units, x) + (before[:tokens, :rows] if accumulate else 0)
    if encoding.is_integer:
        assert np.array_equal(out[:tokens, :rows], expected)
    else:
        # The sum of the magnitudes bounds what rounding can do to a sum.
        bound = np.abs(x) @ np.abs(units.weights).T + np.abs(expected) + 1e-30
        assert (np.abs(out[:tokens, :rows] - expected) / bound).max() < 2e-6
    assert np.array_equal(out[:, rows:], before[:, rows:])
    assert np.array_equal(out[whole:], before[whole:])


@ALL
@pytest.mark.parametrize("tokens", TOKENS)
def test_matmul(encoding: Encoding, tokens: int) -> None:
    rng = np.random.default_rng(tokens)
    for (rows, cols), accumulate in itertools.product([(16, 128), (48, 384), (203, 80), (32, 1152)], [False, True]):
        units = random_units(encoding.bits, np.arange(-(-rows // 16) * 16) < rows, cols, rng)
        x = rng.standard_normal((tokens, units.shape[1])).astype(np.float32)
        x[:, cols:] = 0
        check_matmul(units, x, 1, accumulate, extra=rows % 32)


@ALL
def test_a_tokens_results_do_not_depend_on_the_tokens_beside_it(encoding: Encoding) -> None:
    """To the bit, for all widths of tiles and every number of row groups."""
    rng = np.random.default_rng(0)
    units = random_units(encoding.bits, np.ones(144, bool), 384, rng)
    x = rng.standard_normal((max(33, UNPACKED, PIECED + 1), 384)).astype(np.float32)
    record, kernels = matrix(units), matmul_kernels([encoding.code])
    scratch, local = np.zeros(scratch_floats(384), np.float32), np.zeros(local_floats(64, 1), np.float32)
    results = []
    for count in sorted({1, 2, 3, 4, 5, 6, 8, 16, 33, len(x)}):
        width = run(tile_width, count, encoding.code, False)
        out = np.zeros((len(x) + 32, 144), np.float32)
        for first in range(0, len(x), count):
            part = packed(x[first : first + count], encoding, width)
            state = new_state(1)
            tokens = len(x[first : first + count])
            run(matmul, state[1], kernels, record, part, tokens, width, out[first:], 0, scratch, local)
        results.append(out[: len(x)])
    for other in results[1:]:
        np.testing.assert_array_equal(other, results[0])


@ALL
@pytest.mark.parametrize("members", [2, 3, 7])
def test_matmul_shared_by_threads(encoding: Encoding, members: int) -> None:
    rng = np.random.default_rng(members)
    for rows, tokens in [(16, 1), (32, 5), (1040, 1), (1040, 19)]:
        units = random_units(encoding.bits, np.ones(rows, bool), 256, rng)
        check_matmul(units, rng.standard_normal((tokens, 256)).astype(np.float32), members, True)


@pytest.mark.parametrize("multiple", [1, 4, 8])
@ALL
def test_results_of_a_claim_fit_the_buffer(encoding: Encoding, multiple: int) -> None:
    for rows, cols, tokens, members in itertools.product([16, 208, 6144], [128, 5120], [1, 5, 256], [1, 3]):
        record = np.zeros(1, MATRIX)[0]
        record["encoding"], record["rows"], record["cols"] = encoding.code, rows, cols
        width = run(tile_width, tokens, encoding.code, False)
        whole = -(-tokens // width) * width
        state, local = new_state(members), np.zeros(local_floats(whole, multiple), np.float32)
        chunk = run(local_chunk, state[1], record, rows // 16, tokens, width, local, multiple)
        assert chunk > 0
        assert chunk % multiple == 0
        assert chunk * 16 * whole <= local.size


@INTEGERS
@pytest.mark.parametrize("first", [0, 32, 96])
def test_pack_part(encoding: Encoding, first: int) -> None:
    """Packing a token in parts gives the bytes of packing it whole."""
    width = WIDTHS[-1]
    x = np.random.default_rng(first).standard_normal((width, 128)).astype(np.float32)
    whole, parts = (np.zeros(packed_bytes(width, 128), np.uint8) for _ in range(2))
    for token, values in enumerate(x):
        run(pack, values, token, width, encoding.code, whole)
        for low, high in [(0, first), (first, 128)]:
            run(pack_part, values[low:high], low, 128, token, width, encoding.code, parts)
    assert np.array_equal(whole, parts)


@pytest.mark.parametrize("end", [0, -1])
@pytest.mark.parametrize("tokens", [1, 4, 16])
@INTEGERS
def test_matmul_at_the_ends_of_the_integers(encoding: Encoding, tokens: int, end: int) -> None:
    """Nothing saturates if all weights and activations of a block have the largest magnitude."""
    q = {"int8": (-127, 127)}.get(encoding.name, (0, (1 << encoding.bits) - 1))[end]
    size = CODEBOOKS.get(encoding.name)
    codebook = None if size is None else np.linspace(0, 63, size).astype(np.uint8)
    for sign in (-1, 1):
        x = np.full((tokens, 128), sign * 3.0, np.float32)
        scales = np.full((16, 4), sign * 127)
        check_matmul(pack_units(encoding.name, np.full((16, 128), q), scales, np.ones(16), codebook), x, 1, False)


@INTEGERS
def test_matmul_with_any_scale(encoding: Encoding) -> None:
    """Every int8, and float32 from subnormal ones to as large as sums allow, of either sign."""
    rng = np.random.default_rng(0)
    scales = np.concatenate([np.arange(-128, 128), rng.integers(-128, 128, 256)]).reshape(128, 4)
    row_scales = 10.0 ** rng.uniform(-44, 30, 128) * rng.choice([-1, 1], 128)
    row_scales[::9] = 0
    units = random_units(encoding.bits, np.ones(128, bool), 128, rng)
    units = pack_units(encoding.name, units.integers, scales, row_scales.astype(np.float32), units.codebook)
    check_matmul(units, rng.standard_normal((2, 128)).astype(np.float32), 2, False)


def test_matmul_with_large_and_tiny_bfloat16() -> None:
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((16, 128)) * 10.0 ** rng.integers(-37, 30, (16, 128))
    check_matmul(pack_bf16(weights.astype(np.float32)), rng.standard_normal((3, 128)).astype(np.float32), 1, False)


@ALL
def test_read_row(encoding: Encoding) -> None:
    units = random_units(encoding.bits, np.arange(48) < 37, 150, np.random.default_rng(3))
    weights = guarded(units)
    for row, expected in enumerate(units.weights):
        out = np.full(256, np.nan, np.float32)
        run(read_row, matrix(weights), row, out)
        assert np.array_equal(out, expected)


@ALL
@pytest.mark.parametrize("width", WIDTHS)
def test_pack(encoding: Encoding, width: int) -> None:
    rng = np.random.default_rng(width)
    x = rng.standard_normal((2 * width + 1, 128)).astype(np.float32)
    x[:, 32:64] *= 10.0 ** rng.integers(-35, 35, (len(x), 1))
    x[0, 64:96] = 0
    x[-1, 64:96] = 1e-31
    x[1 % len(x), 96] = 3.4e38
    x[:, 97] = -0.0
    out = np.zeros(packed_bytes(3 * width, 128), np.uint8)
    for token, values in enumerate(x):
        run(pack, values, token, width, encoding.code, out)
    expected = packed(x, encoding, width)
    assert np.array_equal(out[: len(expected)], expected)


def test_encodings_that_take_the_same_packed_activations_have_the_same_widths() -> None:
    for tokens, one, other in itertools.product(range(1, 70), ENCODINGS, ENCODINGS):
        if (one.is_integer, one.zero_point) == (other.is_integer, other.zero_point):
            assert run(tile_width, tokens, one.code, False) == run(tile_width, tokens, other.code, False)


def test_packed_activations_fit_their_buffer() -> None:
    for tokens, encoding in itertools.product(range(1, 70), ENCODINGS):
        width = run(tile_width, tokens, encoding.code, False)
        assert width in WIDTHS
        assert len(packed(np.zeros((tokens, 128), np.float32), encoding, width)) <= packed_bytes(tokens, 128)


@pytest.mark.parametrize("size", [16, 72, 128, 1000])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_rms_norm(size: int, scale: float) -> None:
    rng = np.random.default_rng(size)
    x = (scale * rng.standard_normal(size + 8)).astype(np.float32)
    weight = rng.standard_normal(size).astype(np.float32)
    out = np.full(size + 8, 7, np.float32)
    run(rms_norm, x, weight, np.float32(1e-6), out)
    wide = x[:size].astype(np.float64)
    expected = wide / np.sqrt((wide**2).mean() + np.float32(1e-6)) * weight
    assert np.allclose(out[:size], expected, rtol=3e-6, atol=0)
    assert np.all(out[size:] == 7)
    run(rms_norm, x, weight, np.float32(1e-6), x)
    assert np.array_equal(x[:size], out[:size])  # in place


@pytest.mark.parametrize("dim", [16, 64, 128])
def test_rotate(dim: int) -> None:
    rng = np.random.default_rng(dim)
    x = rng.standard_normal(dim).astype(np.float32)
    angle = rng.uniform(0, 6, dim // 2)
    turned = (x[: dim // 2] + 1j * x[dim // 2 :]) * np.exp(1j * angle)
    run(rotate, x, np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32))
    assert np.allclose(x, np.concatenate([turned.real, turned.imag]), atol=1e-6)


@pytest.mark.parametrize("size", [16, 112, 256])
def test_swiglu(size: int) -> None:
    rng = np.random.default_rng(size)
    gate = np.concatenate([[0, -0.0, 80, -80, 87, -87, 200, -200], rng.uniform(-30, 30, size - 8)])
    up = rng.standard_normal(size)
    gate_up = np.stack([gate.reshape(-1, 16), up.reshape(-1, 16)], 1).reshape(-1).astype(np.float32)
    out = np.empty(size, np.float32)
    run(swiglu, gate_up, out)
    gate, up = (part.astype(np.float32).astype(np.float64) for part in (gate, up))
    assert np.allclose(out, gate / (1 + np.exp(-gate)) * up, rtol=2e-6, atol=1e-30)


@njit(nogil=True)
def _exp(x: Any, out: Any) -> None:
    for i in range(x.size):
        out[i] = scalar.exp(x[i])


@njit(nogil=True)
def _half(x: Any, out: Any) -> None:
    for i in range(x.size):
        out[i] = scalar.half(x[i])


def test_exp() -> None:
    x = np.linspace(-87, 87, 200_001).astype(np.float32)
    x = np.concatenate([x, np.array([0, -0.0, 1e-20, -1e-20, 0.5, -0.5, np.log(2) / 2], np.float32)])
    out = np.empty_like(x)
    run(_exp, x, out)
    # One ulp is at most 1.2e-7 of the value; rounding of the argument adds x times as much.
    assert np.all(np.abs(out / np.exp(x.astype(np.float64)) - 1) < 3e-7 + 1e-7 * np.abs(x))
    ends = np.array([-1e4, -100, -3e38, 100, 1e4, 3e38], np.float32)
    out = np.empty_like(ends)
    run(_exp, ends, out)
    assert np.all((out[:3] >= 0) & (out[:3] < 2e-38))
    assert np.all((out[3:] > 5e37) & np.isfinite(out[3:]))


def test_every_finite_float16_is_exact() -> None:
    patterns = np.arange(1 << 16).astype(np.uint16)
    patterns = patterns[patterns & 0x7C00 != 0x7C00]
    out = np.empty_like(patterns)
    run(_half, patterns.view(np.float16).astype(np.float32), out)
    assert np.array_equal(out, patterns)


def test_half_rounds_to_nearest_even() -> None:
    rng = np.random.default_rng(0)
    patterns = np.arange(0x7C00).astype(np.uint16).view(np.float16).astype(np.float32)
    middles = (patterns[1:] + patterns[:-1]) / 2
    x = np.concatenate(
        [
            patterns,
            middles,
            np.nextafter(middles, np.float32(0)),
            np.nextafter(middles, np.float32(np.inf)),
            10.0 ** rng.uniform(-45, 38, 100_000),
            [1e-45, 65504, 65519.996, 65520, 65536, 1e38, 3.4e38, np.inf],
        ]
    ).astype(np.float32)
    x = np.concatenate([x, -x])
    out = np.empty(len(x), np.uint16)
    run(_half, x, out)
    assert np.array_equal(out, np.clip(x, -65504, 65504).astype(np.float16).view(np.uint16))
