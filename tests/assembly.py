"""The inner loops of the kernels as assembly of any processor that LLVM knows.

A loop is built around the operations of npqwen/simd/tile.py, with pointers in place of Numba's arrays, and compiled by
LLVM as Numba does it. Nothing of it is run.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any
from unittest import mock

import llvmlite.binding as llvm
from llvmlite import ir

from npqwen.format.encodings import UNIT_ROWS, Encoding
from npqwen.simd import amx, amx_bf16, recurrence, tile
from npqwen.simd.instructions import PREFETCH_DISTANCE, UNPACKED, InstructionSet
from npqwen.simd.llvm import F32, I8, I16, I64, undefined, vector
from npqwen.simd.packed import block_bytes
from npqwen.simd.x86 import Amx, AmxBf16

CORTEX_A72 = "aarch64-unknown-linux-gnu", "cortex-a72"
CORTEX_A76 = "aarch64-unknown-linux-gnu", "cortex-a76"
APPLE_M2 = "aarch64-unknown-linux-gnu", "apple-m2"
NEOVERSE_V1 = "aarch64-unknown-linux-gnu", "neoverse-v1"
ZEN4 = "x86_64-unknown-linux-gnu", "znver4"
SAPPHIRE_RAPIDS = "x86_64-unknown-linux-gnu", "sapphirerapids"
ALDER_LAKE = "x86_64-unknown-linux-gnu", "alderlake"
HASWELL = "x86_64-unknown-linux-gnu", "haswell"

Body = Callable[[ir.IRBuilder, list[ir.Value], ir.Value, ir.Value, ir.Value, ir.Value, Any], list[ir.Value]]
"""One turn of a loop: (builder, sums, weights, activations, offset in the weights, in the activations, what was
loaded before) to sums."""


def integer_loop(
    isa: InstructionSet, target: tuple[str, str], encoding: Encoding, tokens: int, vectors: int
) -> list[str]:
    """The instructions of a loop over half units of an integer encoding: two blocks of 32 columns each."""

    def body(
        b: ir.IRBuilder, sums: list[ir.Value], w: ir.Value, x: ir.Value, at: ir.Value, x_at: ir.Value, table: ir.Value
    ) -> list[ir.Value]:
        prefetched = encoding.scale_bytes if isa.prefetches else encoding.unit_bytes // 2
        tile.prefetch.emit(b, w, b.add(at, I64(PREFETCH_DISTANCE)), prefetched)
        for block in range(2):
            values = b.add(at, I64(encoding.scale_bytes + encoding.block_bytes * block))
            scales = b.add(at, I64(UNIT_ROWS * block))
            sums = tile.dot_block_int.emit(b, sums, tokens, encoding.code, [table], w, values, scales, x, x_at)
            x_at = b.add(x_at, I64(block_bytes(tokens, isa.start_bytes)))
        return sums

    step, x_step = 2 * encoding.block_bytes, 2 * block_bytes(tokens, isa.start_bytes)
    return _loop(isa, target, tokens * vectors, step, x_step, I8, I8, body, lambda b, x: isa.codebook(b, encoding, x))


def unpacked_loop(isa: InstructionSet, target: tuple[str, str]) -> list[str]:
    """The instructions of a loop over two blocks of unpacked weights by tiles of the widest width."""
    tokens = isa.panels_width or max(isa.tiles)
    block, x_block = UNPACKED.block_bytes, block_bytes(tokens, isa.start_bytes)

    def body(
        b: ir.IRBuilder, sums: list[ir.Value], w: ir.Value, x: ir.Value, at: ir.Value, x_at: ir.Value, _: ir.Value
    ) -> list[ir.Value]:
        scales = b.gep(w, [I64(-(1 << 20))])
        for n in range(2):
            values, scales_at = b.add(at, I64(block * n)), b.add(at, I64(UNIT_ROWS * n))
            multiplied = b.add(x_at, I64(x_block * n))
            sums = tile.dot_block_unpacked.emit(b, sums, tokens, w, values, scales, scales_at, x, multiplied)
        return sums

    return _loop(isa, target, tokens * isa.unpacked_vectors, 2 * block, 2 * x_block, I8, I8, body)


def unpacking_loop(isa: InstructionSet, target: tuple[str, str], encoding: Encoding) -> list[str]:
    """A loop that unpacks the blocks of a matrix to bytes."""

    def body(
        b: ir.IRBuilder, sums: list[ir.Value], w: ir.Value, x: ir.Value, at: ir.Value, x_at: ir.Value, table: ir.Value
    ) -> list[ir.Value]:
        tile.unpack_block.emit(b, encoding.code, [table], w, at, x, x_at)
        return sums

    return _loop(
        isa, target, 0, encoding.block_bytes, UNPACKED.block_bytes, I8, I8, body,
        lambda b, x: isa.codebook(b, encoding, x),
    )  # fmt: skip


def amx_loop(target: tuple[str, str], encoding: Encoding) -> list[str]:
    """A loop over two blocks of a matrix, of int8 as mapped or of others as unpacked, by 16 tokens."""
    in_place = encoding.block_bytes == amx.UNPACKED_BLOCK
    block, x_block = amx.UNPACKED_BLOCK, block_bytes(16, Amx.start_bytes)

    def body(
        b: ir.IRBuilder, sums: list[ir.Value], w: ir.Value, x: ir.Value, at: ir.Value, x_at: ir.Value, _: ir.Value
    ) -> list[ir.Value]:
        room = b.gep(w, [I64(-(1 << 20))])
        values = b.add(at, I64(encoding.scale_bytes)) if in_place else at
        for n in range(2):
            # The next block is multiplied before this one's sums are scaled.
            amx.start_block.emit(
                b, 1 - n, w, b.add(values, I64(block * (n + 1))), x, b.add(x_at, I64(x_block * (n + 1)))
            )
            scales, scaled = b.add(at, I64(UNIT_ROWS * n)), b.add(x_at, I64(x_block * n))
            sums = amx.finish_block.emit(b, sums, n, w, scales, x, scaled, room)
        return sums

    with mock.patch.multiple(amx, ISA=Amx(), LANES=16):
        return _loop(Amx(), target, 16, 2 * block, 2 * x_block, I8, I8, body)


def prompt_loop(target: tuple[str, str]) -> list[str]:
    """A loop over blocks of two row groups of unpacked weights by 32 tokens, in bf16."""

    def body(
        b: ir.IRBuilder, sums: list[ir.Value], w: ir.Value, x: ir.Value, at: ir.Value, x_at: ir.Value, _: ir.Value
    ) -> list[ir.Value]:
        amx_bf16.multiply_blocks.emit(b, 2, w, at, I64(1 << 16), x, x_at)
        return sums

    return _loop(AmxBf16(), target, 0, amx_bf16.REGISTER_BYTES, 2 * amx_bf16.REGISTER_BYTES, I8, I8, body)


def bfloats_loop(target: tuple[str, str], encoding: Encoding) -> list[str]:
    """A loop that unpacks the blocks of a matrix to bf16."""
    isa = AmxBf16()

    def body(
        b: ir.IRBuilder, sums: list[ir.Value], w: ir.Value, x: ir.Value, at: ir.Value, x_at: ir.Value, table: ir.Value
    ) -> list[ir.Value]:
        amx_bf16.unpack_bfloats.emit(b, encoding.code, [table], w, at, b.add(at, I64(1 << 20)), x, x_at)
        return sums

    with mock.patch.multiple(amx_bf16, ISA=isa):
        return _loop(
            isa, target, 0, encoding.block_bytes, amx_bf16.REGISTER_BYTES, I8, I8, body,
            lambda b, x: isa.codebook(b, encoding, x),
        )  # fmt: skip


def floating_loop(
    isa: InstructionSet, target: tuple[str, str], kind: str, tokens: int, vectors: int, together: int
) -> list[str]:
    """The loop over columns of `together` tiles: kind "bf16" for a matrix's, "half" or "float" for the KV cache's."""
    element = F32 if kind == "float" else I16
    dtype = {"bf16": tile.BFLOAT16, "half": tile.FLOAT16, "float": tile.FLOAT32}[kind]

    def body(
        b: ir.IRBuilder, sums: list[ir.Value], w: ir.Value, x: ir.Value, at: ir.Value, x_at: ir.Value, _: ir.Value
    ) -> list[ir.Value]:
        args = w, at, I64(1 << 12), x, x_at, I64(1)
        return list(tile.multiply_add_column.emit(b, sums, tokens, together, dtype, *args))

    return _loop(isa, target, tokens * vectors * together, 16, tokens, element, F32, body)


def recurrence_loop(isa: InstructionSet, target: tuple[str, str], blocks: int) -> list[str]:
    """The loop over rows of `blocks` blocks of a recurrent state, which updates them for a token and reads the next."""
    count, dim = blocks * recurrence.ROW // isa.lanes, 128
    floats = vector(F32, isa.lanes)

    def before(b: ir.IRBuilder, x: ir.Value) -> list[ir.Value]:
        deltas = [b.load(b.bitcast(b.gep(x, [I64(n * isa.lanes)]), floats.as_pointer()), align=4) for n in range(count)]
        return [*deltas, b.load(b.gep(x, [I64(-1)]))]

    def body(
        b: ir.IRBuilder, sums: list[ir.Value], w: ir.Value, x: ir.Value, at: ir.Value, x_at: ir.Value, held: Any
    ) -> list[ir.Value]:
        *deltas, decay = held
        keys = x_at, b.add(x_at, I64(2 * dim)), b.add(x_at, I64(3 * dim))
        target_at = b.add(at, I64(1 << 16))
        args = deltas, decay, w, at, w, target_at, I64(dim * recurrence.ROW), x, *keys
        return list(recurrence.update_dot_rows.emit(b, sums, *args))

    patched = {"LANES": isa.lanes, "FLOATS": floats, "_VECTORS": recurrence.ROW // isa.lanes}
    with mock.patch.multiple(recurrence, **patched):
        rows = recurrence.ROWS_AT_ONCE
        return _loop(isa, target, 2 * rows * count, rows * recurrence.ROW, rows, F32, F32, body, before)


def _loop(
    isa: InstructionSet,
    target: tuple[str, str],
    count: int,
    step: int,
    x_step: int,
    weight: ir.Type,
    activation: ir.Type,
    body: Body,
    before: Callable[[ir.IRBuilder, ir.Value], Any] = lambda b, x: None,
) -> list[str]:
    """Compile a loop of `body`, with `count` vectors of sums; each turn advances by `step` and `x_step` elements.

    before: loads what `body` receives as its last argument, given the activations' address.
    """
    floats = vector(F32, isa.lanes)
    module = ir.Module()
    module.triple, _ = target
    pointers = [kind.as_pointer() for kind in (weight, activation, F32)]
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [*pointers, I64]), "rows")
    w, x, out, turns = function.args
    entry, turn, end = (function.append_basic_block(name) for name in ("entry", "turn", "end"))
    b = ir.IRBuilder(entry)
    # Loaded once, before the loop.
    table = before(b, x)
    b.branch(turn)
    b = ir.IRBuilder(turn)
    carried = ir.ArrayType(floats, count)
    i, at, x_at, sums = (b.phi(kind) for kind in (I64, I64, I64, carried))
    with mock.patch.multiple(tile, ISA=isa, LANES=isa.lanes, FLOATS=floats):
        after = undefined(carried)
        for n, value in enumerate(body(b, [b.extract_value(sums, n) for n in range(count)], w, x, at, x_at, table)):
            after = b.insert_value(after, value, n)
    for phi, first, following in (
        (i, I64(0), b.add(i, I64(1))),
        (at, I64(0), b.add(at, I64(step))),
        (x_at, I64(0), b.add(x_at, I64(x_step))),
        (sums, ir.Constant(carried, None), after),
    ):
        phi.add_incoming(first, entry)
        phi.add_incoming(following, turn)
    b.cbranch(b.icmp_signed("<", b.add(i, I64(1)), turns), turn, end)
    b = ir.IRBuilder(end)
    for n in range(count):
        place = b.bitcast(b.gep(out, [I64(n * isa.lanes)]), floats.as_pointer())
        b.store(b.extract_value(after, n), place, align=4)
    b.ret_void()
    return innermost_loop(assembly(str(module), target))


def assembly(module: str, target: tuple[str, str]) -> str:
    """LLVM IR optimized and compiled for a (triple, processor)."""
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    triple, cpu = target
    machine = llvm.Target.from_triple(triple).create_target_machine(cpu=cpu, opt=3)
    parsed = llvm.parse_assembly(module)
    parsed.verify()
    options = llvm.create_pipeline_tuning_options(speed_level=3)
    builder = llvm.create_pass_builder(machine, options)
    builder.getModulePassManager().run(parsed, builder)
    return str(machine.emit_assembly(parsed))


def innermost_loop(text: str, holding: str = "") -> list[str]:
    """The instructions of the longest loop without a branch inside that contains the text `holding`."""
    best: list[str] = []
    label, body = "", list[str]()
    for line in (line.split("//")[0].rstrip() for line in text.splitlines()):
        start = re.match(r"(\.?L\w+):", line)
        if start:
            label, body = start[1], []
        elif line.startswith("\t") and not line.lstrip().startswith((".", "#")):
            body.append(line.strip())
            if re.match(rf"(b\.\w+|cbn?z|tbn?z|j\w+)\s.*{re.escape(label)}$", body[-1]) and label:
                if len(body) > len(best) and holding in " ".join(body):
                    best = body
                label, body = "", []
    assert best, "no loop found"
    return best


def mnemonics(loop: list[str]) -> list[str]:
    """The instructions' names."""
    return [line.split()[0] for line in loop]


def spills(loop: list[str]) -> list[str]:
    """The instructions that read or write the stack."""
    return [line for line in loop if re.search(r"\[sp\b|%[er]sp|%rbp", line)]
