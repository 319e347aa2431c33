"""The AMX kernel run in Python, its operations replaced by NumPy: where it reads and writes, on any processor."""

from __future__ import annotations

import ctypes
from typing import Any
from unittest import mock

import numpy as np
import pytest
from converted import random_units
from quantized import int8_blocks
from units import Units

from npqwen.format.encodings import BY_NAME, ENCODINGS
from npqwen.kernels import amx_matmul
from npqwen.kernels.unpacked_matmul import unpacked_bytes
from npqwen.simd.isa import ISA

INTEGERS = [encoding.name for encoding in ENCODINGS if encoding.is_integer]


def memory(address: int, count: int, dtype: Any) -> np.ndarray:
    """The array that the kernel's own `memory` makes; empty at address 0."""
    size = count * np.dtype(dtype).itemsize if address else 0
    raw: Any = (ctypes.c_uint8 * size).from_address(address or 1)
    return np.asarray(np.frombuffer(raw, dtype))


class Registers:
    """The operations of npqwen/simd/amx.py on blocks that are numbered by their place in a matrix."""

    def __init__(self, units: Units) -> None:
        self.units = units
        self.products: dict[int, np.ndarray] = {}

    def unpack_block(self, _: int, __: Any, w: np.ndarray, at: int, out: np.ndarray, out_at: int) -> None:
        """Unpack by the tests' own reading of the block."""
        lines = w[at : at + self.block_bytes]
        alone = np.concatenate([np.ones(64, np.uint8), np.tile(lines, 4)])
        unit = Units(self.units.encoding, np.concatenate([np.zeros(64, np.uint8), alone])[None], self.units.codebook)
        quads = unit.values[:, :32].reshape(16, 8, 4).transpose(1, 0, 2)
        out[out_at : out_at + 512] = quads.astype(np.int8).reshape(-1).view(np.uint8)

    @property
    def block_bytes(self) -> int:
        return BY_NAME[self.units.encoding].block_bytes

    def start_block(self, n: int, w: np.ndarray, at: int, x: np.ndarray, x_at: int) -> None:
        weights = w[at : at + 512].view(np.int8).reshape(8, 16, 4).transpose(1, 0, 2).reshape(16, 32)
        tokens = x[x_at : x_at + 512].view(np.int8).reshape(16, 32)
        self.products[n] = tokens.astype(np.int32) @ weights.T.astype(np.int32)

    def finish_block(
        self, tile: np.ndarray, n: int, w: np.ndarray, scales_at: int, x: np.ndarray, x_at: int, _: Any
    ) -> np.ndarray:
        scales = w[scales_at : scales_at + 16].view(np.int8).astype(np.float32)
        x_scales = x[x_at + 512 : x_at + 576].view(np.float32)
        scaled = self.products.pop(n).astype(np.float32) * scales
        return np.asarray((tile + scaled.astype(np.float64) * x_scales[:, None]).astype(np.float32))


def scale_rows(tile: np.ndarray, _: int, w: np.ndarray, at: int) -> np.ndarray:
    return np.asarray(tile * w[at : at + 64].view(np.float32))


def store(tile: np.ndarray, out: np.ndarray, at: int, _: int, stride: int) -> None:
    for t, row in enumerate(tile):
        out[at + t * stride : at + t * stride + 16] = row


def pack(x: np.ndarray) -> np.ndarray:
    """Activations (tokens, columns) in tiles of 16 tokens, as simd/packed.py says; starts are not read."""
    q, scales = int8_blocks(x)
    tiles, blocks = len(x) // 16, q.shape[1]
    parts = (
        q.reshape(tiles, 16, blocks, 32).swapaxes(1, 2).reshape(tiles, blocks, -1).view(np.uint8),
        np.ascontiguousarray(scales.reshape(tiles, 16, blocks).swapaxes(1, 2)).view(np.uint8),
        np.full((tiles, blocks, 16 * ISA.start_bytes), 99, np.uint8),
    )
    return np.ascontiguousarray(np.concatenate(parts, 2)).reshape(-1)


@pytest.mark.parametrize("encoding", INTEGERS)
@pytest.mark.parametrize(("groups", "units", "tiles", "first"), [(1, 1, 1, 0), (3, 2, 2, 1), (2, 3, 1, 0)])
def test_every_block_is_multiplied_once(encoding: str, groups: int, units: int, tiles: int, first: int) -> None:
    rng = np.random.default_rng(groups)
    kind = BY_NAME[encoding]
    weights = random_units(kind.bits, np.ones(16 * groups, bool), 128 * units, rng)
    x = rng.standard_normal((16 * tiles, 128 * units)).astype(np.float32)
    packed = pack(x)
    out = np.zeros((16 * tiles, 16 * groups), np.float32)
    scratch = np.zeros(unpacked_bytes(128 * units, 1 << 14) + amx_matmul.AMX_ROOM_BYTES, np.uint8)
    registers = Registers(weights)
    operations: dict[str, Any] = {
        "memory": memory,
        "configure": lambda: None,
        "release": lambda: None,
        "prefetch": lambda *_: None,
        "zeros": lambda *_: np.zeros((16, 16), np.float32),
        "load_signed_codebook": lambda *_: None,
        "unpack_signed": registers.unpack_block,
        "start_block": registers.start_block,
        "finish_block": registers.finish_block,
        "scale_rows": scale_rows,
        "store": store,
    }
    kernel = amx_matmul.amx_rows(kind)
    with mock.patch.multiple(amx_matmul, **operations):
        kernel._pyfunc(
            weights.rows.ctypes.data, 0, units, first, groups, packed.ctypes.data, tiles, out.ctypes.data,
            out.shape[1], 0, scratch.ctypes.data,
        )  # fmt: skip
    q, scales = int8_blocks(x)
    expected = (q * scales[:, :, None]).reshape(x.shape).astype(np.float64) @ weights.weights.T.astype(np.float64)
    assert not out[:, : 16 * first].any()
    np.testing.assert_allclose(out[:, 16 * first :], expected[:, 16 * first :], rtol=1e-4, atol=1e-4)
