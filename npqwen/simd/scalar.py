"""Scalar helpers that LLVM vectorizes inside plain loops, and raw memory as arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from npqwen.simd.instructions import call

FAST = {"contract", "reassoc", "nsz", "arcp"}
"""The liberties kernels take with float32: never `nnan` or `ninf`, which would break masks and checks."""


@intrinsic
def float_bits(_: Any, value: Any) -> Any:
    """The bits of a float32, as int32."""
    return types.int32(types.float32), lambda context, b, sig, args: b.bitcast(args[0], ir.IntType(32))


@intrinsic
def bits_float(_: Any, value: Any) -> Any:
    """The float32 of these bits."""
    return types.float32(types.int32), lambda context, b, sig, args: b.bitcast(args[0], ir.FloatType())


@intrinsic
def round_even(_: Any, value: Any) -> Any:
    """A float32 rounded to a whole number, halves to even."""

    def generate(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> Any:
        return call(b, "llvm.rint.f32", ir.FloatType(), args[0])

    return types.float32(types.float32), generate


@intrinsic
def _voidptr(_: Any, address: Any) -> Any:
    def generate(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> Any:
        return b.inttoptr(args[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), generate


@njit(nogil=True)
def memory(address: int, count: int, like: Any) -> Any:
    """The `count` items at an address as an array of dtype `like`."""
    return carray(_voidptr(address), (count,), like)


@intrinsic
def without_refcounts(_: Any, arrays: Any) -> Any:
    """Arrays, or tuples of them, that Numba does not count references of: their owner outlives the call.

    Every slice of an array counts, in one place for all threads: which then wait for each other.
    """

    def uncounted(context: Any, b: ir.IRBuilder, kind: Any, value: ir.Value) -> ir.Value:
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


@njit(nogil=True, error_model="numpy", fastmath=FAST)
def exp(x: np.float32) -> np.float32:
    """e**x for float32 within about 2 ulp; x below -87 gives about 1e-38, above 88 about 1e38."""
    y = min(max(x * np.float32(1.44269504), np.float32(-126.0)), np.float32(126.0))
    n = round_even(y)
    f = y - n
    p = np.float32(1.5403530e-4)
    p = p * f + np.float32(1.3333558e-3)
    p = p * f + np.float32(9.6181291e-3)
    p = p * f + np.float32(5.5504109e-2)
    p = p * f + np.float32(2.4022651e-1)
    p = p * f + np.float32(6.9314718e-1)
    p = p * f + np.float32(1.0)
    return p * bits_float(np.int32(np.int32(n) + np.int32(127)) << np.int32(23))


@njit(nogil=True)
def half(x: np.float32) -> np.uint16:
    """The float16 nearest to x, as its bits; what is too large becomes the largest finite one."""
    bits = float_bits(x)
    sign = (bits >> np.int32(16)) & np.int32(0x8000)
    size = min(bits & np.int32(0x7FFFFFFF), np.int32(0x477FE000))
    normal = (size + np.int32(0xFFF) + ((size >> np.int32(13)) & np.int32(1)) - np.int32(0x38000000)) >> np.int32(13)
    # Adding 0.5 leaves float32 the very bits a subnormal float16 has, rounded the same way.
    small = float_bits(bits_float(size) + np.float32(0.5)) - np.int32(0x3F000000)
    return np.uint16(sign | (small if size < np.int32(0x38800000) else normal))


@njit(nogil=True)
def unhalf(h: np.uint16) -> np.float32:
    """The value of a finite float16, given its bits."""
    size = bits_float((np.int32(h) & np.int32(0x7FFF)) << np.int32(13)) * np.float32(2.0**112)
    return -size if h & np.uint16(0x8000) else size
