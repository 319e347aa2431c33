"""Kernels that are compiled separately and called by the address of their machine code.

Numba copies a function's code into everything that calls it, and LLVM optimizes each copy again. The big loops are
therefore functions of integers (addresses, sizes) that are compiled one by one, and only those that a model's encodings
need.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core.ccallback import CFunc
from numba.core.dispatcher import Dispatcher
from numba.extending import _Intrinsic, intrinsic

from npqwen.simd.llvm import I8, I64


def entry(*constants: object, **options: Any) -> Callable[[Callable[..., None]], Any]:
    """Decorate a kernel that takes int64, returns nothing and must not raise.

    constants: distinguish it from other kernels with the same code, and become part of its name. The linker identifies
    functions by name, types and a number that starts at 1 in every process: without the constants it could call one
    kernel in place of another that a different process compiled. TypeError if the kernel's closure holds a function of
    Numba's: it pickles closures to find a stored kernel, and such a pickle is another one in every process.
    `npqwen.kernels.compiled.address_of` compiles it, or loads its machine code.
    """

    def decorate(function: Callable[..., None]) -> Any:
        for cell in function.__closure__ or ():
            if isinstance(cell.cell_contents, (Dispatcher, _Intrinsic)):
                raise TypeError(f"{function.__name__} holds {cell.cell_contents}; choose it inside, by a constant")
        function.__qualname__ = "_".join(map(str, (function.__name__, *constants)))
        signature = types.void(*[types.int64] * len(inspect.signature(function).parameters))
        return CFunc(function, (signature.args, signature.return_type), {}, {"nopython": True, **options})

    return decorate


@intrinsic
def run_at(_: Any, address: Any, args: Any) -> Any:
    """Call the kernel whose machine code is at an address with a tuple of int64."""

    def generate(context: Any, b: ir.IRBuilder, sig: Any, values: Any) -> Any:
        address, args = values
        count = len(sig.args[1])
        # Numba's functions that return nothing return a null pointer.
        kind = ir.FunctionType(I8.as_pointer(), [I64] * count)
        function = b.inttoptr(address, kind.as_pointer())
        b.call(function, [b.extract_value(args, i) for i in range(count)])
        return context.get_dummy_value()

    return types.void(types.int64, types.UniTuple(types.int64, len(args))), generate
