"""Kernels that are compiled by themselves, and called by the address of their machine code.

Numba puts a function's code into everything that calls it, and LLVM goes over it again each time.  The big loops
are therefore functions of whole numbers (addresses, sizes) that are compiled one by one, and only
those that a model's encodings need.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core.ccallback import CFunc
from numba.extending import intrinsic

from npqwen.simd.instructions import I8


def entry(*constants: object, **options: Any) -> Callable[[Callable[..., None]], Any]:
    """A kernel made for some constants, which become part of its name; it takes int64 and returns nothing.

    The linker tells functions by name, types and a number that starts at 1 in every process: of two made for
    different constants, loaded from what two processes compiled, one would be called for the other.  It is
    compiled, or loaded, by `npqwen.kernels.compiled.address_of`.  It must not raise.
    """

    def made(function: Callable[..., None]) -> Any:
        function.__qualname__ = "_".join(map(str, (function.__name__, *constants)))
        signature = types.void(*[types.int64] * len(inspect.signature(function).parameters))
        return CFunc(function, (signature.args, signature.return_type), {}, {"nopython": True, **options})

    return made


@intrinsic
def run_at(_: Any, address: Any, args: Any) -> Any:
    """Run the kernel whose machine code is at an address, with a tuple of int64."""

    def generate(context: Any, b: ir.IRBuilder, sig: Any, values: Any) -> Any:
        i64 = ir.IntType(64)
        address, args = values
        # Numba's functions that return nothing return a null pointer.
        kind = ir.FunctionType(I8.as_pointer(), [i64] * len(sig.args[1]))
        function = b.inttoptr(address, kind.as_pointer())
        b.call(function, [b.extract_value(args, i) for i in range(len(sig.args[1]))])
        return context.get_dummy_value()

    return types.void(types.int64, types.UniTuple(types.int64, len(args))), generate
