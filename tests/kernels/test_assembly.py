"""The instructions that LLVM makes of the inner loops, for processors that this machine need not have."""

from __future__ import annotations

import re
from collections import Counter
from unittest import mock

import pytest
from assembly import (
    ALDER_LAKE,
    APPLE_M2,
    CORTEX_A76,
    HASWELL,
    NEOVERSE_V1,
    ZEN4,
    assembly,
    floating_loop,
    innermost_loop,
    integer_loop,
    mnemonics,
    recurrence_loop,
    spills,
    unpacked_loop,
)
from llvmlite import ir

from npqwen.format.encodings import ENCODINGS, INT4, Encoding
from npqwen.kernels import pieces
from npqwen.kernels.matmul import _integer_rows
from npqwen.simd.arm import Neon, NeonI8mm
from npqwen.simd.instructions import InstructionSet
from npqwen.simd.isa import ISA, has_dot_product, has_matrix_product
from npqwen.simd.x86 import Avx2, Avx512, Avx512Vbmi, AvxVnni

DOT = dict.fromkeys(("neon", "i8mm"), "sdot") | dict.fromkeys(("amx", "avx512vbmi", "avx512", "avxvnni"), "vpdpbusd")
DOT["avx2"] = "vpmaddubsw"
INTEGERS = pytest.mark.parametrize(
    "encoding", [encoding for encoding in ENCODINGS if encoding.is_integer], ids=lambda encoding: encoding.name
)


def unpacking(encoding: Encoding) -> int:
    """NEON instructions that make the 8 quads of a block: loads, and shifts, masks, inserts, lookups."""
    lookups = 8 if encoding.codebook else 0
    # Of two planes: the fields' shifts, an insert, a mask, less those that some quads do not need.
    fields = {"int3": 25, "int4": 8, "int5": 24, "int6": 18, "int8": 0}[encoding.name]
    return encoding.bits + fields + lookups


@INTEGERS
@pytest.mark.parametrize("tokens", Neon.tiles)
def test_neon(encoding: Encoding, tokens: int) -> None:
    vectors = Neon.tiles[tokens]
    loop = integer_loop(Neon(), CORTEX_A76, encoding, tokens, vectors)
    names = mnemonics(loop)
    dots = [line for line in loop if line.startswith("sdot")]
    # Two blocks of 32 columns, 4 columns an instruction; each takes its activations by a lane index.
    assert len(dots) == 2 * 8 * tokens * vectors
    assert all(line.rstrip("]")[:-1].endswith(".4b[") for line in dots)
    # Scales are integers, two blocks' of every vector; one shuffle extends them, others look values up.
    assert names.count("scvtf") == 2 * vectors
    assert names.count("tbl") == 2 * vectors * (9 if encoding.codebook else 1)
    assert not {"fcvtl", "ext", "zip1", "uzp1", "ins"} & set(names)
    # Some of 200 to 300 instructions, where a quad's bits lie in two planes.
    assert len(spills(loop)) <= (0 if tokens == 1 or len(encoding.planes) == 1 else len(loop) // 24)
    # A block takes, a vector of rows: its lines' unpacking, scales' load and conversion (3);
    # a token: 2 loads of activations, loads of scale and start;
    # each pair of them: 8 dot products, a copy of the start, subtraction, scaling, multiply-add.
    # Fourteen more count the loop and make constants; each 64 bytes of half a unit are prefetched.
    weights, prefetches = unpacking(encoding) + 4, -(-encoding.unit_bytes // 128)
    assert names.count("prfm") == prefetches
    work = 2 * (weights * vectors + 4 * tokens + 12 * tokens * vectors)
    assert len(loop) - len(spills(loop)) <= work + 14 + prefetches


@pytest.mark.parametrize("target", [APPLE_M2, NEOVERSE_V1], ids=["m2", "v1"])
@INTEGERS
@pytest.mark.parametrize("tokens", [n for n in NeonI8mm.tiles if n > 1])
def test_neon_matrix_products(encoding: Encoding, tokens: int, target: tuple[str, str]) -> None:
    loop = integer_loop(NeonI8mm(), target, encoding, tokens, 1)
    names = mnemonics(loop)
    # Two blocks of 32 columns; each instruction multiplies 8 columns of 2 rows by those of 2 tokens.
    assert names.count("smmla") == 2 * 4 * 2 * tokens // 2
    assert "sdot" not in names
    # Quads are interleaved before nibbles are unpacked: 4 or 8 for all tokens. Two more restore each pair's rows, of
    # which LLVM makes one a move.
    interleaved = 4 if encoding == INT4 else 8
    assert names.count("zip1") + names.count("zip2") == 2 * interleaved + tokens
    assert sum(".d[1]" in line for line in loop if line.startswith("mov")) == tokens
    # Starts are loaded for both tokens' rows, and as bits of floats.
    assert not {"dup", "ld1r"} & set(names)
    assert not {"fcvtl", "ext", "trn1", "trn2", "uzp1", "ins"} & set(names)
    assert len(spills(loop)) <= len(loop) // 20
    if tokens > 2:
        sdots = integer_loop(Neon(), target, encoding, 4, 1)
        assert len(loop) < len(sdots) * tokens / 4 * (0.86 if tokens == 8 else 1.03)


@pytest.mark.parametrize(
    ("isa", "target", "most"),
    # Sums of eight tokens fill the registers.
    [(Neon(), CORTEX_A76, 0), (NeonI8mm(), APPLE_M2, 12), (AvxVnni(), ALDER_LAKE, 0), (Avx2(), HASWELL, 12)],
    ids=["neon", "i8mm", "avxvnni", "avx2"],
)
def test_unpacked_weights(isa: InstructionSet, target: tuple[str, str], most: int) -> None:
    """Many tiles save a tenth or more of each one's instructions: none of those that unpack."""
    loop = unpacked_loop(isa, target)
    tokens = isa.panels_width or max(isa.tiles)
    assert len(loop) < 0.9 * len(integer_loop(isa, target, INT4, tokens, isa.unpacked_vectors))
    assert not {"ushr", "sri", "and", "vpsrlw", "vpand"} & set(mnemonics(loop))
    # AVX2 doubles the scales of two blocks.
    assert mnemonics(loop).count("vpshufb") == (2 * isa.unpacked_vectors if isa.name == "avx2" else 0)
    assert len(spills(loop)) <= most
    if isa.name == "avx2":  # its two multipliers are the limit: ten instructions for a token, a vector and a block
        assert mnemonics(loop).count("vpmaddubsw") == 2 * 8 * tokens * isa.unpacked_vectors
        assert mnemonics(loop).count("vpmaddwd") == 2 * 2 * tokens * isa.unpacked_vectors


def test_neon_matrix_products_of_one_token() -> None:
    """Memory is the limit then, and half of each instruction would be wasted."""
    names, plain = (Counter(mnemonics(integer_loop(isa, APPLE_M2, INT4, 1, 2))) for isa in (NeonI8mm(), Neon()))
    # The loops differ in how the two blocks' starts are loaded: spread, from addresses that are computed.
    assert sum((plain - names).values()) == (names - plain)["ld1r"] == 2
    assert not set(names - plain) - {"ld1r", "add", "sub"}


@pytest.mark.parametrize("kind", ["bf16", "half", "float"])
@pytest.mark.parametrize(("tokens", "vectors"), [(1, 4), (4, 1), (4, 4)])
def test_neon_floats(kind: str, tokens: int, vectors: int) -> None:
    columns = max(1, min(4, Neon.accumulators // (tokens * vectors)))
    loop = floating_loop(Neon(), CORTEX_A76, kind, tokens, vectors, columns)
    names = mnemonics(loop)
    assert names.count("fmla") == tokens * vectors * columns
    assert names.count("fcvtl") + names.count("fcvtl2") == (vectors * columns if kind == "half" else 0)
    assert not {"fmul", "fadd", "bl"} & set(names)
    assert not spills(loop)


@INTEGERS
@pytest.mark.parametrize(
    ("isa", "target", "instruction", "register"),
    [
        (Avx512Vbmi(), ZEN4, "vpdpbusd", "%zmm"),
        (Avx512(), ZEN4, "vpdpbusd", "%zmm"),
        (AvxVnni(), ALDER_LAKE, "vpdpbusd", "%ymm"),
        (Avx2(), HASWELL, "vpmaddubsw", "%ymm"),
    ],
    ids=["avx512vbmi", "avx512", "avxvnni", "avx2"],
)
def test_x86(isa: InstructionSet, target: tuple[str, str], instruction: str, register: str, encoding: Encoding) -> None:
    for tokens, vectors in isa.tiles.items():
        loop = integer_loop(isa, target, encoding, tokens, vectors)
        names = mnemonics([line.removeprefix("{vex}").strip() for line in loop])
        assert names.count(instruction) == 2 * 8 * tokens * vectors
        assert all(re.search(register + r"\d+$", line) for line in loop if instruction in line)
        assert names.count("vpmovsxbd") == 2 * vectors
        # One byte shuffle a quad; with AVX2 one that doubles the scales.
        doubled = 2 * vectors if isa.name == "avx2" and encoding.bits < 8 else 0
        shuffle = "vpermb" if isa.name == "avx512vbmi" else "vpshufb"
        assert names.count(shuffle) == (2 * 8 * vectors if encoding.codebook else 0) + doubled
        assert "callq" not in names
        # Some sums, where they fill half the registers or there are int16 sums, too.
        # Sixteen registers do not hold what is taken apart, either, where a quad's bits lie in two planes.
        lone = len(encoding.planes) == 1 or tokens == 16
        most = len(loop) // (12 if lone else 5) if tokens == 16 or isa.lanes == 8 else 0
        if isa.name == "avx2":
            # Half a block's products of weights below 64 are added up in int16, but only one of int8.
            assert names.count("vpmaddwd") == 2 * (8 if encoding.bits == 8 else 2) * tokens * vectors
            if tokens > 1 and encoding.bits < 8:  # the codebook, or quads that are taken apart once for all tokens
                most += 2 * 8 * vectors * (1 + tokens // 2)
        assert len(spills(loop)) <= most


@pytest.mark.skipif(ISA.name not in DOT, reason="the portable instruction set has no such instruction")
@INTEGERS
def test_this_machine(encoding: Encoding) -> None:
    """The whole kernel, compiled by Numba for this processor."""
    kernel = _integer_rows(encoding, 1)
    kernel.compile()  # not from the cache, which keeps no assembly
    text = kernel._library.get_asm_str()
    loop = innermost_loop(text, DOT[ISA.name])
    assert len([line for line in loop if DOT[ISA.name] in line]) == 2 * 8 * ISA.tiles[1]
    # Sixteen registers do not hold all that is taken apart where a quad's bits lie in two planes.
    assert len(spills(loop)) <= (len(loop) // 10 if ISA.lanes == 8 and len(encoding.planes) > 1 else 0)


@pytest.mark.parametrize(
    ("target", "instruction"), [(CORTEX_A76, "yield"), (ZEN4, "pause"), (("riscv64-unknown-linux-gnu", ""), None)]
)
def test_a_spinning_thread_executes_the_processors_hint(target: tuple[str, str], instruction: str | None) -> None:
    module = ir.Module()
    module.triple = target[0]
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), []), "wait")
    b = ir.IRBuilder(function.append_basic_block())
    with mock.patch("llvmlite.binding.get_process_triple", return_value=target[0]):
        pieces.pause.emit(b)
    b.ret_void()
    if instruction is None:
        assert "call" not in str(function)
    else:
        assert f"\t{instruction}\n" in assembly(str(module), target)


def test_the_dot_product_of_arm_cores() -> None:
    """LLVM 20 lists it neither among the features of a Raspberry Pi 5 nor of a Mac."""
    listed = "+aes,+crc,+fp-armv8,+lse,+neon,-rand,+sha2,-sve"
    assembly('target triple = "aarch64-unknown-linux-gnu"', CORTEX_A76)  # all targets are there
    assert has_dot_product(*CORTEX_A76, listed)
    assert has_dot_product("arm64-apple-darwin23.1.0", "apple-m1", "")
    assert has_dot_product(CORTEX_A76[0], "generic", "+neon,+dotprod")
    assert not has_dot_product(CORTEX_A76[0], "cortex-a72", listed)
    assert not has_dot_product(CORTEX_A76[0], "generic", "+neon")
    assert not has_dot_product(*ZEN4, "+avx512vnni")


def test_the_matrix_product_of_arm_cores() -> None:
    assembly('target triple = "aarch64-unknown-linux-gnu"', CORTEX_A76)
    for target in (APPLE_M2, NEOVERSE_V1, ("arm64-apple-darwin23.1.0", "apple-m4")):
        assert has_matrix_product(*target, "")
        assert has_dot_product(*target, "")
    assert has_matrix_product(CORTEX_A76[0], "generic", "+neon,+dotprod,+i8mm")
    assert not has_matrix_product(*CORTEX_A76, "+neon")
    assert not has_matrix_product("arm64-apple-darwin23.1.0", "apple-m1", "")
    assert not has_matrix_product(*ZEN4, "+avx512vnni")


@pytest.mark.parametrize(
    ("isa", "target", "blocks", "name"),
    [
        (Avx512(), ZEN4, 2, "vfmadd"),
        (Avx512(), ZEN4, 1, "vfmadd"),
        (Avx2(), HASWELL, 1, "vfmadd"),
        (Neon(), CORTEX_A76, 1, "fmla"),
    ],
    ids=["avx512-2", "avx512-1", "avx2", "neon"],
)
def test_a_recurrent_state_takes_four_operations_a_vector_in_registers(
    isa: InstructionSet, target: tuple[str, str], blocks: int, name: str
) -> None:
    loop = recurrence_loop(isa, target, blocks)
    vectors = 2 * blocks * 16 // isa.lanes  # of two rows
    names = mnemonics(loop)
    updates = sum(each in ("vmulps", "fmul") for each in names)
    assert updates in (vectors, 2 * vectors)  # LLVM may unroll once
    assert sum(each.startswith(name) for each in names) == 3 * updates
    assert not spills(loop)
