"""Emitting LLVM instructions: types, a few helpers, and `operation`, which makes such code callable in kernels.

Functions that emit instructions take an llvmlite `IRBuilder`, named b, first; the values they take and return are
LLVM's.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.errors import RequireLiteralValue
from numba.extending import intrinsic

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
F16, F32 = ir.HalfType(), ir.FloatType()
VOID = ir.VoidType()

CACHE_LINE = 64
"""Bytes of a cache line."""

Int = Annotated[ir.Value, types.int64]
Int32 = Annotated[ir.Value, types.int32]
Float = Annotated[ir.Value, types.float32]
Array = Annotated[ir.Value, "array"]
"""A NumPy array, as a pointer to its first element."""
Tile = Annotated[list[ir.Value], "tile"]
"""A tuple of values of one type: the vectors of a register tile (npqwen/simd/tile.py)."""
Const = Annotated[int, "constant"]
"""A number known when the kernel is compiled."""


def operation(function: Callable[..., Any] | None = None, *, returns: Callable[..., types.Type] | None = None) -> Any:
    """Make a function that emits LLVM instructions callable in kernels; the function itself is kept as `.emit`.

    Its parameters after the builder are annotated with the kinds above, and its result with None, Int, Int32, Float, a
    tuple of these, or Tile: the type of its first Tile argument. Any other result type is computed by `returns` from
    the arguments, constants as int and the others as Numba types.
    """
    if function is None:
        return functools.partial(operation, returns=returns)
    hints = get_type_hints(function, include_extras=True)
    result_kind = hints.pop("return")
    names = list(inspect.signature(function).parameters)[1:]
    kinds = [get_args(hints[name])[1] for name in names]

    @intrinsic(prefer_literal=True)
    @functools.wraps(function)
    def typed(_: Any, *args: Any) -> Any:
        found = [_argument_type(name, *pair) for name, *pair in zip(names, kinds, args, strict=True)]
        if returns is None:
            result = _result_type(result_kind, kinds, found)
        else:
            given = zip(kinds, found, strict=True)
            result = returns(*[arg.literal_value if kind == "constant" else arg for kind, arg in given])

        def generate(context: Any, b: ir.IRBuilder, sig: Any, values: Any) -> Any:
            bound = [_bound(context, b, *each) for each in zip(kinds, sig.args, values, strict=True)]
            out = function(b, *bound)
            if isinstance(sig.return_type, types.UniTuple):
                return cgutils.pack_array(b, out)
            if isinstance(sig.return_type, types.BaseTuple):
                return context.make_tuple(b, sig.return_type, out)
            return context.get_dummy_value() if sig.return_type == types.void else out

        return result(*found), generate

    typed.emit = function
    return typed


def _argument_type(name: str, kind: Any, given: types.Type) -> types.Type:
    if kind == "constant" and not isinstance(given, types.Literal):
        raise RequireLiteralValue(f"{name} must be known when the kernel is compiled")
    return kind if isinstance(kind, types.Type) else given


def _result_type(kind: Any, kinds: list[Any], found: list[types.Type]) -> types.Type:
    if kind is type(None):
        return types.void
    if kind == Tile:
        return found[kinds.index("tile")]
    if get_origin(kind) is tuple:
        return types.Tuple([get_args(part)[1] for part in get_args(kind)])
    return get_args(kind)[1]


def _bound(context: Any, b: ir.IRBuilder, kind: Any, numba_type: types.Type, value: ir.Value) -> Any:
    """An argument as the emitting function takes it."""
    if kind == "constant":
        return numba_type.literal_value
    if kind == "array":
        return context.make_array(numba_type)(context, b, value).data
    if kind == "tile":
        return cgutils.unpack_tuple(b, value)
    return value


def vector(element: ir.Type, lanes: int) -> ir.VectorType:
    """The vector type <lanes x element>."""
    return ir.VectorType(element, lanes)


def constant(element: ir.Type, lanes: int, value: float) -> ir.Constant:
    """A vector with one value in every lane."""
    return ir.Constant(vector(element, lanes), [ir.Constant(element, value)] * lanes)


def undefined(kind: ir.Type) -> ir.Constant:
    """A value to be overwritten, or never read."""
    return ir.Constant(kind, ir.Undefined)


def splat(b: ir.IRBuilder, value: ir.Value, lanes: int) -> ir.Value:
    """A scalar in every lane of a vector."""
    kind = vector(value.type, lanes)
    one = b.insert_element(undefined(kind), value, I32(0))
    return b.shuffle_vector(one, undefined(kind), constant(I32, lanes, 0))


def call(b: ir.IRBuilder, name: str, returns: ir.Type, *args: ir.Value, fastmath: tuple[str, ...] = ()) -> ir.Value:
    """Call an LLVM intrinsic or an external function by its name."""
    kind = ir.FunctionType(returns, [a.type for a in args])
    function = b.module.globals.get(name) or ir.Function(b.module, kind, name)
    return b.call(function, args, fastmath=fastmath)


def fma(b: ir.IRBuilder, x: ir.Value, y: ir.Value, z: ir.Value) -> ir.Value:
    """x * y + z of float32 vectors, rounded once."""
    return call(b, f"llvm.fma.v{x.type.count}f32", x.type, x, y, z)


def offset(b: ir.IRBuilder, base: ir.Value, size: int, to: ir.Type) -> ir.Value:
    """The address `size` bytes past base, as a pointer to `to`."""
    byte = b.bitcast(base, I8.as_pointer())
    return b.bitcast(b.gep(byte, [I64(size)]), to.as_pointer())


def element(b: ir.IRBuilder, array: ir.Value, index: ir.Value, to: ir.Type) -> ir.Value:
    """The address of array[index], as a pointer to `to`."""
    return b.bitcast(b.gep(array, [index]), to.as_pointer())


def step(b: ir.IRBuilder, index: ir.Value, count: int, stride: ir.Value | int = 1) -> ir.Value:
    """index + count * stride, for a count known when the kernel is compiled."""
    if isinstance(stride, int):
        return b.add(index, index.type(count * stride))
    return b.add(index, b.mul(stride, stride.type(count)))


def prefetch_line(b: ir.IRBuilder, place: ir.Value) -> None:
    """Prefetch the cache line at an address, a pointer to I8, into the first-level cache; it need not be mapped."""
    call(b, "llvm.prefetch.p0", VOID, place, I32(0), I32(3), I32(1))


def settle(b: ir.IRBuilder, register: str, values: list[ir.Value]) -> list[ir.Value]:
    """The values, computed before any later load: LLVM would otherwise hoist loads, and spill registers.

    register: the constraint letter of inline assembly for registers of such values.
    """
    kind = ir.LiteralStructType([value.type for value in values])
    outputs = [f"={register}"] * len(values)
    inputs = [str(n) for n in range(len(values))]
    function = ir.FunctionType(kind, [value.type for value in values])
    after = b.asm(function, "", ",".join([*outputs, *inputs, "~{memory}"]), values, side_effect=True)
    return [b.extract_value(after, n) for n in range(len(values))]
