"""RMSNorm, rotary embedding, SwiGLU and gates, each for one token's vector."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from npqwen.format.encodings import UNIT_ROWS
from npqwen.simd.blocks import dot, swiglu_block
from npqwen.simd.scalar import exp, multiply_add


@njit(nogil=True, error_model="numpy")
def rms_norm(x: Any, weight: Any, eps: np.float32, out: Any) -> None:
    """out = x / sqrt(mean(x**2) + eps) * weight over weight.size elements, float32 (Zhang & Sennrich 2019)."""
    scale = np.float32(1.0) / np.sqrt(dot(x, x, weight.size) / np.float32(weight.size) + eps)
    for i in range(weight.size):
        out[i] = x[i] * scale * weight[i]


@njit(nogil=True, error_model="numpy")
def rotate(x: Any, cos: Any, sin: Any) -> None:
    """Rotary position embedding in place: pairs (i, i + cos.size) are rotated by their angle (Su et al. 2021)."""
    half = cos.size
    for i in range(half):
        a, b = x[i], x[i + half]
        x[i] = multiply_add(a, cos[i], -(b * sin[i]))
        x[i + half] = multiply_add(b, cos[i], a * sin[i])


@njit(nogil=True, error_model="numpy")
def swiglu(gate_up: Any, out: Any) -> None:
    """out = silu(gate) * up (Shazeer 2020), float32; gate_up alternates 16 of gate and 16 of up."""
    for i in range(0, gate_up.size // 2, UNIT_ROWS):
        swiglu_block(gate_up, 2 * i, out, i)


@njit(nogil=True, error_model="numpy")
def multiply_sigmoid(gate: Any, x: Any) -> None:
    """x *= sigmoid(gate) over gate.size elements, float32."""
    for i in range(gate.size):
        x[i] /= np.float32(1.0) + exp(-gate[i])


@njit(nogil=True, error_model="numpy")
def add_gated(weight: Any, x: Any, bias: np.float32, values: Any, out: Any) -> None:
    """out += sigmoid(weight @ x + bias) * values over weight.size elements, float32."""
    scale = np.float32(1.0) / (np.float32(1.0) + exp(-(dot(weight, x, weight.size) + bias)))
    for i in range(weight.size):
        out[i] = multiply_add(scale, values[i], out[i])
