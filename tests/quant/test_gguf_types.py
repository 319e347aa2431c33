"""Dequantized blocks, against ggml's own (tests/data/from-llama/llama.npz)."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from gguf_files import LLAMA, NUMBERS, QUANTIZED
from npqwen_quant.gguf_types import TYPES, type_name


def test_the_formats_that_can_be_read() -> None:
    assert {kind.name: number for number, kind in TYPES.items()} == NUMBERS


@pytest.mark.parametrize("name", QUANTIZED)
def test_weights_equal_ggmls_to_the_bit(name: str) -> None:
    kind, expected = TYPES[NUMBERS[name]], LLAMA[f"{name}.weights"]
    found = kind.decode(LLAMA[f"{name}.blocks"])
    assert found.dtype == np.float32
    assert np.array_equal(found.view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("name", QUANTIZED)
def test_rows_of_several_blocks(name: str) -> None:
    kind = TYPES[NUMBERS[name]]
    blocks, weights = LLAMA[f"{name}.blocks"][:2], LLAMA[f"{name}.weights"][:2]
    found = kind.decode(np.tile(blocks.reshape(1, -1), (3, 2)))
    assert np.array_equal(found, np.tile(weights.reshape(1, -1), (3, 2)))


@pytest.mark.parametrize("name", [name for name in QUANTIZED if name != "MXFP4"])
def test_damaged_scales_give_numbers_that_are_not_finite_and_no_warning(name: str) -> None:
    kind = TYPES[NUMBERS[name]]
    assert not np.isfinite(kind.decode(np.full((1, kind.nbytes), 0x7F, np.uint8))).all()


@pytest.mark.parametrize("name", QUANTIZED)
def test_many_rows_take_little_memory_beside_the_result(name: str) -> None:
    kind = TYPES[NUMBERS[name]]
    rows = np.zeros((1 << 10, (1 << 12) // kind.weights * kind.nbytes), np.uint8)
    tracemalloc.start()
    kind.decode(rows)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak - 4 * (1 << 22) < 8_000_000


@pytest.mark.parametrize(
    ("number", "name"), [(12, "Q4_K"), (16, "IQ2_XXS"), (40, "NVFP4"), (31, "Q4_0_4_4"), (999, "type 999")]
)
def test_formats_go_by_ggmls_names(number: int, name: str) -> None:
    assert type_name(number) == name
