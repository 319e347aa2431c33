"""Matrix kernels in bf16, for long parts of prompts, against NumPy. They run where there is AMX, or with emulated_amx.

test_instruction_sets.py starts these tests with the emulation.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from converted import random_units
from kernel_calls import run, together
from test_kernels import guarded, matrix
from units import Units

from npqwen.format.encodings import BY_NAME, ENCODINGS, Encoding
from npqwen.kernels.matmul import local_floats, matmul, matmul_kernels, scratch_floats
from npqwen.kernels.packing import WIDTHS, pack, pack_part, packed_bytes, tile_width
from npqwen.kernels.prompt_matmul import PROMPT_WIDTH

pytestmark = pytest.mark.skipif(not PROMPT_WIDTH, reason="this process's kernels have no tiles for prompts")
INTEGERS = pytest.mark.parametrize(
    "encoding", [BY_NAME[name] for name in ("int4", "int5", "int8")], ids=lambda encoding: encoding.name
)


def rounded(x: np.ndarray) -> np.ndarray:
    """float32 rounded to 8 significant bits, ties to even, as uint16."""
    bits = x.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def value(halves: np.ndarray) -> np.ndarray:
    """bf16 as float64."""
    return (halves.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def packed(x: np.ndarray) -> np.ndarray:
    """Activations x (tokens, cols): tiles of tokens, each of blocks of 32 columns, token after token; uint8."""
    x = np.pad(x, ((0, -len(x) % PROMPT_WIDTH), (0, 0)))
    blocks = rounded(x).reshape(len(x) // PROMPT_WIDTH, PROMPT_WIDTH, -1, 32).swapaxes(1, 2)
    return np.ascontiguousarray(blocks).reshape(-1).view(np.uint8)


def product(units: Units, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """weight @ x for every row of x, with both rounded to bf16; and the sums of magnitudes. float64."""
    scaled = units.values.reshape(units.shape[0], -1, 32) * units.block_scales[..., None].astype(np.float64)
    weights, activations = value(rounded(scaled.reshape(units.shape))), value(rounded(x))
    scales = units.row_scales.astype(np.float64)
    return activations @ weights.T * scales, np.abs(activations) @ np.abs(weights).T * np.abs(scales)


def multiply(units: Units, x: np.ndarray, out: np.ndarray, accumulate: bool, members: int = 1) -> None:
    weights = guarded(units)
    record, whole = matrix(weights), -(-len(x) // PROMPT_WIDTH) * PROMPT_WIDTH
    kernels = matmul_kernels([record["encoding"]])
    assert run(tile_width, len(x), int(record["encoding"]), True) == PROMPT_WIDTH

    size, rooms = scratch_floats(int(record["cols"])), [np.empty(0, np.float32)] * members

    def own(member: int) -> tuple[np.ndarray, np.ndarray]:
        rooms[member] = np.full(size + 16, 77, np.float32)
        return rooms[member][:size], np.zeros(local_floats(whole, 1), np.float32)

    arguments = kernels, record, packed(x), len(x), PROMPT_WIDTH, out, accumulate
    together(members, matmul, lambda member: (*arguments, *own(member)))
    assert all((room[size:] == 77).all() for room in rooms)


@INTEGERS
@pytest.mark.parametrize("tokens", [64, 65, 97, 256])
def test_against_numpy(encoding: Encoding, tokens: int) -> None:
    rng = np.random.default_rng(tokens)
    for (rows, cols), accumulate in itertools.product([(16, 128), (48, 384), (203, 80), (32, 1152)], [False, True]):
        units = random_units(encoding.bits, np.arange(-(-rows // 16) * 16) < rows, cols, rng)
        x = rng.standard_normal((tokens, units.shape[1])).astype(np.float32)
        x[:, cols:] = 0
        before = rng.standard_normal((len(x) + 40, units.shape[0] + rows % 32)).astype(np.float32)
        out = before.copy()
        multiply(units, x, out, accumulate)
        expected, bound = product(units, x)
        found = out[:tokens, : units.shape[0]] - (before[:tokens, : units.shape[0]] if accumulate else 0)
        assert (np.abs(found - expected) <= 2e-6 * (bound + 10 * accumulate)).all()
        assert np.array_equal(out[:, units.shape[0] :], before[:, units.shape[0] :])
        assert np.array_equal(out[tokens:], before[tokens:])


@INTEGERS
def test_shared_by_threads_and_beside_other_tokens(encoding: Encoding) -> None:
    """To the bit: a token's results do not depend on the threads, nor on the other tokens of the pass."""
    rng = np.random.default_rng(0)
    units = random_units(encoding.bits, np.ones(1040, bool), 256, rng)
    x = rng.standard_normal((130, 256)).astype(np.float32)
    alone, shared, part = (np.zeros((160, 1040), np.float32) for _ in range(3))
    multiply(units, x, alone, False)
    multiply(units, x, shared, False, members=3)
    multiply(units, x[40:110], part, False)
    np.testing.assert_array_equal(shared, alone)
    np.testing.assert_array_equal(part[:70], alone[40:110])


@INTEGERS
@pytest.mark.parametrize("first", [0, 32, 96])
def test_packing(encoding: Encoding, first: int) -> None:
    x = np.random.default_rng(first).standard_normal((2 * PROMPT_WIDTH, 128)).astype(np.float32)
    x[3, 5:9] = [np.inf, -np.inf, np.nan, -0.0]
    whole, parts = (np.zeros(packed_bytes(len(x), 128), np.uint8) for _ in range(2))
    for token, values in enumerate(x):
        run(pack, values, token, PROMPT_WIDTH, encoding.code, whole)
        for low, high in [(0, first), (first, 128)]:
            run(pack_part, values[low:high], low, 128, token, PROMPT_WIDTH, encoding.code, parts)
    assert np.array_equal(whole, parts)
    halves = whole.view(np.uint16)[: x.size].reshape(2, 4, PROMPT_WIDTH, 32).swapaxes(1, 2).reshape(x.shape)
    np.testing.assert_array_equal(value(halves)[x == x], value(rounded(x))[x == x])
    assert np.isnan(value(halves)[np.isnan(x)]).all()


def test_other_tokens_keep_their_tiles() -> None:
    for encoding, tokens in itertools.product(ENCODINGS, [1, 4, 15, 64, 500]):
        assert run(tile_width, tokens, encoding.code, False) in WIDTHS
        assert encoding.is_integer or run(tile_width, tokens, encoding.code, True) in WIDTHS


