"""Products of matrices in AMX's registers: bitwise the sums of the kernels without it."""

from __future__ import annotations

import ctypes
from typing import Any
from unittest import mock

import llvmlite.binding as llvm
import numpy as np
import pytest
from assembly import SAPPHIRE_RAPIDS, amx_loop, bfloats_loop, mnemonics, prompt_loop, spills
from converted import random_units
from llvmlite import ir
from numba import njit
from numba.core.registry import cpu_target

from npqwen.format.encodings import ENCODINGS, Encoding
from npqwen.kernels.amx_matmul import AMX_ROOM_BYTES, amx_rows
from npqwen.kernels.compiled import address_of
from npqwen.kernels.entry import run_at
from npqwen.kernels.matmul import CHUNK_BYTES, _integer_rows, _rows
from npqwen.kernels.packing import pack, packed_bytes
from npqwen.kernels.unpacked_matmul import unpacked_bytes
from npqwen.simd import isa
from npqwen.simd.instructions import InstructionSet
from npqwen.simd.isa import ISA
from npqwen.simd.llvm import F32, I32, VOID, vector
from npqwen.simd.x86 import Amx, AmxBf16, Avx512Vbmi

INTEGERS = pytest.mark.parametrize(
    "encoding", [encoding for encoding in ENCODINGS if encoding.is_integer], ids=lambda encoding: encoding.name
)
here = pytest.mark.skipif(not ISA.matrices, reason="this processor has no AMX, or it is not used")


@njit(nogil=True)
def _run(kernel: int, args: Any) -> None:
    run_at(kernel, args)


def _aligned(size: int, offset: int) -> np.ndarray:
    """Zeroed bytes that begin at an offset from a cache line."""
    raw = np.zeros(size + 128, np.uint8)
    start = -raw.ctypes.data % 64 + offset
    return raw[start : start + size]


@here
@INTEGERS
@pytest.mark.parametrize("accumulate", [0, 1])
@pytest.mark.parametrize(("groups", "units", "tiles"), [(1, 1, 1), (3, 2, 1), (2, 5, 3), (14, 8, 2)])
def test_results_are_those_without_amx_to_the_bit(
    encoding: Encoding, accumulate: int, groups: int, units: int, tiles: int
) -> None:
    rng = np.random.default_rng(groups)
    cols, tokens = 128 * units, 16 * tiles
    weights = random_units(encoding.bits, np.ones(16 * groups, bool), cols, rng)
    codebook = np.zeros(64, np.uint8) if weights.codebook is None else weights.codebook
    x = _aligned(packed_bytes(tokens, cols), 16)
    for t in range(tokens):
        values = rng.standard_normal(cols) * 10.0 ** rng.integers(-3, 4)
        pack(values.astype(np.float32), t, 16, encoding.code, x)
    before = rng.standard_normal((tokens, 16 * groups + 3)).astype(np.float32)
    results = []
    for kernel in (amx_rows(encoding), _integer_rows(encoding, 16)):
        out = before.copy()
        # Guard bytes behind the scratch must not change.
        scratch = _aligned(unpacked_bytes(cols, CHUNK_BYTES) + AMX_ROOM_BYTES + 64, 4)
        scratch[-64:] = 77
        args = (
            weights.rows.ctypes.data, codebook.ctypes.data, units, 0, groups, x.ctypes.data, tiles, out.ctypes.data,
            out.shape[1], accumulate, scratch.ctypes.data,
        )  # fmt: skip
        _run(address_of(kernel), args)
        assert np.all(scratch[-64:] == 77)
        results.append(out)
    assert np.array_equal(results[0], results[1])
    assert not np.array_equal(results[0][:, : 16 * groups], before[:, : 16 * groups])
    assert np.array_equal(results[0][:, 16 * groups :], before[:, 16 * groups :])


@here
@INTEGERS
def test_the_widest_tiles_use_matrix_products(encoding: Encoding) -> None:
    kernel = _rows(encoding, 16)
    kernel.compile()  # not from the cache, which keeps no assembly
    assert "tdpbssd" in kernel._library.get_asm_str()


@INTEGERS
def test_inner_loop(encoding: Encoding) -> None:
    """Two blocks per iteration; besides tile loads and stores it only scales the sums."""
    loop = amx_loop(SAPPHIRE_RAPIDS, encoding)
    names = mnemonics(loop)
    assert names.count("tdpbssd") == 2
    assert names.count("tileloadd") == 4
    assert names.count("tilestored") == 2
    assert names.count("vcvtdq2ps") == 32 + 2  # and the scales
    assert len([name for name in names if name.startswith("vfmadd")]) == 32
    assert len(spills(loop)) <= 4
    assert len(loop) < 130


def test_inner_loop_in_bf16() -> None:
    """Four products for four loads: the loads take half of the products' time."""
    names = mnemonics(prompt_loop(SAPPHIRE_RAPIDS))  # unrolled
    products = names.count("tdpbf16ps")
    assert products >= 4
    assert names.count("tileloadd") == products
    assert len(names) <= 3 * products


@INTEGERS
def test_unpacking_to_bf16(encoding: Encoding) -> None:
    """32 weights a conversion; an instruction for every 2 to 3 weights, as all tokens of a pass share them."""
    loop = bfloats_loop(SAPPHIRE_RAPIDS, encoding)
    assert mnemonics(loop).count("vcvtne2ps2bf16") == 16
    assert len(spills(loop)) == 0
    assert len(loop) < 250, loop


@pytest.mark.skipif(not llvm.get_host_cpu_features().get("avx512bf16"), reason="this processor cannot convert to bf16")
def test_the_instruction_that_rounds_to_bf16() -> None:
    """AMX's processors have it, and so have others: it gives the bits of the portable operation."""
    rng = np.random.default_rng(0)
    even, odd = (rng.standard_normal((64, 16)).astype(np.float32) for _ in range(2))
    even[0], odd[1] = TIES, -TIES
    assert np.array_equal(pairs(AmxBf16(), even, odd), pairs(Portable16(), even, odd))


TIES = np.resize(np.array([0x3F808000, 0x3F818000, 0x3F80FFFF, 0], np.uint32), 16).view(np.float32)
"""Between two bf16, the first two exactly: of these, the even one is taken."""


class Portable16(InstructionSet):
    """The portable operations on vectors of 16 lanes."""

    lanes = 16


def pairs(isa: InstructionSet, even: np.ndarray, odd: np.ndarray) -> np.ndarray:
    """`bfloat_pairs` of rows of 16 float32, compiled for this processor: uint32."""
    module, kind = ir.Module(), vector(F32, 16)
    function = ir.Function(module, ir.FunctionType(VOID, [kind.as_pointer()] * 2 + [vector(I32, 16).as_pointer()]), "f")
    b = ir.IRBuilder(function.append_basic_block())
    low, high, out = function.args
    b.store(isa.bfloat_pairs(b, b.load(low, align=4), b.load(high, align=4)), out, align=4)
    b.ret_void()
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    features = llvm.get_host_cpu_features().flatten()
    machine = llvm.Target.from_default_triple().create_target_machine(llvm.get_host_cpu_name(), features, 2)
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(str(module)), machine)
    engine.finalize_object()
    call = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 3)(engine.get_function_address("f"))
    found = np.empty(even.shape, np.uint32)
    for x, y, z in zip(even, odd, found, strict=True):
        call(x.ctypes.data, y.ctypes.data, z.ctypes.data)
    return found


def test_the_portable_rounding_to_bf16() -> None:
    rng = np.random.default_rng(0)
    even, odd = (rng.standard_normal((64, 16)).astype(np.float32) for _ in range(2))
    found = pairs(Portable16(), even, odd)
    for halves, x in ((found & 0xFFFF, even), (found >> 16, odd)):
        rounded = (halves << 16).view(np.float32)
        assert (np.abs(rounded - x) <= np.abs(x) * 2.0**-8).all()
    found = pairs(Portable16(), TIES[None], TIES[None])[0]
    assert [hex(word) for word in found[:4]] == ["0x3f803f80", "0x3f823f82", "0x3f813f81", "0x0"]


def test_without_permission_amx_is_not_available() -> None:
    """The next best instruction set is chosen if the operating system refuses the tile registers."""
    listed = ",".join("+" + feature for feature in AmxBf16.features)
    codegen = mock.Mock(magic_tuple=lambda: ("x86_64-unknown-linux-gnu", "sapphirerapids", listed))
    with mock.patch.object(cpu_target.target_context, "codegen", return_value=codegen):
        with mock.patch.object(Amx, "allowed", return_value=True):
            assert isa.available()[0] is AmxBf16
        with mock.patch.object(Amx, "allowed", return_value=False):
            assert isa.available()[0] is Avx512Vbmi


@pytest.mark.parametrize(
    ("system", "machine", "answer", "allowed"),
    [
        ("linux", "x86_64", 0, True),
        ("linux", "x86_64", -1, False),
        ("linux", "i686", 0, False),
        ("win32", "x86_64", 0, False),
        ("darwin", "x86_64", 0, False),
    ],
)
def test_permission_is_requested_only_on_linux(system: str, machine: str, answer: int, allowed: bool) -> None:
    library = mock.Mock()
    library.syscall.return_value = answer
    with (
        mock.patch("npqwen.simd.x86.sys.platform", system),
        mock.patch("npqwen.simd.x86.platform.machine", return_value=machine),
        mock.patch("npqwen.simd.x86.ctypes.CDLL", return_value=library),
    ):
        assert Amx.allowed() is allowed
