"""Masking of logits, against NumPy."""

from __future__ import annotations

import numpy as np
import pytest

from npqwen.kernels.bit_mask import mask


@pytest.mark.parametrize("size", [1, 31, 32, 33, 64, 1000, 4128])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("in_place", [False, True])
def test_values_whose_bit_is_not_set_become_minus_infinity(size: int, share: float, in_place: bool) -> None:
    rng = np.random.default_rng(size)
    values = rng.standard_normal(size, np.float32)
    values[rng.integers(0, size, 1 + size // 10)] = np.nan
    allowed = rng.random(-(-size // 32) * 32 + 64) < share  # there may be more bits than values
    bits = np.packbits(allowed, bitorder="little").view(np.uint32)
    expected = np.where(allowed[:size], values, -np.inf)
    out = values if in_place else np.zeros(size, np.float32)
    assert mask(values, bits, out) == allowed[:size].sum()
    np.testing.assert_array_equal(out, expected)
