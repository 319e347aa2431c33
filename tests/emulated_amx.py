"""A pytest plugin that emulates AMX: its instructions become calls of functions, where the processor lacks them.

    python -m pytest -p emulated_amx tests/kernels/test_amx.py

It has to be imported before anything of npqwen that chooses kernels, so it needs a process of its own. All other
instructions are the portable ones, on vectors of AMX's length.
"""

from __future__ import annotations

from typing import ClassVar

from llvmlite import ir
from numba.core import cgutils

from npqwen.format.encodings import Encoding
from npqwen.simd import isa, llvm
from npqwen.simd.instructions import InstructionSet, Quads
from npqwen.simd.llvm import F32, I8, I16, I32, I64, vector
from npqwen.simd.x86 import AmxBf16

NAME = "emulated_amx"
_Shape = tuple[int, int]
"""A register's rows, and the bytes of a row."""
_HOST = isa.ISA
_FULL = 1024
"""Bytes of the largest register."""


class Emulated(InstructionSet):
    """The portable instruction set with the shapes of AMX's."""

    name: ClassVar[str] = NAME
    lanes: ClassVar[int] = AmxBf16.lanes
    tiles: ClassVar[dict[int, int]] = AmxBf16.tiles
    rows: ClassVar[tuple[int, ...]] = AmxBf16.rows
    accumulators: ClassVar[int] = AmxBf16.accumulators
    matrices: ClassVar[bool] = True
    prompt_width: ClassVar[int] = AmxBf16.prompt_width
    unpack_from: ClassVar[int] = AmxBf16.unpack_from

    def quads(self, b: ir.IRBuilder, encoding: Encoding, table: ir.Value, blocks: list[ir.Value]) -> Quads:
        yield from sorted(super().quads(b, encoding, table, blocks), key=lambda quad: quad[0])

    def lookup(self, b: ir.IRBuilder, table: ir.Value, indices: ir.Value) -> ir.Value:
        """By parts of the host's vectors: the portable way takes long to compile."""
        size, found = 4 * _HOST.lanes, []
        for first in range(0, indices.type.count, size):
            lanes = ir.Constant(vector(I32, size), [first + n for n in range(size)])
            found.append(_HOST.lookup(b, *(b.shuffle_vector(x, x, lanes) for x in (table, indices))))
        while len(found) > 1:
            joined = ir.Constant(vector(I32, 2 * found[0].type.count), [*range(2 * found[0].type.count)])
            found = [b.shuffle_vector(x, y, joined) for x, y in zip(found[::2], found[1::2], strict=True)]
        return found[0]


_shapes: dict[ir.Function, list[_Shape]] = {}
"""Shapes of the registers, by the function that is being emitted."""


def _shape(b: ir.IRBuilder, rows: list[int], widths: list[int]) -> None:
    """Emulates `npqwen.simd.amx.shape`, which comes first in a function."""
    _shapes[b.function] = list(zip(rows, widths, strict=True))


def _do(b: ir.IRBuilder, name: str, *args: ir.Value) -> None:
    """Emulates `npqwen.simd.amx.do`."""
    if name == "tilerelease":
        return
    numbers = [arg.constant for arg in args if isinstance(arg, ir.Constant) and arg.type == I8]
    shapes = [_shapes[b.function][number] for number in numbers]
    registers = _registers(b)
    operands = [llvm.offset(b, registers, number * _FULL, I8) for number in numbers] + list(args[len(numbers) :])
    symbol = "_".join([NAME, name, *(f"{rows}x{width}" for rows, width in shapes)])
    function = b.module.globals.get(symbol) or _function(b.module, symbol, name, shapes, [x.type for x in operands])
    b.call(function, operands)


def _registers(b: ir.IRBuilder) -> ir.Value:
    """The registers' memory, on the stack of the function that is emitted."""
    for instruction in b.function.entry_basic_block.instructions:
        if instruction.name.startswith(NAME):
            return instruction
    return cgutils.alloca_once(b, ir.ArrayType(I8, 8 * _FULL), name=NAME)


def _function(module: ir.Module, symbol: str, name: str, shapes: list[_Shape], types: list[ir.Type]) -> ir.Function:
    """The function that does what an instruction does; one for all its uses, as copies would take long to compile."""
    function = ir.Function(module, ir.FunctionType(llvm.VOID, types), symbol)
    function.linkage = "internal"
    function.attributes.add("noinline")
    b = ir.IRBuilder(function.append_basic_block())
    if name in ("tdpbf16ps", "tdpbssd"):
        depth, (rows, width) = shapes[2][0], shapes[0]
        {"tdpbf16ps": _multiply_floats, "tdpbssd": _multiply_bytes}[name](b, rows, width // 4, depth, *function.args)
    else:
        rows, width = shapes[0]
        kind = vector(I32, width // 4)
        with cgutils.for_range(b, I64(rows)) as loop:
            row = _at(b, function.args[0], loop.index, kind)
            if name == "tilezero":
                b.store(ir.Constant(kind, None), row, align=1)
            else:
                outside = _at(b, function.args[1], loop.index, kind, function.args[2])
                source, target = {"tileloadd64": (outside, row), "tilestored64": (row, outside)}[name]
                b.store(b.load(source, align=1), target, align=1)
    b.ret_void()
    return function


def _multiply_floats(
    b: ir.IRBuilder, rows: int, lanes: int, depth: int, sums: ir.Value, x: ir.Value, w: ir.Value
) -> None:
    """sums[m] += x[m] @ w, rounded as by TDPBF16PS: even and odd elements are added up separately, fused."""
    floats, words = vector(F32, lanes), vector(I32, lanes)
    with cgutils.for_range(b, I64(rows)) as outer:
        chains = [cgutils.alloca_once(b, floats) for _ in range(2)]
        for chain in chains:
            b.store(llvm.constant(F32, lanes, 0.0), chain)
        with cgutils.for_range(b, I64(depth)) as inner:
            pairs = b.load(_at(b, w, inner.index, words), align=1)
            upper = [b.shl(pairs, llvm.constant(I32, lanes, 16)), b.and_(pairs, llvm.constant(I32, lanes, 0xFFFF0000))]
            line = _at(b, x, outer.index, I16)
            for odd, (bits, chain) in enumerate(zip(upper, chains, strict=True)):
                place = b.gep(line, [b.add(b.mul(inner.index, I64(2)), I64(odd))])
                half = b.zext(b.load(place, align=1), I32)
                value = llvm.splat(b, b.bitcast(b.shl(half, I32(16)), F32), lanes)
                b.store(llvm.fma(b, value, b.bitcast(bits, floats), b.load(chain)), chain)
        total = _at(b, sums, outer.index, floats)
        b.store(b.fadd(b.load(total, align=1), b.fadd(*map(b.load, chains))), total, align=1)


def _multiply_bytes(
    b: ir.IRBuilder, rows: int, lanes: int, depth: int, sums: ir.Value, x: ir.Value, w: ir.Value
) -> None:
    """sums[m] += x[m] @ w, as TDPBSSD: signed bytes, four to a lane."""
    words, top = vector(I32, lanes), llvm.constant(I32, lanes, 24)
    with cgutils.for_range(b, I64(rows)) as outer, cgutils.for_range(b, I64(depth)) as inner:
        line, column = _at(b, x, outer.index, I8), b.mul(inner.index, I64(4))
        quads, place = b.load(_at(b, w, inner.index, words), align=1), _at(b, sums, outer.index, words)
        total = b.load(place, align=1)
        for k in range(4):
            values = b.ashr(b.shl(quads, llvm.constant(I32, lanes, 24 - 8 * k)), top)
            each = b.sext(b.load(b.gep(line, [b.add(column, I64(k))]), align=1), I32)
            total = b.add(total, b.mul(values, llvm.splat(b, each, lanes)))
        b.store(total, place, align=1)


def _at(
    b: ir.IRBuilder, place: ir.Value, row: ir.Value, kind: ir.Type, pitch: ir.Value | None = None
) -> ir.Value:
    """The address of a row of `pitch` bytes, by default those of a register, as a pointer to a type."""
    start = b.mul(row, I64(64) if pitch is None else pitch)
    return b.bitcast(b.gep(b.bitcast(place, I8.as_pointer()), [start]), kind.as_pointer())


isa.ISA = Emulated()

from npqwen.simd import amx  # noqa: E402  It takes ISA as it is then.

amx.shape, amx.do = _shape, _do
