"""Scalar helpers that LLVM vectorizes inside plain loops, and raw memory as arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np.arrayobj import populate_array

from npqwen.simd.llvm import F32, I32, Float, Int32, call, operation


@operation
def float_bits(b: ir.IRBuilder, value: Float) -> Int32:
    """The bits of a float32."""
    return b.bitcast(value, I32)


@operation
def bits_float(b: ir.IRBuilder, value: Int32) -> Float:
    """The float32 of these bits."""
    return b.bitcast(value, F32)


@operation
def multiply_add(b: ir.IRBuilder, x: Float, y: Float, z: Float) -> Float:
    """x * y + z, rounded once."""
    return call(b, "llvm.fma.f32", F32, x, y, z)


@operation
def round_even(b: ir.IRBuilder, value: Float) -> Float:
    """The nearest whole number, halves to even."""
    return call(b, "llvm.rint.f32", F32, value)


@intrinsic
def memory(_: Any, address: Any, count: Any, dtype: Any) -> Any:
    """The `count` items at an address as an array; for `carray`, Numba would compile two functions per dtype."""
    kind = types.Array(dtype.dtype, 1, "C")

    def generate(context: Any, b: ir.IRBuilder, sig: Any, values: Any) -> Any:
        array = context.make_array(kind)(context, b)
        size = context.get_constant(types.intp, context.get_abi_sizeof(context.get_data_type(kind.dtype)))
        start = b.inttoptr(values[0], array.data.type)
        populate_array(array, data=start, shape=[values[1]], strides=[size], itemsize=size, meminfo=None)
        return array._getvalue()

    return kind(types.int64, types.int64, dtype), generate


@intrinsic
def without_refcounts(_: Any, arrays: Any) -> Any:
    """Views of arrays, or of tuples of them, without reference counts: the owner must outlive the call.

    Each slice of a counted array changes an atomic counter, whose cache line all threads would contend for.
    """

    def uncounted(context: Any, b: ir.IRBuilder, kind: Any, value: ir.Value) -> ir.Value:
        """`value`, of the Numba type `kind`, as an LLVM value whose arrays have no owner."""
        if isinstance(kind, types.BaseTuple):
            parts = zip(kind, cgutils.unpack_tuple(b, value, len(kind)), strict=True)
            return context.make_tuple(b, kind, [uncounted(context, b, *part) for part in parts])
        if not isinstance(kind, types.Array):
            return value
        array = context.make_array(kind)(context, b, value)
        array.meminfo = ir.Constant(array.meminfo.type, None)
        array.parent = ir.Constant(array.parent.type, None)
        return array._getvalue()

    return arrays(arrays), lambda context, b, sig, args: uncounted(context, b, sig.args[0], args[0])


@njit(nogil=True, error_model="numpy")
def exp(x: np.float32) -> np.float32:
    """e**x for float32 within about 2 ulp; x below -87 gives about 1e-38, above 88 about 1e38."""
    y = min(max(x * np.float32(1.44269504), np.float32(-126.0)), np.float32(126.0))
    n = round_even(y)
    f = y - n
    p = np.float32(1.5403530e-4)
    p = multiply_add(p, f, np.float32(1.3333558e-3))
    p = multiply_add(p, f, np.float32(9.6181291e-3))
    p = multiply_add(p, f, np.float32(5.5504109e-2))
    p = multiply_add(p, f, np.float32(2.4022651e-1))
    p = multiply_add(p, f, np.float32(6.9314718e-1))
    p = multiply_add(p, f, np.float32(1.0))
    return p * bits_float(np.int32(np.int32(n) + np.int32(127)) << np.int32(23))


@njit(nogil=True)
def half(x: np.float32) -> np.uint16:
    """The bits of the float16 nearest to x, at most 65504 in magnitude; ties to even."""
    bits = float_bits(x)
    sign = (bits >> np.int32(16)) & np.int32(0x8000)
    magnitude = min(bits & np.int32(0x7FFFFFFF), np.int32(0x477FE000))
    odd = (magnitude >> np.int32(13)) & np.int32(1)
    normal = (magnitude + np.int32(0xFFF) + odd - np.int32(0x38000000)) >> np.int32(13)
    # In float32, adding 0.5 rounds the low bits to those of the subnormal float16.
    subnormal = float_bits(bits_float(magnitude) + np.float32(0.5)) - np.int32(0x3F000000)
    return np.uint16(sign | (subnormal if magnitude < np.int32(0x38800000) else normal))
